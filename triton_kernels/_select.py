"""Exactly k elements of each row: those of largest magnitude, the first of equal ones; no sort, all shapes static."""

import torch
from torch import Tensor


def select_largest(blocks: Tensor, keep: int) -> Tensor:
    """Which elements of [num_blocks, block] are kept: ``keep`` of each block."""
    integer, sign_bit = (torch.int32, 31) if blocks.dtype == torch.float32 else (torch.int16, 15)
    key = blocks.view(integer) & ((1 << sign_bit) - 1)
    threshold = key.new_zeros(len(key), 1)
    for bit in reversed(range(sign_bit)):
        raised = threshold | (1 << bit)
        threshold = torch.where((key >= raised).sum(1, keepdim=True) >= keep, raised, threshold)
    above, tie = key > threshold, key == threshold
    return above | (tie & (tie.cumsum(1) <= keep - above.sum(1, keepdim=True)))


def kept_positions(kept: Tensor, keep: int) -> Tensor:
    """Bool [num_blocks, block] -> int64 [num_blocks, keep], ascending."""
    column = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape)
    # What is not kept lands in one more column.
    rank = torch.where(kept, kept.cumsum(1) - 1, keep)
    return column.new_empty(len(kept), keep + 1).scatter_(1, rank, column)[:, :keep]
