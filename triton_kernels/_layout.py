"""Storage order: a dense tensor of any memory format as the 1-D run of its elements in memory, and back.

A tensor is dense when its dimensions, sorted by stride, tile one run of memory without gaps: contiguous,
channels_last and permuted tensors are. Others are read in row-major order, as ``contiguous`` would copy them.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false


def storage_permutation(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Dimensions from the slowest to the fastest, or row-major order when the layout is not dense."""
    order = list(range(len(shape)))
    for i in range(1, len(order)):
        j = i
        while j and guard_or_false(stride[order[j - 1]] < stride[order[j]]):
            order[j - 1], order[j] = order[j], order[j - 1]
            j -= 1
    expected = 1
    for dim in reversed(order):
        if not guard_or_false(stride[dim] == expected) and not guard_or_false(shape[dim] == 1):
            return list(range(len(shape)))
        expected = expected * shape[dim]
    return order


def to_storage_order(x: Tensor) -> Tensor:
    """[...] -> [numel]; a view for dense tensors, a copy otherwise."""
    return x.permute(storage_permutation(x.shape, x.stride())).reshape(-1)


def from_storage_order(flat: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """[numel] -> a view of ``flat`` with ``shape`` and, where ``stride`` is dense, ``stride``."""
    order = storage_permutation(shape, stride)
    inverse = [order.index(dim) for dim in range(len(order))]
    return flat.view([shape[dim] for dim in order]).permute(inverse)
