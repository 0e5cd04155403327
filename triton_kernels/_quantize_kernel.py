"""Triton kernels of the format in ``quantize``: one read and one write each way.

They give the reference's bits, but for the sign of a zero minimum and the payload of nan, which no reduction and no
conversion defines.

A program handles ``GROUPS`` whole groups. A group is held as ``PARTS`` tiles [GROUPS, WIDTH] of consecutive elements,
the fields that end up in one byte lying at the same place of different tiles: packing needs no exchange between
threads, and only the minimum and maximum of a group do.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment,misc"
# ruff: noqa: N803, N806, RUF005, SIM300  (constants of a kernel are uppercase; Triton has no starred tuples)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._hash import FRACTION_BITS, INDEX_HIGH_MULTIPLIER, MULTIPLIERS, SHIFTS, mix_seed
from ._layout import from_storage_order, to_storage_order
from .quantize import MAX_SCALE, MAX_SPREAD, MIN_SCALE, PLANES, check_arguments, num_groups

# Chosen from the generated code: enough elements to hide the cost of a group, few enough to stay in registers.
QUANTIZE_ELEMENTS_PER_THREAD, DEQUANTIZE_ELEMENTS_PER_THREAD = 32, 16
MIN_WARPS, MAX_WARPS = 4, 32

_FRACTION = tl.constexpr(FRACTION_BITS)
_FRACTION_SCALE = tl.constexpr(float(2**FRACTION_BITS))
_INDEX_HIGH_MULTIPLIER = tl.constexpr(INDEX_HIGH_MULTIPLIER)
_MULTIPLIER0, _MULTIPLIER1 = (tl.constexpr(multiplier % 2**32) for multiplier in MULTIPLIERS)
_SHIFT0, _SHIFT1, _SHIFT2 = (tl.constexpr(shift) for shift in SHIFTS)
_MIN_SCALE, _MAX_SCALE = tl.constexpr(MIN_SCALE), tl.constexpr(MAX_SCALE)
_MAX_SPREAD = tl.constexpr(MAX_SPREAD)
_LARGEST_FLOAT32 = tl.constexpr(torch.finfo(torch.float32).max)
_LARGEST_BFLOAT16 = tl.constexpr(torch.finfo(torch.bfloat16).max)
_LARGEST_FLOAT16 = tl.constexpr(torch.finfo(torch.float16).max)


@triton.jit
def noise(key, start, column):
    """``_hash.noise`` for the elements ``start + column``: int32 in [0, 2**FRACTION_BITS).

    Args:
        key: 0-d int64, the seed XOR the mixed salt.
        start: int64 [GROUPS, 1], index of each group's first element.
        column: int32 [1, WIDTH], position in the group.
    """
    high = (start >> 32).to(tl.uint32) * _INDEX_HIGH_MULTIPLIER  # [GROUPS, 1]
    low = start.to(tl.uint32) + column.to(tl.uint32)  # [GROUPS, WIDTH]
    h = (low ^ (key.to(tl.uint32) ^ high)) * _MULTIPLIER0
    h = (h ^ (h >> _SHIFT0) ^ (key >> 32).to(tl.uint32)) * _MULTIPLIER1
    return ((h ^ (h >> _SHIFT1)) >> _SHIFT2).to(tl.int32)


@triton.jit
def maximum(x, y):
    """The larger of two numbers, nan if one of them is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def is_finite(x):
    """Whether numbers are neither infinite nor nan."""
    return tl.abs(x) < float("inf")


@triton.jit
def is_whole(low, high):
    """Whether all elements of a group are finite, from their minimum and maximum."""
    return is_finite(high * 0.5 - low * 0.5)


@triton.jit
def some(flags):
    """Whether any of a program's flags is set. What few groups need is left out where none of a program does."""
    return tl.max(flags.to(tl.int32)) != 0


