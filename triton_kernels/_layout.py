"""Storage order: a tensor as the 1-D run of its elements in the order in which they lie in memory, and back.

Dimensions are sorted by stride: contiguous, channels_last and permuted tensors are read as they lie, and so are parts
of them, without the gaps. Where elements overlap, the order is row-major, as ``contiguous`` would copy them.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false


def storage_permutation(shape: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Dimensions from the slowest to the fastest, or row-major order when elements overlap."""
    order = list(range(len(shape)))
    for i in range(1, len(order)):
        j = i
        while j and guard_or_false(stride[order[j - 1]] < stride[order[j]]):
            order[j - 1], order[j] = order[j], order[j - 1]
            j -= 1
    # Memory from the first to the last element of the faster dimensions.
    covered: int = 1
    for dim in reversed(order):
        if guard_or_false(shape[dim] == 1):
            continue
        if not guard_or_false(stride[dim] >= covered):
            return list(range(len(shape)))
        covered = covered + stride[dim] * (shape[dim] - 1)
    return order


def to_storage_order(x: Tensor) -> Tensor:
    """[...] -> [numel]; a view for dense tensors, a copy otherwise."""
    return x.permute(storage_permutation(x.shape, x.stride())).reshape(-1)


def from_storage_order(
    flat: Tensor, shape: Sequence[int], stride: Sequence[int], whole: Sequence[int] | None = None
) -> Tensor:
    """[numel] -> a view of ``flat`` with ``shape`` and the order of ``stride``; where that is dense, ``stride``.

    ``whole`` is the shape of the tensor that this is a part of, and whose order it has.
    """
    order = storage_permutation(shape if whole is None else whole, stride)
    inverse = [order.index(dim) for dim in range(len(order))]
    return flat.view([shape[dim] for dim in order]).permute(inverse)
