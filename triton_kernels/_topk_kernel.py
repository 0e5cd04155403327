"""Triton kernels of the format in ``topk``, blocks with a bitmap: one read and one write each way.

They give the reference's bits, but for the payload of nan. A program handles ``GROUPS`` whole blocks, held as one tile
[GROUPS, BLOCK]: what is kept goes to its rank among the kept, which a prefix count gives. ``_positions_kernel`` has the
kernels of N:M; both take the same arguments, and the launchers here choose.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment,misc"
# ruff: noqa: N803, N806, SIM300  (constants of a kernel are uppercase)

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._hash import mix_seed
from ._layout import from_storage_order, to_storage_order
from ._positions_kernel import _densify_positions_kernel, _sparsify_positions_kernel
from ._quantize_kernel import (
    decode,
    group_steps,
    is_finite,
    is_whole,
    known_extremes,
    maximum,
    noise,
    some,
    to_codes,
)
from ._topk_sizes import POSITION_BITS, check_format, empty_parts, group_numel, num_groups
from ._topk_values import in_16_bits, load_steps, magnitude_key

ELEMENTS_PER_THREAD, NUM_WARPS = 8, 4


@triton.jit
def larger(x, y):
    """The larger of two integers."""
    return tl.maximum(x, y)


@triton.jit
def select_largest(key, KEEP: tl.constexpr, BITS: tl.constexpr):
    """Which elements of [GROUPS, BLOCK] are kept, by keys of BITS bits, and how many before each are: int32."""
    threshold = tl.zeros([key.shape[0], 1], tl.int32)
    for step in range(BITS):
        raised = threshold | (1 << (BITS - 1 - step))
        count = tl.sum((key >= raised).to(tl.int32), 1, keep_dims=True)
        threshold = tl.where(count >= KEEP, raised, threshold)
    above, tie = key > threshold, key == threshold
    # Both counts in one integer: a block has at most 1024 elements.
    count = tl.cumsum((above.to(tl.int32) << 16) | tie.to(tl.int32), 1)
    missing = KEEP - tl.sum(above.to(tl.int32), 1, keep_dims=True)
    ties = count & 0xFFFF
    kept = above | (tie & (ties <= missing))
    return kept, (count >> 16) + tl.minimum(ties, missing) - kept.to(tl.int32)


@triton.jit(do_not_specialize=["salt_key", "num_groups"])
def _sparsify_kernel(
    x_ptr,  # [n]
    seed_ptr,  # int64 []
    index_ptr,  # uint8 [num_groups * BLOCK / 8]
    values_ptr,  # uint8 [num_groups * ceil(KEEP * VALUE_BITS / 8)], or [num_groups * KEEP] in 16 bits
    scale_ptr,  # bfloat16 [num_groups], not read or written at 16 bits
    zero_ptr,  # [num_groups], not read or written at 16 bits
    salt_key: tl.int64,
    n: tl.int64,
    num_groups: tl.int64,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """``sparsify_groups`` where a group is a block."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * GROUPS
    row, column = tl.arange(0, GROUPS)[:, None], tl.arange(0, BLOCK)[None, :]  # [GROUPS, 1], [1, BLOCK]
    group = first + row
    exists, start = group < num_groups, group * BLOCK
    x = tl.load(x_ptr + start + column, mask=start + column < n, other=0.0)  # [GROUPS, BLOCK]
    kept, rank = select_largest(magnitude_key(x), KEEP, 31 if DTYPE == tl.float32 else 15)

    bits = tl.reshape(kept.to(tl.int32), [GROUPS, BLOCK // 8, 8]) << tl.arange(0, 8)[None, None, :]
    place = group * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    tl.store(index_ptr + place, tl.sum(bits, 2).to(tl.uint8), mask=exists)
    if VALUE_BITS == 16:
        # From the program's first on, places are int32: in 64 bits they would not fit the registers.
        tl.store(values_ptr + first * KEEP + (row * KEEP + rank), in_16_bits(x), mask=kept & exists)
    else:
        LEVELS: tl.constexpr = 2**VALUE_BITS - 1
        value = x.to(tl.float32)
        low = tl.min(tl.where(kept, value, float("inf")), 1, keep_dims=True)  # [GROUPS, 1]
        high = tl.reduce(tl.where(kept, value, -float("inf")), 1, maximum, keep_dims=True)  # [GROUPS, 1]
        whole = is_whole(low, high)
        marks = some(whole == 0)
        if marks:
            low, high = known_extremes((tl.where(kept, value, float("nan")),), 1)
        scale, inverse, zero, limit = group_steps(low, high, whole, DTYPE, LEVELS)
        position = (tl.where(kept, value, low) * 0.5 - zero * 0.5) * inverse
        draws = noise(tl.load(seed_ptr) ^ salt_key, start, column)
        codes = to_codes(position, limit, draws) & LEVELS  # [GROUPS, BLOCK]
        if marks:
            # Marked positions would spill: few elements are held, but beside their places.
            codes = tl.where(is_finite(value), codes, LEVELS)
        _store_codes(values_ptr, codes, rank, kept & exists, first, row, KEEP, VALUE_BITS)
        tl.store(scale_ptr + group, scale.to(tl.bfloat16), mask=exists)
        tl.store(zero_ptr + group, zero.to(DTYPE), mask=exists)


@triton.jit
def _store_codes(values_ptr, codes, rank, kept, first, row, KEEP: tl.constexpr, VALUE_BITS: tl.constexpr):
    """Stores the codes of kept elements: uint8 [num_groups, ceil(KEEP * VALUE_BITS / 8)]."""
    NBYTES: tl.constexpr = (KEEP * VALUE_BITS + 7) // 8
    if VALUE_BITS == 8:
        tl.store(values_ptr + first * NBYTES + (row * NBYTES + rank), codes.to(tl.uint8), mask=kept)
    else:
        # Two kept elements share a byte. The second of them stores it: the last even rank before its own is the first.
        even = rank % 2 == 0
        latest = tl.associative_scan(tl.where(kept & even, (rank << 4) | codes, 0), 1, larger)
        byte = tl.where(even, codes, (codes << 4) | (latest & 15))
        stores = kept & ((rank % 2 == 1) | (rank == KEEP - 1))
        tl.store(values_ptr + first * NBYTES + (row * NBYTES + rank // 2), byte.to(tl.uint8), mask=stores)


@triton.jit(do_not_specialize=["num_groups"])
def _densify_kernel(
    index_ptr,  # uint8 [num_groups * BLOCK / 8]
    values_ptr,  # uint8 [num_groups * ceil(KEEP * VALUE_BITS / 8)], or [num_groups * KEEP] in 16 bits
    scale_ptr,  # bfloat16 [num_groups], not read or written at 16 bits
    zero_ptr,  # [num_groups], not read or written at 16 bits
    x_ptr,  # [n]
    n: tl.int64,
    num_groups: tl.int64,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Inverse of ``_sparsify_kernel``."""
    NBYTES: tl.constexpr = (KEEP * VALUE_BITS + 7) // 8
    row = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)  # [GROUPS]
    group, exists = row[:, None], row[:, None] < num_groups  # [GROUPS, 1]
    column = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    place = group * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
    packed = tl.load(index_ptr + place, mask=exists, other=0).to(tl.int32)  # [GROUPS, BLOCK / 8]
    bits = tl.reshape((packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, [GROUPS, BLOCK])
    kept, rank = bits != 0, tl.cumsum(bits, 1) - bits
    if VALUE_BITS == 16:
        value = tl.load(values_ptr + group * KEEP + rank, mask=kept, other=0.0).to(tl.float32)
    else:
        scale, zero = load_steps(scale_ptr, zero_ptr, row, row < num_groups)
        byte = tl.load(values_ptr + group * NBYTES + rank * VALUE_BITS // 8, mask=kept, other=0).to(tl.int32)
        code = (byte >> (rank * VALUE_BITS % 8)) & (2**VALUE_BITS - 1)
        value = tl.where(kept, decode(code, scale, zero, 2**VALUE_BITS - 1), 0.0)
    index = group * BLOCK + column
    tl.store(x_ptr + index, value.to(x_ptr.dtype.element_ty), mask=index < n)


def launch_options(keep: int, block: int, value_bits: int) -> dict[str, Any]:
    """Keyword arguments of either kernel of a format."""
    return {
        "KEEP": keep,
        "BLOCK": block,
        "VALUE_BITS": value_bits,
        "GROUPS": max(NUM_WARPS * 32 * ELEMENTS_PER_THREAD // group_numel(block), 1),
        "num_warps": NUM_WARPS,
        # A fused multiply-add would skip the rounding of a halved subnormal number.
        "enable_fp_fusion": False,
    }


def launch_sparsify(
    x: Tensor, keep: int, block: int, value_bits: int, seed: Tensor, salt: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sparsify_reference`` in one kernel."""
    flat = to_storage_order(x)
    parts = empty_parts(flat, flat.numel(), keep, block, value_bits)
    groups = num_groups(flat.numel(), block)
    if groups:
        kernel = _sparsify_positions_kernel if block in POSITION_BITS else _sparsify_kernel
        options = launch_options(keep, block, value_bits)
        grid = (triton.cdiv(groups, options["GROUPS"]),)
        kernel[grid](flat, seed, *parts, mix_seed(salt), flat.numel(), groups, **options)
    return parts


def launch_densify(
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    keep: int,
    block: int,
    value_bits: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """``densify_reference`` in one kernel."""
    check_format(dtype, keep, block, value_bits)
    flat = index.new_empty(torch.Size(shape).numel(), dtype=dtype)
    groups = num_groups(flat.numel(), block)
    if groups:
        kernel = _densify_positions_kernel if block in POSITION_BITS else _densify_kernel
        options = launch_options(keep, block, value_bits)
        grid = (triton.cdiv(groups, options["GROUPS"]),)
        kernel[grid](index, values, scale, zero, flat, flat.numel(), groups, **options)
    return from_storage_order(flat, shape, stride)
