"""The encoder as a function of a tile that a generated Triton kernel already holds in registers.

What produces a tensor writes its value and its codes in one kernel, without reading the value back. The bits are those
of the encoder's own kernel.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803, N806  (constants of a kernel are uppercase)

import triton
import triton.language as tl

from ._quantize_kernel import (
    group_steps,
    is_whole,
    known_extremes,
    mark,
    maximum,
    noise,
    share_level,
    some,
    to_codes,
)


@triton.jit
def encode_tile(
    x,
    first,
    remaining,
    seed_ptr,  # int64 []
    salt_low,
    salt_high,
    DTYPE: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUMEL: tl.constexpr,
):
    """``encode_groups`` for a tile of consecutive elements that begins with a group.

    Args:
        x: float32, any shape of NUMEL elements.
        first: Position of x's first element in storage order.
        remaining: Elements that exist from there on, whole groups.
        seed_ptr: The step's seed.
        salt_low: Bits 0 to 31 of the tensor's mixed salt, signed.
        salt_high: Bits 32 to 63.
        DTYPE: What x is rounded to before it is encoded.
        LEVELS: 2**bits - 1.

    Returns:
        codes int32 [NUMEL / GROUP_SIZE, GROUP_SIZE], of which the lowest bits count; scale bfloat16, zero DTYPE, the
        group's number int64 and whether the group exists, each [NUMEL / GROUP_SIZE, 1].
    """
    GROUPS: tl.constexpr = NUMEL // GROUP_SIZE
    values = tl.reshape(x.to(DTYPE).to(tl.float32), [GROUPS, GROUP_SIZE])
    place = tl.arange(0, GROUPS)[:, None] * GROUP_SIZE
    start = tl.full([1, 1], first, tl.int64) + place
    exists = place < remaining
    low, high = tl.min(values, 1, keep_dims=True), tl.reduce(values, 1, maximum, keep_dims=True)
    whole = is_whole(low, high)
    marks = some(whole == 0)
    if marks:
        low, high = known_extremes((values,), 1)
    scale, inverse, zero, limit = group_steps(low, high, whole, DTYPE, LEVELS)
    position = (values * 0.5 - zero * 0.5) * inverse
    if marks:
        position = mark(position)
    salt_key = (salt_high.to(tl.int64) << 32) | (salt_low.to(tl.int64) & 0xFFFFFFFF)
    key = tl.load(seed_ptr) ^ salt_key
    codes = to_codes(position, limit, noise(key, start, tl.arange(0, GROUP_SIZE)[None, :]))
    if LEVELS == 1:
        zero, codes = share_level(zero, (codes,), scale, whole, marks, 1)
        codes = codes[0]
    scale, zero = scale.to(tl.bfloat16), zero.to(DTYPE)
    return codes, scale, zero, start // GROUP_SIZE, exists


@triton.jit
def store_codes(codes_ptr, codes, group, exists, num_groups, LOW_BITS: tl.constexpr, HIGH_BITS: tl.constexpr):
    """Stores codes [GROUPS, GROUP_SIZE] to their planes: uint8 [num_groups * GROUP_SIZE * bits / 8]."""
    GROUP_SIZE: tl.constexpr = codes.shape[1]
    _store_plane(codes_ptr, codes, group, exists, 0, LOW_BITS)
    if HIGH_BITS:
        high_ptr = codes_ptr + num_groups * (GROUP_SIZE * LOW_BITS // 8)
        _store_plane(high_ptr, codes, group, exists, LOW_BITS, HIGH_BITS)


@triton.jit
def _store_plane(plane_ptr, codes, group, exists, SHIFT: tl.constexpr, BITS: tl.constexpr):
    GROUPS: tl.constexpr = codes.shape[0]
    FIELDS: tl.constexpr = 8 // BITS
    NBYTES: tl.constexpr = codes.shape[1] // FIELDS
    fields = (codes >> SHIFT) & (2**BITS - 1)
    if FIELDS > 1:
        unit = (tl.arange(0, FIELDS) * BITS)[None, :, None]
        # The fields of a byte have no bit in common: their sum is their union.
        fields = tl.sum(tl.reshape(fields, [GROUPS, FIELDS, NBYTES]) << unit, 1)
    tl.store(plane_ptr + group * NBYTES + tl.arange(0, NBYTES)[None, :], fields.to(tl.uint8), mask=exists)
