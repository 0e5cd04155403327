"""Decoders as loops that Inductor fuses into whatever reads them.

Pointwise functions of an element's position instead of ATen operators: one node instead of ten per saved tensor to
trace, fuse and schedule, and a loop whose innermost index runs along the bytes, which vectorizes.
"""

import math
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings
from torch._inductor.ops_handler import OpCounterCSE
from torch._inductor.utils import convert_shape_to_symint, sympy_product
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from ..triton_kernels._layout import storage_permutation
from ..triton_kernels.quantize import PLANES

aten = torch.ops.aten

# Elements that C++ takes at once, at the most.
_VECTOR = 32


def decode_groups(
    codes: ir.TensorBox,
    scale: ir.TensorBox,
    zero: ir.TensorBox,
    bits: int,
    group_size: int,
    shape: Sequence[Any],
    stride: Sequence[Any],
    dtype: torch.dtype,
    in_memory: bool,
) -> ir.TensorBox:
    """``dequantize`` as loops over runs of elements that lie in one part of the narrowest plane of one group.

    With ``in_memory``, or on the CPU where images' channels cut groups, what is decoded lies there for all readers.
    """
    (groups,) = scale.get_size()
    load_codes, load_scale, load_zero = codes.make_loader(), scale.make_loader(), zero.make_loader()
    is_cpu, order = _is_on_cpu(codes), _storage_order(shape, stride)
    in_memory = in_memory or (is_cpu and _cuts_groups(group_size, shape, order))
    parts = 8 // min(PLANES[bits])
    run = group_size // parts
    unit = _unit(run, group_size, shape, order) if is_cpu and not in_memory else None
    ranges = [groups, parts, run] if unit is None else [groups * (group_size // unit), unit]

    def decode(index: Sequence[sympy.Expr]) -> Any:
        group, part, column = index if unit is None else _locate(index, unit, run, group_size)
        if _is_counting():
            return ops.to_dtype(load_codes([group * run + column]), dtype)
        of_group = _of_group(group, groups, is_cpu)
        step = ops.to_dtype(load_scale(of_group), torch.float32)
        distance, start, offset = None, sympy.Integer(0), 0
        for width in PLANES[bits]:
            nbytes = group_size * width // 8
            # A wider plane holds several parts side by side in one field.
            beside = nbytes // run
            within = ModularIndexing(part, 1, beside) * run + column
            byte = load_codes([start + group * nbytes + within])
            field, weight = _field(byte, FloorDiv(part, beside), width, 2.0**offset, is_cpu)
            # Powers of two: exact, and so is the sum of the planes.
            share = ops.mul(step if weight is None else ops.mul(step, weight), field)
            distance = share if distance is None else ops.add(distance, share)
            start, offset = start + groups * nbytes, offset + width
        result = ops.add(_convert(load_zero(of_group), dtype, torch.float32), distance)
        # In a marked group, whose scale is negative, the highest code means nan; elsewhere no distance is below zero.
        farthest = ops.mul(ops.abs(step), _number(0.5 - (2**bits - 1)))
        result = ops.where(ops.gt(distance, farthest), result, _number(math.nan))
        return _convert(result, torch.float32, dtype)

    device = codes.get_device()
    decoded = ir.Pointwise.create(device=device, dtype=dtype, inner_fn=decode, ranges=ranges)
    if in_memory:
        decoded.realize()
    return _restore(decoded, shape, order)


def _storage_order(shape: Sequence[Any], stride: Sequence[Any]) -> list[int]:
    """The dimensions as they lie in memory."""
    # Symbols decide as they did while tracing: encoders look at the sizes of each call.
    symbols: Any = convert_shape_to_symint(shape), convert_shape_to_symint(stride)
    return storage_permutation(*symbols)


def _unit(run: int, group_size: int, shape: Sequence[Any], order: Sequence[int]) -> int | None:
    """Elements of a row that lie in one part of a group, of ``run`` there are, where rows cut groups; None if not.

    Rows of 384, every other of which starts in the middle of a group, are read in 3 times 128: what is computed of a
    unit's number stays the same within a vector. A row is what lies along the last dimension in memory.
    """
    row = shape[order[-1]] if order else 1
    if not isinstance(row, int | sympy.Integer) or row % group_size == 0:
        return None
    unit = math.gcd(int(row), run)
    return unit if unit >= _VECTOR else None


def _locate(index: Sequence[sympy.Expr], unit: int, run: int, group_size: int) -> Sequence[sympy.Expr]:
    """Group, part and column of an element, given the number of its unit and its place in there."""
    number, lane = index
    within = ModularIndexing(number, 1, group_size // unit)
    part, column = FloorDiv(within, run // unit), ModularIndexing(within, 1, run // unit) * unit + lane
    return FloorDiv(number, group_size // unit), part, column


def _cuts_groups(group_size: int, shape: Sequence[Any], order: Sequence[int]) -> bool:
    """Whether loops over the channels of images of ``shape``, stored in ``order``, start and end within groups.

    Inductor then writes C++ without vectors, since scale and zero change within one: an element that is decoded where
    it is read takes 2 to 9 ns in the place of 0.3.
    """
    channel = sympy_product([shape[dim] for dim in order[2:]])
    return len(shape) > 3 and not V.graph.sizevars.statically_known_multiple_of(channel, group_size)


def unpack_mask(packed: ir.TensorBox, shape: Sequence[Any], stride: Sequence[Any] | None) -> ir.TensorBox:
    """``unpack_bool`` as loops over [position in the byte, byte]."""
    (nbytes,) = packed.get_size()
    load, is_cpu = packed.make_loader(), _is_on_cpu(packed)

    def decode(index: Sequence[sympy.Expr]) -> Any:
        position, byte = index
        if _is_counting():
            return ops.to_dtype(load([byte]), torch.bool)
        # In float32: Inductor converts masks between the widths of vectors one element at a time.
        field, _ = _field(load([byte]), position, 1, 1.0, is_cpu)
        return ops.ne(field, ops.constant(0.0, torch.float32))

    device = packed.get_device()
    mask = ir.Pointwise.create(device=device, dtype=torch.bool, inner_fn=decode, ranges=[sympy.Integer(8), nbytes])
    stride = stride if stride is not None else ir.FlexibleLayout.contiguous_strides(shape)
    return _restore(mask, shape, _storage_order(shape, stride))


def _is_on_cpu(value: ir.TensorBox) -> bool:
    return value.get_device_or_error().type == "cpu"


def _constant(value: int) -> Any:
    return ops.constant(value, torch.int32)


def _number(value: float) -> Any:
    return ops.constant(value, torch.float32)


def _convert(value: Any, source: torch.dtype, dtype: torch.dtype) -> Any:
    return value if source == dtype else ops.to_dtype(value, dtype)


def _field(byte: Any, position: sympy.Expr, width: int, weight: float, is_cpu: bool) -> tuple[Any, Any]:
    """The field of ``width`` bits at ``position`` in a byte: two float32 numbers whose product is its value * weight.

    The second is None where it is 1. On the CPU they are the byte without its other fields, and the reciprocal of the
    field's unit: a shift of the byte itself would have to widen it to int32 first, which takes longer than all the
    rest. Inductor writes code for every operator several times: the fewer, the sooner it is done.
    """
    if width == 8:
        return ops.to_dtype(byte, torch.float32), None
    distance = ops.index_expr(position * width, torch.int32)
    if not is_cpu:
        shifted = ops.bitwise_right_shift(ops.to_dtype(byte, torch.int32), distance)
        field = ops.to_dtype(ops.bitwise_and(shifted, _constant(2**width - 1)), torch.float32)
        return field, None if weight == 1 else ops.constant(weight, torch.float32)
    # 1 or 16 for 4 bits.
    is_half = width == 4
    unit = ops.index_expr(1 + 15 * position, torch.int32) if is_half else ops.bitwise_left_shift(_constant(1), distance)
    mask = ops.mul(unit, _constant(2**width - 1))
    field = ops.bitwise_and(byte, ops.to_dtype(mask, torch.uint8))
    reciprocal = ops.truediv(ops.constant(weight, torch.float32), ops.to_dtype(unit, torch.float32))
    return ops.to_dtype(field, torch.float32), reciprocal


def _of_group(group: sympy.Expr, groups: sympy.Expr, is_cpu: bool) -> list[Any]:
    """The index of what is stored once per group.

    Inductor takes a reduction whose reads mostly stay where they are from one element to the next for one across rows
    and splits it. A computed index is left out of that count, but keeps C++ from being vectorized.
    """
    if is_cpu:
        return [group]
    return [ops.indirect_indexing(ops.index_expr(group, torch.int64), groups, check=False, wrap_neg=False)]


def _is_counting() -> bool:
    """Whether Inductor counts reads and operations, to decide what to keep in memory and what to compute again.

    A decoded tensor counts as the one that it stands for: the code around it stays what it is without compression.
    """
    return isinstance(V.get_ops_handler(), OpCounterCSE)


def _restore(value: ir.TensorBox, shape: Sequence[Any], order: Sequence[int]) -> ir.TensorBox:
    """The first elements of ``value`` as ``shape``, whose dimensions lie in memory in ``order``."""
    numel = sympy_product(shape)
    flat = lowerings[aten.view](value, [sympy_product(value.get_size())])
    if flat.get_size()[0] != numel:
        flat = lowerings[aten.slice](flat, 0, 0, numel)
    stored = lowerings[aten.view](flat, [shape[dim] for dim in order])
    return lowerings[aten.permute](stored, [order.index(dim) for dim in range(len(order))])
