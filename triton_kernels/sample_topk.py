"""The largest elements of each sample, as many as there are: Back Razor's rule, for comparison with ``topk``.

Formula, for a tensor of B samples, its first dimension, of N elements each:

    k = clip(int(N * sparsity), 1, N)
    threshold[b] = the k-th smallest magnitude of sample b
    kept[b, i] = |x[b, i]| >= threshold[b]

N - k + 1 elements of a sample are kept, and more where others have the magnitude of the threshold: the whole sample
where k of its elements are zero. ``int`` takes the product as it was rounded: int(100 * 0.57) is 56.

Layout, of the tensor in the order of its dimensions whatever its strides:

    bits    uint8 [ceil(B * N / 8)], the mask as ``pack_bool`` stores it
    values  [number kept], one sample after the other

How many values there are, depends on the data: the host waits for it, and no compiled graph can hold it.

Error: what is dropped comes back as zero; what is kept, rounded to the type of the values, in which float16 ends at
65504 and beyond is infinite.

Source: Jiang et al., "Back Razor: Memory-Efficient Transfer Learning by Self-Sparsified Backpropagation", NeurIPS 2022.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .pack_bool import pack_bool, packed_nbytes, unpack_bool


def sample_rank(numel: int, sparsity: float) -> int:
    """Which of the ``numel`` magnitudes of a sample, from the smallest up and counted from 1, is its threshold."""
    return min(max(int(numel * sparsity), 1), numel)


def keep_largest_of_samples(x: Tensor, sparsity: float) -> Tensor:
    """The mask of what is kept.

    Args:
        x: Floating point [B, ...], any strides.
        sparsity: Share of each sample to drop, in [0, 1).

    Returns:
        bool, the shape of ``x``, contiguous.
    """
    if not x.numel():
        return torch.ones(x.shape, dtype=torch.bool, device=x.device)
    magnitudes = x.abs().reshape(x.shape[0], -1)
    rank = sample_rank(magnitudes.shape[1], sparsity)
    threshold = magnitudes.kthvalue(rank, dim=1, keepdim=True).values
    return (magnitudes >= threshold).view(x.shape)


def prune_samples(x: Tensor, sparsity: float, value_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stores the largest elements of each sample.

    Args:
        x: Floating point [B, ...], any strides.
        sparsity: Share of each sample to drop, in [0, 1).
        value_dtype: Type of the stored values.

    Returns:
        bits and values; see the module docstring for the layout.
    """
    kept = keep_largest_of_samples(x, sparsity).view(-1)
    return pack_bool(kept), x.reshape(-1)[kept].to(value_dtype)


def restore_samples(pruned: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Inverse of ``prune_samples``: a contiguous tensor of ``shape`` and ``dtype``, zero where nothing was kept."""
    bits, values = pruned
    numel = math.prod(shape)
    dense = values.new_zeros(numel, dtype=dtype)
    dense[unpack_bool(bits, [numel])] = values.to(dtype)
    return dense.view(shape)


def pruned_nbytes(numel: int, num_kept: int, value_dtype: torch.dtype) -> int:
    """Bytes that ``prune_samples`` stores for ``numel`` elements of which it keeps ``num_kept``."""
    return packed_nbytes(numel) + num_kept * value_dtype.itemsize
