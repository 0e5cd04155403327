"""Lowers codec operators to what Inductor compiles. Lossless.

                             CPU                                    CUDA
    quantize(x, ...)         quantize_compiled(x, ...), one body    inside the kernel that computes x, or its own
                             per format, compiled once
    dequantize(codes, ...)   inside whatever reads it; in memory    inside whatever reads it, or its own kernel where
                             if channels cut groups                 libraries alone do
    unpack_bool(packed)      inside whatever reads it               inside whatever reads it, or as above
    pack_bool(mask)          pack_bytes(uint8(mask))                its own kernel
    sparsify(x, ...), densify(index, ...), sparse_weight_grad(g, index, ...): compiled bodies, or kernels of their own

Interpreted graphs keep the operators.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor import ir
from torch._inductor.lowering import (
    constrain_to_fake_tensor,
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

from ..triton_kernels._compiled_cpu import Format, start_compiling  # their operators are defined there, too
from ..triton_kernels._compiled_topk import SparseFormat, start_compiling_sparse
from ..triton_kernels._layout import storage_permutation
from . import _fused_encoder
from ._decoder_loops import decode_groups, unpack_mask
from ._fx import GraphPair, call, fake_mode
from ._views import ALIAS_OPS

aten = torch.ops.aten
convert = torch.ops.prims.convert_element_type.default
actcompile = torch.ops.actcompile

_COMPILED_ON_CPU = {
    actcompile.quantize.default: actcompile.quantize_compiled.default,
    actcompile.sparsify.default: actcompile.sparsify_compiled.default,
    actcompile.densify.default: actcompile.densify_compiled.default,
    actcompile.sparse_weight_grad.default: actcompile.sparse_weight_grad_compiled.default,
}

# Where encoders keep what they were traced with.
_TRACED = "actcompile_traced"

# Decoders that become part of what reads them.
_FUSED_DECODERS = frozenset({actcompile.dequantize.default, actcompile.unpack_bool.default})

# Calls of libraries that Inductor knows by lowerings of their own.
_LIBRARY_CALLS = frozenset({aten.addmm.default, aten.baddbmm.default})

# Operators that stay opaque, or read what lies in memory with the strides that were traced. Inductor would get to know
# each when it first meets it, and schedule the first graph of a process differently from all others.
for _operator in (
    *_COMPILED_ON_CPU,
    *_COMPILED_ON_CPU.values(),
    actcompile.pack_bool.default,
    actcompile.pack_bytes.default,
    actcompile.quantized_weight_grad.default,
    actcompile.sample_rows.default,
    actcompile.sampled_weight_grad.default,
):
    _constraint = tag_to_layout_constraint(get_layout_constraint_tag(_operator, with_default=True))
    make_fallback(_operator, layout_constraint=_constraint, warn=False)  # type: ignore[no-untyped-call]


def lower_codecs(pair: GraphPair, plan: Plan) -> None:
    """Points operators on the CPU to their compiled bodies, and gives libraries on other devices decoders of their own.

    What anything else reads would otherwise be decoded to memory for the library, and read there. Masks on the CPU are
    written as bytes, and on other devices what is encoded need not lie in memory.
    """
    for node in (*pair.forward.graph.nodes, *pair.backward.graph.nodes):
        if node.target in _COMPILED_ON_CPU and node.args[0].meta["val"].device.type == "cpu":
            node.target = _COMPILED_ON_CPU[node.target]
    free_inputs(pair.forward.graph)
    for node in pair.forward.graph.find_nodes(op="call_function", target=actcompile.pack_bool.default):
        if node.args[0].meta["val"].device.type == "cpu" and _is_computed(node.args[0]):
            _pack_bytes(node)
    for node in list(pair.backward.graph.nodes):
        if node.target in _FUSED_DECODERS and node.meta["val"].device.type != "cpu":
            _split(node)


def free_inputs(graph: fx.Graph) -> None:
    """Lets encoders compute what they encode: held to strides, Inductor would write it to memory for them.

    The lowering reads them under a name of ours.
    """
    for node in graph.find_nodes(op="call_function", target=actcompile.quantize.default):
        if "eager_input_vals" in node.meta:
            (node.meta[_TRACED], *_), _ = node.meta.pop("eager_input_vals")


def _is_computed(mask: fx.Node) -> bool:
    """Whether ``mask`` is not in memory anyway."""
    return mask.op == "call_function" and mask.target is not operator.getitem


def _pack_bytes(encoder: fx.Node) -> None:
    """Has the mask that ``encoder`` packs written as bytes: of bools Inductor's C++ writes one at a time, in 10 ns."""
    (mask,) = encoder.all_input_nodes
    graph = encoder.graph
    with fake_mode(graph):
        computed = mask.meta["val"].to(torch.uint8)
    if _order(computed) != _order(mask.meta["val"]):
        return
    with graph.inserting_before(encoder):
        # By way of float32: masks become bytes one at a time, too.
        numbers = call(graph, convert, mask, torch.float32)
        encoder.args = (call(graph, convert, numbers, torch.uint8),)
    encoder.target = actcompile.pack_bytes.default


