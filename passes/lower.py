"""Lowers codec operators to what Inductor compiles. Lossless.

                             CPU                                    CUDA
    quantize(x, ...)         quantize_compiled(x, ...), one body    inside the kernel that computes x, or its own
                             per format, compiled once
    dequantize(codes, ...)   inside whatever reads it               inside whatever reads it, or its own kernel where
    unpack_bool(packed)      inside whatever reads it               libraries alone do

Interpreted graphs keep the operators.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import ir
from torch._inductor.lowering import (
    fallback_handler,
    lowerings,
    make_fallback,
    needs_realized_inputs,
    register_lowering,
    tag_to_layout_constraint,
)
from torch._inductor.utils import sympy_product
from torch._inductor.virtualized import V
from torch._library.utils import get_layout_constraint_tag

from actcompile.plan import Plan

from ..triton_kernels import _compiled_cpu  # noqa: F401  defines quantize_compiled
from ..triton_kernels._layout import storage_permutation
from . import _fused_encoder
from ._decoder_loops import decode_groups, unpack_mask
from ._fx import GraphPair
from ._views import ALIAS_OPS

aten = torch.ops.aten
actcompile = torch.ops.actcompile

_COMPILED_ON_CPU = {actcompile.quantize.default: actcompile.quantize_compiled.default}

# Calls of libraries that Inductor knows by lowerings of their own.
_LIBRARY_CALLS = frozenset({aten.addmm.default, aten.baddbmm.default})

# Operators that stay opaque, or read what lies in memory with the strides that were traced. Inductor would get to know
# each when it first meets it, and schedule the first graph of a process differently from all others.
for _operator in (
    actcompile.quantize.default,
    actcompile.quantize_compiled.default,
    actcompile.pack_bool.default,
    actcompile.quantized_weight_grad.default,
):
    _constraint = tag_to_layout_constraint(get_layout_constraint_tag(_operator, with_default=True))
    make_fallback(_operator, layout_constraint=_constraint, warn=False)  # type: ignore[no-untyped-call]


def lower_encoders(pair: GraphPair, plan: Plan) -> None:
    """Points encoders on the CPU to their compiled bodies."""
    for node in pair.forward.graph.nodes:
        if node.target in _COMPILED_ON_CPU and node.args[0].meta["val"].device.type == "cpu":
            node.target = _COMPILED_ON_CPU[node.target]


def _launch(operator: torch._ops.OpOverload, *args: Any) -> Any:
    """Calls ``operator`` as it is, which launches its kernel."""
    return fallback_handler(operator, add_to_fallback_set=False)(*args)  # type: ignore[no-untyped-call]


def _is_read_from_memory(node: fx.Node) -> bool:
    """Whether all that reads ``node`` are kernels of a library, into which nothing fuses."""
    return all(
        _is_read_from_memory(user) if user.target in ALIAS_OPS else user.target in _LIBRARY_CALLS or _is_opaque(user)
        for user in node.users
    )


def _is_opaque(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target in needs_realized_inputs


@register_lowering(actcompile.quantize.default, type_promotion_kind=None)
def _lower_quantize(x: ir.TensorBox, bits: int, group_size: int, seed: ir.TensorBox, salt: int) -> Any:
    traced = V.graph.current_node.all_input_nodes[0].meta["val"]
    if x.get_device_or_error().type == "cpu" or not _fused_encoder.is_fusable(sympy_product(x.get_size()), group_size):
        return _launch(actcompile.quantize.default, x, bits, group_size, seed, salt)
    x.realize()
    order = storage_permutation(traced.shape, traced.stride())
    flat = lowerings[aten.view](lowerings[aten.permute](x, order), [sympy_product(x.get_size())])
    return _fused_encoder.create_encoder(flat, seed, bits, group_size, salt)


@register_lowering(actcompile.dequantize.default, type_promotion_kind=None)
def _lower_dequantize(
    codes: ir.TensorBox,
    scale: ir.TensorBox,
    zero: ir.TensorBox,
    bits: int,
    group_size: int,
    shape: Sequence[Any],
    stride: Sequence[Any],
    dtype: torch.dtype,
) -> Any:
    arguments = codes, scale, zero, bits, group_size, shape, stride, dtype
    if codes.get_device_or_error().type != "cpu" and _is_read_from_memory(V.graph.current_node):
        return _launch(actcompile.dequantize.default, *arguments)
    return decode_groups(*arguments)


@register_lowering(actcompile.unpack_bool.default, type_promotion_kind=None)
def _lower_unpack_bool(packed: ir.TensorBox, shape: Sequence[Any], stride: Sequence[Any] | None = None) -> Any:
    if packed.get_device_or_error().type != "cpu" and _is_read_from_memory(V.graph.current_node):
        return _launch(actcompile.unpack_bool.default, packed, shape, stride)
    return unpack_mask(packed, shape, stride)
