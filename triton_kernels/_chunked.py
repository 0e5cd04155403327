"""Eager bodies of the codecs, a few groups at a time: their steps take many times the bytes of what they read."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._hash import mix_seed
from ._layout import from_storage_order, to_storage_order
from ._topk_sizes import check_format, group_numel, num_groups
from .quantize import MIN_SCALE, check_arguments, decode_groups, encode_groups, group, known_extremes, split_planes
from .topk import densify_groups, pad_groups, sparsify_groups, split_groups

CHUNK_NUMEL = 2**18


def quantize_in_chunks(x: Tensor, bits: int, group_size: int, seed: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize_reference`` on a few groups at a time: the same bits, with less memory."""
    check_arguments(x.dtype, bits, group_size)
    groups, key = group(to_storage_order(x), group_size), seed ^ mix_seed(salt)
    parts = [encode_groups(groups[rows], bits, key, rows.start) for rows in _chunks(*groups.shape)]
    if len(parts) == 1:
        return parts[0]
    planes = zip(*(split_planes(codes, bits, group_size) for codes, _, _ in parts), strict=True)
    codes = torch.cat([part.view(-1) for plane in planes for part in plane])
    return codes, torch.cat([scale for _, scale, _ in parts]), torch.cat([zero for _, _, zero in parts])


def dequantize_in_chunks(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """``dequantize_reference`` on a few groups at a time: the same bits, with less memory."""
    check_arguments(dtype, bits, group_size)
    planes, chunks = split_planes(codes, bits, group_size), _chunks(scale.numel(), group_size)
    if len(chunks) == 1:
        flat = decode_groups(planes, scale, zero, bits, group_size).to(dtype)
        return from_storage_order(flat.view(-1)[: math.prod(shape)], shape, stride)
    flat = torch.empty(scale.numel(), group_size, dtype=dtype, device=codes.device)
    for rows in chunks:
        flat[rows] = decode_groups([plane[rows] for plane in planes], scale[rows], zero[rows], bits, group_size)
    return from_storage_order(flat.view(-1)[: math.prod(shape)], shape, stride)


def sparsify_in_chunks(
    x: Tensor, keep: int, block: int, value_bits: int, seed: Tensor, salt: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sparsify_reference`` on a few groups at a time: the same bits, with less memory."""
    check_format(x.dtype, keep, block, value_bits)
    groups, key = pad_groups(to_storage_order(x), block), seed ^ mix_seed(salt)
    parts = [sparsify_groups(groups[rows], keep, block, value_bits, key, rows.start) for rows in _chunks(*groups.shape)]
    if len(parts) == 1:
        return parts[0]
    index, values, scale, zero = (torch.cat(part) for part in zip(*parts, strict=True))
    return index, values, scale, zero


def densify_in_chunks(
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
    """``densify_reference`` on a few groups at a time: the same bits, with less memory."""
    check_format(dtype, keep, block, value_bits)
    numel = math.prod(shape)
    parts = split_groups(index, values, scale, zero, keep, block, value_bits)
    flat = torch.empty(num_groups(numel, block), group_numel(block), dtype=dtype, device=index.device)
    for rows in _chunks(*flat.shape):
        flat[rows] = densify_groups([part[rows] for part in parts], keep, block, value_bits, dtype)
    return from_storage_order(flat.view(-1)[:numel], shape, stride)


def rounding_variance(x: Tensor, widths: Sequence[int], group_size: int) -> Tensor:
    """Variance of one element's rounding noise, the mean over each group, for codes of each of ``widths`` bits.

    That the stored scale is rounded up, by less than 1%, is left out. Of inf and nan it is 0.

    Returns:
        float32 [num_groups, len(widths)].
    """
    groups = group(to_storage_order(x), group_size)
    return torch.cat([_rounding_variance(groups[rows].float(), widths) for rows in _chunks(*groups.shape)])


def _rounding_variance(values: Tensor, widths: Sequence[int]) -> Tensor:
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    marked: Tensor | int = 0
    if not (high * 0.5 - low * 0.5).isfinite().all():
        known = values.isfinite()
        low, high = known_extremes(values, known)
        # Inf and nan count as what has no noise. A level is theirs; at 1 bit the finite elements have none for
        # themselves, and lose about as much.
        values, marked = torch.where(known, values, low), (~known).any(1, keepdim=True).int()
    spread = high - low
    columns = []
    for bits in widths:
        scale = (spread / (2**bits - 1 - marked * (bits > 1))).clamp(min=MIN_SCALE)
        fraction = ((values - low) / scale).frac_()
        columns.append((fraction * (1 - fraction)).mean(1) * scale.square().squeeze(1))
    return torch.stack(columns, 1).nan_to_num_(0.0, 0.0, 0.0)


def _chunks(groups: int, group_size: int) -> list[slice]:
    """Ranges of groups, one at least."""
    step = max(1, CHUNK_NUMEL // group_size)
    return [slice(start, min(groups, start + step)) for start in range(0, max(groups, 1), step)]