def _order(value: torch.Tensor) -> list[int]:
    return storage_permutation(value.shape, value.stride())


def _split(decoder: fx.Node) -> None:
    libraries = [user for user in decoder.users if _is_library_call(user)]
    if libraries and len(libraries) < len(decoder.users):
        with decoder.graph.inserting_after(decoder):
            copy = decoder.graph.node_copy(decoder)
        for user in libraries:
            user.replace_input_with(decoder, copy)


def start_compiling_bodies(pair: GraphPair) -> None:
    """Compiles the bodies of operators on the CPU while the forward, which calls them first, is compiled."""
    Bodies.of(pair).start_compiling()


class Bodies(NamedTuple):
    """The formats whose compiled bodies a forward calls: one source serves several, so that all are named at once."""

    dense: tuple[Format, ...]
    sparse: tuple[SparseFormat, ...]

    @classmethod
    def of(cls, pair: GraphPair) -> "Bodies":
        """Those of ``pair``."""
        return cls(tuple(compiled_formats(pair)), tuple(_sparse_formats(pair)))

    def start_compiling(self) -> None:
        """Compiles what is not there yet, while the caller goes on."""
        start_compiling(self.dense)
        start_compiling_sparse(self.sparse)


def _sparse_formats(pair: GraphPair) -> list[SparseFormat]:
    encoders = pair.forward.graph.find_nodes(op="call_function", target=actcompile.sparsify_compiled.default)
    return [(node.args[2], node.args[0].meta["val"].dtype) for node in encoders]


def compiled_formats(pair: GraphPair) -> list[Format]:
    """The formats whose compiled bodies the forward calls."""
    encoders = pair.forward.graph.find_nodes(op="call_function", target=actcompile.quantize_compiled.default)
    return [(node.args[1], node.args[2], node.args[0].meta["val"].dtype) for node in encoders]


def _launch(operator: torch._ops.OpOverload, *args: Any) -> Any:
    """Calls ``operator`` as it is, which launches its kernel."""
    return fallback_handler(operator, add_to_fallback_set=False)(*args)  # type: ignore[no-untyped-call]


def _is_library_call(user: fx.Node) -> bool:
    """Whether nothing fuses into what ``user`` computes, or, if it is a view, into what reads it."""
    if user.target in ALIAS_OPS:
        return all(map(_is_library_call, user.users))
    return user.target in _LIBRARY_CALLS or (
        isinstance(user.target, torch._ops.OpOverload) and user.target in needs_realized_inputs
    )


def _is_launched(value: ir.TensorBox) -> bool:
    """Whether the decoder being lowered has a kernel of its own: libraries alone read what it decodes."""
    return value.get_device_or_error().type != "cpu" and all(map(_is_library_call, V.graph.current_node.users))


def _is_pointwise(value: ir.TensorBox) -> bool:
    """Whether ``value`` is computed element by element by whatever reads it."""
    return isinstance(value.data, ir.StorageBox) and isinstance(value.data.data, ir.Pointwise)


@register_lowering(actcompile.quantize.default, type_promotion_kind=None)
def _lower_quantize(x: ir.TensorBox, bits: int, group_size: int, seed: ir.TensorBox, salt: int) -> Any:
    node = V.graph.current_node
    source = node.all_input_nodes[0]
    traced = node.meta.get(_TRACED, source.meta["val"])
    if x.get_device_or_error().type == "cpu" or not _fused_encoder.is_fusable(sympy_product(x.get_size()), group_size):
        x = constrain_to_fake_tensor(x, traced)  # type: ignore[no-untyped-call]
        return _launch(actcompile.quantize.default, x, bits, group_size, seed, salt)
    # What nobody else reads, and is no view, is computed where it is encoded: otherwise rows that hold no whole groups
    # are written to memory by the kernel of their statistics, those of a softmax over a vocabulary in float32.
    if len(source.users) > 1 or not _is_pointwise(x):
        x.realize()
    order = _order(traced)
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
    if _is_launched(codes):
        return _launch(actcompile.dequantize.default, *arguments)
    # Views of what lies in memory are read there; of what is realized later, each reader would get a copy.
    in_memory = any(user.target in needs_realized_inputs for user in V.graph.current_node.users)
    return decode_groups(*arguments, in_memory=in_memory)


@register_lowering(actcompile.unpack_bool.default, type_promotion_kind=None)
def _lower_unpack_bool(packed: ir.TensorBox, shape: Sequence[Any], stride: Sequence[Any] | None = None) -> Any:
    if _is_launched(packed):
        return _launch(actcompile.unpack_bool.default, packed, shape, stride)
    return unpack_mask(packed, shape, stride)
