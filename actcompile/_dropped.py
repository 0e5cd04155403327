"""Which elements pruning drops, and what is noted of them while the forward has the exact tensor.

The backward reads codes, in which what is much smaller than the largest element of a group is lost or has become one
level: what is dropped of them may be nothing, where the sum of many small probabilities was dropped. So the mean of
what is dropped, and of its squares, is noted for each group.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._slices import Groups
from .plan import Pruning
from .triton_kernels._chunked import CHUNK_NUMEL
from .triton_kernels._layout import from_storage_order, to_storage_order

# Kept elements, and elements of a block.
Shape = tuple[int, int]

# Elements for which sums are noted; whole blocks.
GROUP = 256


@dataclass(frozen=True)
class Dropped:
    """What pruning drops of one tensor.

    Args:
        moments: Mean and mean square of what is dropped: [num_groups, number of shapes, 2].
        shapes: What is kept.
        groups: Those of the elements that are read, of ``GROUP``.
    """

    moments: Tensor
    shapes: Sequence[Shape]
    groups: Groups

    def mean(self, shape: Shape) -> Tensor:
        """For each element that is read, the mean of what its group loses."""
        return self._spread(shape, 0)

    def variance(self, shape: Shape) -> Tensor:
        """The same around that mean."""
        return (self._spread(shape, 1) - self.mean(shape).square()).clamp_min(0)

    def _spread(self, shape: Shape, moment: int) -> Tensor:
        return self.groups.spread(self.moments[:, self.shapes.index(shape), moment].float())


def shapes_of(prunings: Iterable[Pruning]) -> list[Shape]:
    """The shapes of ``prunings``, each once."""
    return list(dict.fromkeys((pruning.keep, pruning.block) for pruning in prunings))


def lost_share(x: Tensor, shape: Shape) -> Tensor:
    """Of each element the share that is dropped, in storage order: 0 or 1, and of equal ones what they lose on average.

    Decoded tensors have many equal elements.
    """
    keep, block = shape
    share = _lost_share(_rows(to_storage_order(x), block), keep)
    return from_storage_order(share.view(-1)[: x.numel()].clone(), x.shape, x.stride())


def dropped_moments(x: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """``Dropped.moments`` of ``x``, in bfloat16: sums over many groups are what counts."""
    groups = _rows(to_storage_order(x), GROUP)
    return torch.cat([_moments(part.float(), shapes) for part in torch.split(groups, CHUNK_NUMEL // GROUP)]).bfloat16()


def _moments(groups: Tensor, shapes: Sequence[Shape]) -> Tensor:
    columns = []
    for keep, block in shapes:
        share = _lost_share(groups.view(-1, block), keep).view(groups.shape)
        count = max(1, (block - keep) * (GROUP // block))
        columns.append(torch.stack([(share * groups).sum(1), (share * groups.square()).sum(1)], 1) / count)
    return torch.stack(columns, 1)


def _lost_share(blocks: Tensor, keep: int) -> Tensor:
    """[num_blocks, block] of which ``keep`` of each block are kept."""
    magnitudes, position = blocks.abs(), blocks.shape[1] - keep
    if blocks.device.type == "cpu":
        # A third of the time that torch takes to sort out the largest.
        ordered = np.partition(magnitudes.float().numpy(), position, axis=1)
        least = torch.from_numpy(ordered[:, position : position + 1].copy()).to(blocks.dtype)
    else:
        least = magnitudes.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    below, equal = magnitudes < least, magnitudes == least
    lost_of_equal = (position - below.sum(1, keepdim=True)) / equal.sum(1, keepdim=True).clamp_min(1)
    return torch.where(below, 1.0, torch.where(equal, lost_of_equal, 0.0))


def _rows(flat: Tensor, length: int) -> Tensor:
    missing = -flat.numel() % length
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, length)
