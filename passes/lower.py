"""Lowers codec operators to what Inductor compiles. Lossless.

    quantize(x, ...)      ->  quantize_compiled(x, ...)                one body per format, compiled once (CPU)
    dequantize(codes...)  ->  pointwise over the element's position    fused into whatever reads it (CPU)
    unpack_bool(packed)   ->  pointwise over the element's position    fused into whatever reads it (CPU)

On CUDA the operators stay as they are and launch their Triton kernels. Interpreted graphs keep the operators, too.

Decoding has Inductor lowerings of its own instead of ATen operators: one node instead of ten per saved tensor to trace,
fuse and schedule, and a loop whose innermost index runs along the bytes, which vectorizes.
"""

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import (
    fallback_handler,
    lowerings,
    make_fallback,
    needs_realized_inputs,
    register_lowering,
    tag_to_layout_constraint,
)
from torch._inductor.utils import convert_shape_to_symint, sympy_product
from torch._inductor.virtualized import V, ops
from torch._library.utils import get_layout_constraint_tag
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from actcompile.plan import Plan

from ..triton_kernels._compiled_cpu import Format  # quantize_compiled is defined there, too
from ..triton_kernels._layout import storage_permutation
from ..triton_kernels.quantize import PLANES
from ._fx import GraphPair

aten = torch.ops.aten
actcompile = torch.ops.actcompile

_COMPILED_ON_CPU = {actcompile.quantize.default: actcompile.quantize_compiled.default}

# Operators that stay opaque. Inductor would get to know each when it first meets it, and schedule the first graph of a
# process differently from all others.
for _operator in (actcompile.quantize.default, actcompile.quantize_compiled.default, actcompile.pack_bool.default):
    _constraint = tag_to_layout_constraint(get_layout_constraint_tag(_operator, with_default=True))
    make_fallback(_operator, layout_constraint=_constraint, warn=False)  # type: ignore[no-untyped-call]


def lower_encoders(pair: GraphPair, plan: Plan) -> None:
    """Points encoders on the CPU to their compiled bodies."""
    for node in pair.forward.graph.nodes:
        if node.target in _COMPILED_ON_CPU and node.args[0].meta["val"].device.type == "cpu":
            node.target = _COMPILED_ON_CPU[node.target]


def compiled_formats(pair: GraphPair) -> list[Format]:
    """The formats whose compiled bodies the forward calls."""
    encoders = pair.forward.graph.find_nodes(op="call_function", target=actcompile.quantize_compiled.default)
    return [(node.args[1], node.args[2], node.args[0].meta["val"].dtype) for node in encoders]


def _launch(operator: torch._ops.OpOverload, *args: Any) -> Any:
    """Calls ``operator`` as it is, which launches its kernel."""
    return fallback_handler(operator, add_to_fallback_set=False)(*args)  # type: ignore[no-untyped-call]


def _constant(value: int) -> Any:
    return ops.constant(value, torch.int32)


def _convert(value: Any, source: torch.dtype, dtype: torch.dtype) -> Any:
    return value if source == dtype else ops.to_dtype(value, dtype)


def _field(byte: Any, position: sympy.Expr, width: int) -> tuple[Any, Any]:
    """The field of ``width`` bits at ``position`` in a byte: the byte without the others, and the field's unit in it.

    A shift of the byte itself would have to widen it to int32 first, which takes longer than all the rest. Inductor
    writes code for every operator several times: the fewer, the sooner it is done.
    """
    if width == 8:
        return byte, None
    if width == 4:
        # 1 or 16.
        unit = ops.index_expr(1 + 15 * position, torch.int32)
    else:
        unit = ops.bitwise_left_shift(_constant(1), ops.index_expr(position * width, torch.int32))
    mask = ops.mul(unit, _constant(2**width - 1))
    return ops.bitwise_and(byte, ops.to_dtype(mask, torch.uint8)), unit


