"""Blocks, counts and widths that the format in ``topk`` has, and the bytes that they take."""

import torch
from torch import Tensor

from .quantize import FLOAT_DTYPES

BITMAP_BLOCKS = (128, 256, 512, 1024)

# Block -> bits of a position, and how many elements of a block may be kept.
POSITION_BITS = {4: 2, 16: 4}
POSITION_KEEPS = {4: (2,), 16: (2, 3)}

VALUE_BITS = (16, 8, 4)

# Elements of a group where positions are stored.
POSITIONS_GROUP = 256


def num_kept(sparsity: float, block: int) -> int:
    """Elements that are kept of a block at a sparsity of 0 to below 1."""
    return max(1, round((1 - sparsity) * block))


def group_numel(block: int) -> int:
    """Elements that share a scale and zero."""
    return POSITIONS_GROUP if block in POSITION_BITS else block


def num_groups(numel: int, block: int) -> int:
    """Groups that ``numel`` elements fill, the last one perhaps partly; works on symbolic sizes too."""
    return (numel + group_numel(block) - 1) // group_numel(block)


def group_nbytes(keep: int, block: int, value_bits: int) -> tuple[int, int]:
    """Bytes of a group's index and of its values."""
    kept = group_numel(block) // block * keep
    return kept * POSITION_BITS[block] // 8 if block in POSITION_BITS else block // 8, (kept * value_bits + 7) // 8


def sparsified_nbytes(numel: int, keep: int, block: int, value_bits: int, dtype: torch.dtype) -> int:
    """Bytes of index, values, scales and zeros for ``numel`` elements; works on symbolic sizes too."""
    metadata = torch.bfloat16.itemsize + dtype.itemsize if value_bits < 16 else 0
    return num_groups(numel, block) * (sum(group_nbytes(keep, block, value_bits)) + metadata)


def half_dtype(dtype: torch.dtype) -> torch.dtype:
    """What 16-bit values of a tensor are stored as."""
    return dtype if dtype.itemsize == 2 else torch.bfloat16


def empty_parts(
    like: Tensor, numel: int, keep: int, block: int, value_bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Index, values, scale and zero for ``numel`` elements of ``like``'s dtype, not filled in."""
    check_format(like.dtype, keep, block, value_bits)
    groups = num_groups(numel, block)
    index_nbytes, value_nbytes = group_nbytes(keep, block, value_bits)
    stored = half_dtype(like.dtype) if value_bits == 16 else torch.uint8
    rows = groups if value_bits < 16 else 0
    return (
        like.new_empty(groups * index_nbytes, dtype=torch.uint8),
        like.new_empty(groups * (value_nbytes // stored.itemsize), dtype=stored),
        like.new_empty(rows, dtype=torch.bfloat16),
        like.new_empty(rows),
    )


def check_format(dtype: torch.dtype, keep: int, block: int, value_bits: int) -> None:
    """Raises ValueError for what the format does not have."""
    blocks = (*POSITION_BITS, *BITMAP_BLOCKS)
    if block not in blocks:
        raise ValueError(f"block must be one of {blocks}, got {block!r}: 256 is the default")
    keeps = POSITION_KEEPS.get(block, range(1, block + 1))
    if keep not in keeps:
        raise ValueError(f"keep must be in {keeps} for a block of {block}, got {keep!r}: num_kept gives a sparsity's")
    if value_bits not in VALUE_BITS:
        raise ValueError(f"value_bits must be one of {VALUE_BITS}, got {value_bits!r}: choose the nearest of them")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"sparsify takes {FLOAT_DTYPES}, got {dtype}: cast the tensor, or keep it exact")
