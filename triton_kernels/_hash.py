"""Rounding noise: a 32-bit integer hash of (seed, element index).

    low, high = the two 32-bit halves of the element's index
    h = (low ^ key0 ^ high * 0x27D4EB2F) * 0x9E3779B1
    h = (h ^ (h >>> 15) ^ key1) * 0x85EBCA77
    u = (h ^ (h >>> 13)) >>> 10                    22 uniform bits

``key0`` and ``key1`` are the two halves of the 64-bit seed XOR the mixed salt. All products wrap. Signed 32-bit
arithmetic is used throughout (eager has no unsigned shifts), with the sign bits of a right shift masked away.

Source: multiply-xorshift mixing (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# Fractional bits of the fixed-point position that the noise is added to: 255 levels, 22 bits of fraction and a sign
# bit fit an int32.
FRACTION_BITS = 22

INDEX_HIGH_MULTIPLIER = 0x27D4EB2F
MULTIPLIERS = (0x9E3779B1 - 2**32, 0x85EBCA77 - 2**32)
SHIFTS = (15, 13, 32 - FRACTION_BITS)

_SPLITMIX_GAMMA = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1


def mix_seed(*words: int) -> int:
    """Mixes integers into one signed 64-bit seed (the finalizer of splitmix64 after each word)."""
    state = 0
    for word in words:
        state = (state + word + _SPLITMIX_GAMMA) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state - 2**64 if state >= 2**63 else state


def shift_right(value: Tensor, distance: int) -> Tensor:
    """Logical right shift of an int32 tensor."""
    return (value >> distance) & ((1 << (32 - distance)) - 1)


def noise(key: Tensor, shape: Sequence[int], columns: slice, first_group: int = 0) -> Tensor:
    """Uniform integers in [0, 2**FRACTION_BITS) as int32 [num_groups, columns].

    Args:
        key: 0-d int64, the seed XOR the mixed salt.
        shape: (num_groups, group_size); element (g, r) has the index g * group_size + r. The group size is a power of
            two, so that an index's high half is the same for a whole group.
        columns: The range of r.
        first_group: The g of the first row.
    """
    start = torch.arange(first_group, first_group + shape[0], device=key.device).unsqueeze(1) * shape[1]
    column = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=key.device)
    return noise_at(key, start, column)


def noise_at(key: Tensor, start: Tensor, column: Tensor) -> Tensor:
    """The same for the elements ``start`` (int64) + ``column`` (int32), a sum that does not carry beyond 32 bits."""
    high = (start >> 32).to(torch.int32) * INDEX_HIGH_MULTIPLIER
    h = ((start.to(torch.int32) + column) ^ (key.to(torch.int32) ^ high)) * MULTIPLIERS[0]
    h = (h ^ shift_right(h, SHIFTS[0]) ^ (key >> 32).to(torch.int32)) * MULTIPLIERS[1]
    return shift_right(h ^ shift_right(h, SHIFTS[1]), SHIFTS[2])
