"""Triton kernels of the format in ``topk``, N:M positions: one read and one write each way.

They give the reference's bits, but for the sign of a kept zero and the payload of nan. A program handles ``GROUPS``
whole groups as two tiles [GROUPS, PAIRS, BLOCK] of every other block: the fields of two neighbouring blocks fill whole
bytes, and packing them needs no exchange between threads.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment,misc"
# ruff: noqa: N803, N806, RUF005  (constants of a kernel are uppercase; Triton has no starred tuples)

import triton
import triton.language as tl

from ._quantize_kernel import (
    decode,
    group_steps,
    is_whole,
    known_extremes,
    mark,
    maximum,
    noise,
    some,
    to_codes,
)
from ._topk_sizes import POSITIONS_GROUP
from ._topk_values import in_16_bits, load_steps, magnitude_key

_GROUP = tl.constexpr(POSITIONS_GROUP)


@triton.jit
def _select_largest(key, lane, KEEP: tl.constexpr, BLOCK: tl.constexpr):
    """Which of [GROUPS, PAIRS, BLOCK] are kept, the first of equal keys."""
    for _ in tl.static_range(KEEP):
        top = tl.max(key, 2, keep_dims=True)
        place = tl.min(tl.where(key == top, lane, BLOCK), 2, keep_dims=True)
        key = tl.where(lane == place, -1, key)
    return key < 0


@triton.jit
def _store_fields(ptr, fields, pair, exists, WIDTH: tl.constexpr):
    """Stores fields of two blocks each, [GROUPS, PAIRS], WIDTH bits wide: uint8 [num_pairs, bytes]."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    NBYTES: tl.constexpr = len(fields) // PER_BYTE
    for j in tl.static_range(NBYTES):
        byte = fields[j * PER_BYTE]
        for i in tl.static_range(1, PER_BYTE):
            byte |= fields[j * PER_BYTE + i] << (WIDTH * i)
        tl.store(ptr + pair * NBYTES + j, byte.to(tl.uint8), mask=exists)