def _restore(value: ir.TensorBox, shape: Sequence[Any], stride: Sequence[Any]) -> ir.TensorBox:
    """The first elements of ``value``, in storage order, as ``shape`` with ``stride``."""
    # Symbols decide as they did while tracing: encoders look at the sizes of each call.
    symbols: Any = convert_shape_to_symint(shape), convert_shape_to_symint(stride)
    order = storage_permutation(*symbols)
    numel = sympy_product(shape)
    flat = lowerings[aten.view](value, [sympy_product(value.get_size())])
    if flat.get_size()[0] != numel:
        flat = lowerings[aten.slice](flat, 0, 0, numel)
    stored = lowerings[aten.view](flat, [shape[dim] for dim in order])
    return lowerings[aten.permute](stored, [order.index(dim) for dim in range(len(order))])


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
    if codes.get_device_or_error().type != "cpu":
        return _launch(actcompile.dequantize.default, codes, scale, zero, bits, group_size, shape, stride, dtype)
    (groups,) = scale.get_size()
    load_codes, load_scale, load_zero = codes.make_loader(), scale.make_loader(), zero.make_loader()
    # Loops over [group, part, column]: the parts of the narrowest plane, each a run of bytes in every plane.
    parts = 8 // min(PLANES[bits])
    run = group_size // parts

    def decode(index: Sequence[sympy.Expr]) -> Any:
        group, part, column = index
        step = ops.to_dtype(load_scale([group]), torch.float32)
        distance, start, offset = None, sympy.Integer(0), 0
        for width in PLANES[bits]:
            nbytes = group_size * width // 8
            # A wider plane holds several parts side by side in one field.
            beside = nbytes // run
            within = ModularIndexing(part, 1, beside) * run + column
            byte = load_codes([start + group * nbytes + within])
            field, unit = _field(byte, FloorDiv(part, beside), width)
            # Powers of two: exact, and so is the sum of the planes. A field of 8 bits is the only plane.
            weighted = step
            if unit is not None:
                weight = ops.truediv(ops.constant(2.0**offset, torch.float32), ops.to_dtype(unit, torch.float32))
                weighted = ops.mul(step, weight)
            share = ops.mul(weighted, ops.to_dtype(field, torch.float32))
            distance = share if distance is None else ops.add(distance, share)
            start, offset = start + groups * nbytes, offset + width
        result = ops.add(_convert(load_zero([group]), dtype, torch.float32), distance)
        return _convert(result, torch.float32, dtype)

    device = codes.get_device()
    decoded = ir.Pointwise.create(device=device, dtype=dtype, inner_fn=decode, ranges=[groups, parts, run])
    if any(user.target in needs_realized_inputs for user in V.graph.current_node.users):
        # Views of what lies in memory are read there; of what is realized later, each reader would get a copy.
        decoded.realize()
    return _restore(decoded, shape, stride)


@register_lowering(actcompile.unpack_bool.default, type_promotion_kind=None)
def _lower_unpack_bool(packed: ir.TensorBox, shape: Sequence[Any], stride: Sequence[Any] | None = None) -> Any:
    if packed.get_device_or_error().type != "cpu":
        return _launch(actcompile.unpack_bool.default, packed, shape, stride)
    (nbytes,) = packed.get_size()
    load = packed.make_loader()

    def decode(index: Sequence[sympy.Expr]) -> Any:
        position, byte = index
        # In float32: Inductor converts masks between the widths of vectors one element at a time.
        field, _ = _field(load([byte]), position, 1)
        return ops.ne(ops.to_dtype(field, torch.float32), ops.constant(0.0, torch.float32))

    device = packed.get_device()
    mask = ir.Pointwise.create(device=device, dtype=torch.bool, inner_fn=decode, ranges=[sympy.Integer(8), nbytes])
    return _restore(mask, shape, stride if stride is not None else ir.FlexibleLayout.contiguous_strides(shape))