@triton.jit
def known_extremes(tiles, PARTS: tl.constexpr):
    """Minimum and maximum of the finite elements of each group, 0 where there are none: [GROUPS, 1]."""
    low = tl.where(is_finite(tiles[0]), tiles[0], float("inf"))
    high = tl.where(is_finite(tiles[0]), tiles[0], -float("inf"))
    for part in tl.static_range(1, PARTS):
        low = tl.minimum(low, tl.where(is_finite(tiles[part]), tiles[part], float("inf")))
        high = tl.maximum(high, tl.where(is_finite(tiles[part]), tiles[part], -float("inf")))
    low, high = tl.min(low, 1, keep_dims=True), tl.max(high, 1, keep_dims=True)
    return tl.where(low <= high, low, 0.0), tl.where(low <= high, high, 0.0)


@triton.jit
def group_steps(low, high, whole, DTYPE: tl.constexpr, LEVELS: tl.constexpr):
    """What a group's elements are encoded with, from the minimum and maximum of the finite ones.

    Returns:
        The scale; what a halved distance from the halved zero is multiplied with to give a position in units of
        2**-FRACTION_BITS; the zero; and the highest position. A group that is not ``whole`` has that of the negated
        elements, with one level less.
    """
    sign = tl.where(whole, 1.0, -1.0)
    low, high = tl.where(whole, low, -high), tl.where(whole, high, -low)
    top = tl.where(whole, LEVELS * 1.0, LEVELS - 1.0) if LEVELS > 1 else 1.0
    if DTYPE == tl.float16:
        largest = _LARGEST_FLOAT16
    elif DTYPE == tl.bfloat16:
        largest = _LARGEST_BFLOAT16
    else:
        largest = _LARGEST_FLOAT32
    room = tl.div_rn(tl.minimum(largest * 0.5 - low * 0.5, _MAX_SPREAD), top) * 2.0
    raw = tl.minimum(tl.div_rn(high * 0.5 - low * 0.5, top) * 2.0, room)
    raw = tl.minimum(tl.maximum(raw, _MIN_SCALE), _MAX_SCALE).to(tl.int32, bitcast=True)
    above = ((raw + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    scale = tl.where(above <= room, above, (raw & -0x10000).to(tl.float32, bitcast=True))
    return scale * sign, tl.div_rn(2.0, scale) * _FRACTION_SCALE * sign, low * sign, top * _FRACTION_SCALE


@triton.jit
def mark(position):
    """Positions of which those of inf and nan give the code -1: all its bits are set, so that the highest is stored.

    A position tells what it is that of: no element is kept until its code is known.
    """
    return tl.where(is_finite(position), position, -_FRACTION_SCALE)


@triton.jit
def to_codes(position, limit, draws):
    """Codes int32 of positions, at most ``limit``, which are rounded up where ``draws``, the noise, carry."""
    return (tl.minimum(position, limit).to(tl.int32) + draws) >> _FRACTION


@triton.jit
def share_level(zero, codes, scale, whole, marks, PARTS: tl.constexpr):
    """Zeros and codes at 1 bit, which leaves one level to the finite elements of a group that is not ``whole``.

    It is the mean of what they would come back as, and their code is 0. ``marks``: whether there is such a group.
    """
    shared = ()
    for part in tl.static_range(PARTS):
        code = codes[part]
        if marks:
            code = tl.where(whole, code, code >> 1)
        shared = shared + (code,)
    if marks:
        known, ones = (codes[0] >= 0).to(tl.int32), tl.maximum(codes[0], 0)
        for part in tl.static_range(1, PARTS):
            known, ones = known + (codes[part] >= 0).to(tl.int32), ones + tl.maximum(codes[part], 0)
        known, ones = tl.sum(known, 1, keep_dims=True), tl.sum(ones, 1, keep_dims=True)
        share = tl.div_rn(ones.to(tl.float32), tl.maximum(known, 1).to(tl.float32))
        # 16 significant bits: the product is exact.
        mean = zero + scale * (share.to(tl.int32, bitcast=True) & -0x100).to(tl.float32, bitcast=True)
        zero = tl.where(whole, zero, mean)
    return zero, shared


@triton.jit
def decode(code, scale, zero, LEVELS: tl.constexpr):
    """``decode_values``."""
    marked = tl.where(scale < 0, LEVELS, -1)
    return tl.where(code == marked, float("nan"), zero + scale * code.to(tl.float32))


@triton.jit
def _store_plane(
    plane_ptr, parts, group, mask, SHIFT: tl.constexpr, BITS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    """Stores bits SHIFT .. SHIFT + BITS of the codes: uint8 [num_groups, RUN * WIDTH]."""
    RUN: tl.constexpr = PARTS * BITS // 8
    column = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    for first in tl.static_range(RUN):
        byte = (parts[first] >> SHIFT) & (2**BITS - 1)
        for i in tl.static_range(1, 8 // BITS):
            byte |= ((parts[first + i * RUN] >> SHIFT) & (2**BITS - 1)) << (BITS * i)
        tl.store(plane_ptr + group * (RUN * WIDTH) + first * WIDTH + column, byte.to(tl.uint8), mask=mask)


@triton.jit
def load_plane(plane_ptr, group, column, mask, BITS: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Loads the bytes at ``column`` in a plane of BITS bits per code as PARTS tiles: int32 [GROUPS, columns]."""
    RUN: tl.constexpr = PARTS * BITS // 8
    rows = ()
    for first in tl.static_range(RUN):
        byte = tl.load(plane_ptr + group * (RUN * WIDTH) + first * WIDTH + column, mask=mask, other=0)
        rows = rows + (byte.to(tl.int32),)
    parts = ()
    for part in tl.static_range(PARTS):
        parts = parts + ((rows[part % RUN] >> (part // RUN * BITS)) & (2**BITS - 1),)
    return parts


@triton.jit(do_not_specialize=["salt_key", "num_groups"])
def _quantize_kernel(
    x_ptr,  # [n]
    seed_ptr,  # int64 []
    codes_ptr,  # uint8 [num_groups * GROUP_SIZE * (LOW_BITS + HIGH_BITS) / 8]
    scale_ptr,  # bfloat16 [num_groups]
    zero_ptr,  # [num_groups]
    salt_key: tl.int64,
    n: tl.int64,
    num_groups: tl.int64,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """``encode_groups``; a code's LOW_BITS go to the first plane, its HIGH_BITS (may be 0) to the second."""
    LEVELS: tl.constexpr = 2 ** (LOW_BITS + HIGH_BITS) - 1
    PARTS: tl.constexpr = 8 // (HIGH_BITS if HIGH_BITS else LOW_BITS)
    WIDTH: tl.constexpr = GROUP_SIZE // PARTS
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]  # [GROUPS, 1]
    column = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    start = group * GROUP_SIZE
    exists = group < num_groups
    key = tl.load(seed_ptr) ^ salt_key
    last = tl.load(x_ptr + (n - 1))

    values = ()
    for part in tl.static_range(PARTS):
        index = start + (part * WIDTH + column)
        values = values + (tl.load(x_ptr + index, mask=index < n, other=last).to(tl.float32),)

    low, high = values[0], values[0]
    for part in tl.static_range(1, PARTS):
        low, high = tl.minimum(low, values[part]), maximum(high, values[part])
    low, high = tl.min(low, 1, keep_dims=True), tl.reduce(high, 1, maximum, keep_dims=True)  # [GROUPS, 1]
    whole = is_whole(low, high)
    marks = some(whole == 0)
    if marks:
        low, high = known_extremes(values, PARTS)
    scale, inverse, zero, limit = group_steps(low, high, whole, x_ptr.dtype.element_ty, LEVELS)

    codes = ()
    for part in tl.static_range(PARTS):
        position = (values[part] * 0.5 - zero * 0.5) * inverse
        if marks:
            position = mark(position)
        codes = codes + (to_codes(position, limit, noise(key, start, part * WIDTH + column)),)
    if LEVELS == 1:
        zero, codes = share_level(zero, codes, scale, whole, marks, PARTS)

    _store_plane(codes_ptr, codes, group, exists, 0, LOW_BITS, PARTS, WIDTH)
    if HIGH_BITS:
        high_ptr = codes_ptr + num_groups * (GROUP_SIZE * LOW_BITS // 8)
        _store_plane(high_ptr, codes, group, exists, LOW_BITS, HIGH_BITS, PARTS, WIDTH)
    tl.store(scale_ptr + group, scale.to(tl.bfloat16), mask=exists)
    tl.store(zero_ptr + group, zero.to(zero_ptr.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["num_groups"])
def _dequantize_kernel(
    codes_ptr,  # uint8 [num_groups * GROUP_SIZE * (LOW_BITS + HIGH_BITS) / 8]
    scale_ptr,  # bfloat16 [num_groups]
    zero_ptr,  # [num_groups]
    x_ptr,  # [n]
    n: tl.int64,
    num_groups: tl.int64,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Inverse of ``_quantize_kernel``."""
    LEVELS: tl.constexpr = 2 ** (LOW_BITS + HIGH_BITS) - 1
    PARTS: tl.constexpr = 8 // (HIGH_BITS if HIGH_BITS else LOW_BITS)
    WIDTH: tl.constexpr = GROUP_SIZE // PARTS
    row = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)  # [GROUPS]
    group, exists = row[:, None], row[:, None] < num_groups  # [GROUPS, 1]
    column = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    # In one dimension: a load of [GROUPS, 1] is repeated for each element that a thread holds.
    scale = tl.load(scale_ptr + row, mask=row < num_groups, other=0.0).to(tl.float32)[:, None]  # [GROUPS, 1]
    zero = tl.load(zero_ptr + row, mask=row < num_groups, other=0.0).to(tl.float32)[:, None]  # [GROUPS, 1]
    codes = load_plane(codes_ptr, group, column, exists, LOW_BITS, PARTS, WIDTH)
    if HIGH_BITS:
        high_ptr = codes_ptr + num_groups * (GROUP_SIZE * LOW_BITS // 8)
        high = load_plane(high_ptr, group, column, exists, HIGH_BITS, PARTS, WIDTH)
    for part in tl.static_range(PARTS):
        code = codes[part]
        if HIGH_BITS:
            code |= high[part] << LOW_BITS
        value = decode(code, scale, zero, LEVELS)  # [GROUPS, WIDTH]
        index = group * GROUP_SIZE + (part * WIDTH + column)
        tl.store(x_ptr + index, value.to(x_ptr.dtype.element_ty), mask=index < n)


def launch_options(bits: int, group_size: int, elements_per_thread: int) -> dict[str, int | bool]:
    """Keyword arguments of either kernel: the format, and the groups and warps of a program."""
    low_bits, high_bits = (*PLANES[bits], 0)[:2]
    warp_elements = 32 * elements_per_thread
    return {
        "LOW_BITS": low_bits,
        "HIGH_BITS": high_bits,
        "GROUP_SIZE": group_size,
        "GROUPS": max(MIN_WARPS * warp_elements // group_size, 1),
        "num_warps": min(max(group_size // warp_elements, MIN_WARPS), MAX_WARPS),
        # A fused multiply-add would skip the rounding of a halved subnormal number.
        "enable_fp_fusion": False,
    }


def launch_quantize(x: Tensor, bits: int, group_size: int, seed: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize_reference`` in one kernel."""
    check_arguments(x.dtype, bits, group_size)
    flat = to_storage_order(x)
    groups = num_groups(flat.numel(), group_size)
    codes = flat.new_empty(groups * (group_size * bits // 8), dtype=torch.uint8)
    scale, zero = flat.new_empty(groups, dtype=torch.bfloat16), flat.new_empty(groups)
    if groups:
        options = launch_options(bits, group_size, QUANTIZE_ELEMENTS_PER_THREAD)
        grid = (triton.cdiv(groups, options["GROUPS"]),)
        _quantize_kernel[grid](flat, seed, codes, scale, zero, mix_seed(salt), flat.numel(), groups, **options)
    return codes, scale, zero


def launch_dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """``dequantize_reference`` in one kernel."""
    check_arguments(dtype, bits, group_size)
    flat = zero.new_empty(torch.Size(shape).numel(), dtype=dtype)
    groups = scale.numel()
    if groups:
        options = launch_options(bits, group_size, DEQUANTIZE_ELEMENTS_PER_THREAD)
        grid = (triton.cdiv(groups, options["GROUPS"]),)
        _dequantize_kernel[grid](codes, scale, zero, flat, flat.numel(), groups, **options)
    return from_storage_order(flat, shape, stride)