@triton.jit
def _load_fields(ptr, pair, exists, NUM: tl.constexpr, WIDTH: tl.constexpr):
    """Inverse of ``_store_fields``: NUM fields, int32 [GROUPS, PAIRS]."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    NBYTES: tl.constexpr = NUM // PER_BYTE
    fields = ()
    for j in tl.static_range(NBYTES):
        byte = tl.load(ptr + pair * NBYTES + j, mask=exists, other=0).to(tl.int32)
        for i in tl.static_range(PER_BYTE):
            fields = fields + ((byte >> (WIDTH * i)) & (2**WIDTH - 1),)
    return fields


@triton.jit(do_not_specialize=["salt_key", "num_groups"])
def _sparsify_positions_kernel(
    x_ptr,  # [n]
    seed_ptr,  # int64 []
    index_ptr,  # uint8 [num_groups * bytes]
    values_ptr,  # uint8 [num_groups * bytes], or [num_groups * kept] in 16 bits
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
    """``sparsify_groups`` where a group is many blocks."""
    PAIRS: tl.constexpr = _GROUP // (2 * BLOCK)
    POSITION_BITS: tl.constexpr = 4 if BLOCK == 16 else 2
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)[:, None]  # [GROUPS, 1]
    pair = group * PAIRS + tl.arange(0, PAIRS)[None, :]  # [GROUPS, PAIRS]
    exists = group < num_groups
    lane = tl.arange(0, BLOCK)[None, None, :]  # [1, 1, BLOCK]

    places, values = (), ()
    for half in tl.static_range(2):
        index = ((pair * 2 + half) * BLOCK)[:, :, None] + lane
        x = tl.load(x_ptr + index, mask=index < n, other=0.0)  # [GROUPS, PAIRS, BLOCK]
        kept = _select_largest(magnitude_key(x), lane, KEEP, BLOCK)
        for _ in tl.static_range(KEEP):
            place = tl.min(tl.where(kept, lane, BLOCK), 2)  # [GROUPS, PAIRS]
            hit = lane == place[:, :, None]
            kept = kept & (lane != place[:, :, None])
            places = places + (place,)
            # One element beside zeros.
            values = values + (tl.sum(tl.where(hit, x.to(tl.float32), 0.0), 2),)

    _store_fields(index_ptr, places, pair, exists, POSITION_BITS)
    if VALUE_BITS == 16:
        for i in tl.static_range(2 * KEEP):
            tl.store(values_ptr + pair * (2 * KEEP) + i, in_16_bits(values[i].to(DTYPE)), mask=exists)
    else:
        LEVELS: tl.constexpr = 2**VALUE_BITS - 1
        low, high = values[0], values[0]
        for i in tl.static_range(1, 2 * KEEP):
            low, high = tl.minimum(low, values[i]), maximum(high, values[i])
        low, high = tl.min(low, 1, keep_dims=True), tl.reduce(high, 1, maximum, keep_dims=True)  # [GROUPS, 1]
        whole = is_whole(low, high)
        marks = some(whole == 0)
        if marks:
            low, high = known_extremes(values, 2 * KEEP)
        scale, inverse, zero, limit = group_steps(low, high, whole, DTYPE, LEVELS)
        key, codes = tl.load(seed_ptr) ^ salt_key, ()
        for i in tl.static_range(2 * KEEP):
            position = (values[i] * 0.5 - zero * 0.5) * inverse
            if marks:
                position = mark(position)
            draws = noise(key, (pair * 2 + i // KEEP) * BLOCK, places[i])
            codes = codes + (to_codes(position, limit, draws) & LEVELS,)
        _store_fields(values_ptr, codes, pair, exists, VALUE_BITS)
        tl.store(scale_ptr + group, scale.to(tl.bfloat16), mask=exists)
        tl.store(zero_ptr + group, zero.to(DTYPE), mask=exists)


@triton.jit(do_not_specialize=["num_groups"])
def _densify_positions_kernel(
    index_ptr,  # uint8 [num_groups * bytes]
    values_ptr,  # uint8 [num_groups * bytes], or [num_groups * kept] in 16 bits
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
    """Inverse of ``_sparsify_positions_kernel``."""
    PAIRS: tl.constexpr = _GROUP // (2 * BLOCK)
    POSITION_BITS: tl.constexpr = 4 if BLOCK == 16 else 2
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)  # [GROUPS]
    pair = group[:, None] * PAIRS + tl.arange(0, PAIRS)[None, :]  # [GROUPS, PAIRS]
    exists = group[:, None] < num_groups
    lane = tl.arange(0, BLOCK)[None, None, :]  # [1, 1, BLOCK]
    places = _load_fields(index_ptr, pair, exists, 2 * KEEP, POSITION_BITS)
    values = ()
    if VALUE_BITS == 16:
        for i in tl.static_range(2 * KEEP):
            value = tl.load(values_ptr + pair * (2 * KEEP) + i, mask=exists, other=0.0)
            values = values + (value.to(tl.float32),)
    else:
        scale, zero = load_steps(scale_ptr, zero_ptr, group, group < num_groups)
        codes = _load_fields(values_ptr, pair, exists, 2 * KEEP, VALUE_BITS)
        for i in tl.static_range(2 * KEEP):
            values = values + (decode(codes[i], scale, zero, 2**VALUE_BITS - 1),)
    for half in tl.static_range(2):
        x = tl.zeros([GROUPS, PAIRS, BLOCK], tl.float32)
        for j in tl.static_range(KEEP):
            place, value = places[half * KEEP + j], values[half * KEEP + j]
            x = tl.where(lane == place[:, :, None], value[:, :, None], x)
        index = ((pair * 2 + half) * BLOCK)[:, :, None] + lane
        tl.store(x_ptr + index, x.to(x_ptr.dtype.element_ty), mask=index < n)
