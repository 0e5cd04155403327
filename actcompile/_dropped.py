"""Which elements pruning drops, and what is noted of them while the forward has the exact tensor.

The backward reads codes, in which what is much smaller than the largest element of a group is lost or has become one
level: what is dropped of them may be nothing, where the sum of many small probabilities was dropped. So the mean of
what is dropped, and of its squares, is noted for each group.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._slices import Groups
from .choices import CODE_BITS
from .plan import Pruning
from .triton_kernels._layout import from_storage_order, to_storage_order
from .triton_kernels._topk_sizes import sparsified_nbytes
from .triton_kernels.quantize import quantized_nbytes

# Kept elements, and elements of a block.
Shape = tuple[int, int]

# Elements for which sums are noted; whole blocks.
GROUP = 256
# Elements that are taken at once: so few that they stay in a cache, or many, where each operator has to be started.
_CPU_NUMEL, _GPU_NUMEL = 2**16, 2**24
# Groups that say whether pruning may be worth its noise; how many times more bytes its rival among codes may take, and
# the fewest bits that it has where most tensors have as many.
_NUM_SAMPLES = 256
_RIVAL = 1.6
_RIVAL_BITS = 3
# Blocks up to here are sorted as a whole in less time than their smallest are found.
_SHORT_BLOCK = 16


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
        return self.groups.spread(self._of_groups(shape)[0])

    def variance(self, shape: Shape) -> Tensor:
        """The same around that mean."""
        return self.groups.spread(self._of_groups(shape)[1])

    def in_rows(self, shape: Shape, order: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Mean and variance as ``rows_of`` the elements that are read, whose dimensions lie in memory as ``order``
        says: [num_rows, 1], or [num_rows, GROUP] where rows lie across groups.
        """
        groups = self.groups.whole()
        if groups is not None:
            mean, variance = (values[groups, None] for values in self._of_groups(shape))
            return mean, variance
        return rows_of(self.mean(shape).permute(*order)), rows_of(self.variance(shape).permute(*order))

    def _of_groups(self, shape: Shape) -> tuple[Tensor, Tensor]:
        mean, square = self.moments[:, self.shapes.index(shape)].float().unbind(1)
        return mean, (square - mean.square()).clamp_min(0)


def shapes_of(prunings: Iterable[Pruning]) -> list[Shape]:
    """The shapes of ``prunings``, each once."""
    return list(dict.fromkeys((pruning.keep, pruning.block) for pruning in prunings))


def rows_of(x: Tensor, length: int = GROUP) -> Tensor:
    """The elements of ``x`` one after the other, the rest of the last row zeros: [num_rows, length]."""
    flat, missing = x.reshape(-1), -x.numel() % length
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, length)


def chunk_numel(x: Tensor) -> int:
    """Elements of ``x`` that are best taken at once."""
    return _CPU_NUMEL if x.device.type == "cpu" else _GPU_NUMEL


def is_promising(x: Tensor, rounding: Tensor, prunings: Iterable[Pruning], group_size: int) -> bool:
    """Whether pruning loses less of ``x`` than codes that take more bytes, to go by some of its elements.

    Args:
        x: The exact tensor.
        rounding: Variance of an element's rounding noise: [num_groups, len(CODE_BITS)].
        prunings: What it may be pruned to.
        group_size: Elements of a group of codes.
    """
    groups = rows_of(to_storage_order(x)[: x.numel() // GROUP * GROUP])
    some = groups[:: max(1, len(groups) // _NUM_SAMPLES)].float().contiguous()
    noises = dict(zip(CODE_BITS, rounding.mean(0).tolist(), strict=True))
    lost: dict[Shape, float] = {}
    for keep, block, value_bits in prunings if len(some) else ():
        nbytes = _RIVAL * sparsified_nbytes(x.numel(), keep, block, value_bits, x.dtype)
        rivals = [b for b in CODE_BITS if quantized_nbytes(x.numel(), b, group_size, x.dtype) <= nbytes]
        if max(rivals, default=0) < _RIVAL_BITS:
            continue
        if (keep, block) not in lost:
            share = lost_of_blocks(some.view(-1, block), keep).view(some.shape)
            lost[keep, block] = share.mul_(some.square()).mean().item()
        if lost[keep, block] + noises.get(value_bits, 0.0) * keep / block < noises[max(rivals)]:
            return True
    return False


def lost_share(x: Tensor, shape: Shape) -> Tensor:
    """Of each element the share that is dropped, in storage order: 0 or 1, and of equal ones what they lose on average.

    Decoded tensors have many equal elements.
    """
    keep, block = shape
    share = torch.cat([lost_of_blocks(part, keep) for part in _split(x, block)])
    return from_storage_order(share.view(-1)[: x.numel()], x.shape, x.stride())


def dropped_moments(x: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """``Dropped.moments`` of ``x``, in bfloat16: sums over many groups are what counts."""
    sums = torch.cat([_sums(part, shapes) for part in _split(x, GROUP)])
    counts = torch.tensor([_num_dropped(shape, GROUP) for shape in shapes])
    rest = torch.tensor([_num_dropped(shape, x.numel() % GROUP or GROUP) for shape in shapes])
    sums[:-1] /= counts.clamp_min(1).to(sums.device)[:, None]
    sums[-1:] /= rest.clamp_min(1).to(sums.device)[:, None]
    return sums.bfloat16()


def lost_of_blocks(blocks: Tensor, keep: int) -> Tensor:
    """``lost_share`` of float32 [num_blocks, block]: arithmetic alone, which takes a fifth of the time of masks."""
    magnitudes, position = blocks.abs(), blocks.shape[1] - keep
    if blocks.device.type != "cpu":
        least = magnitudes.topk(keep, dim=1, sorted=False).values.amin(1, keepdim=True)
    else:
        # A third of the time that torch takes to sort out the largest.
        array = magnitudes.numpy()
        ordered = np.sort(array, 1) if blocks.shape[1] <= _SHORT_BLOCK else np.partition(array, position, 1)
        least = torch.from_numpy(ordered[:, position : position + 1].copy())
    # 1 below the least that is kept, 0 where equal, -1 above.
    side = torch.sub(least, magnitudes, out=magnitudes).sign_()
    equal = torch.addcmul(side.new_ones(()), side, side, value=-1)
    below = side.clamp_min_(0)
    lost_of_equal = (position - below.sum(1, keepdim=True)) / equal.sum(1, keepdim=True).clamp_min(1)
    return below.addcmul_(equal, lost_of_equal)


def _split(x: Tensor, length: int) -> Iterator[Tensor]:
    """Float32 rows of ``length``, in storage order, as many at once as is best."""
    flat = to_storage_order(x)
    return (rows_of(part.float(), length) for part in torch.split(flat, chunk_numel(x)))


def _sums(groups: Tensor, shapes: Sequence[Shape]) -> Tensor:
    """Sums of what is dropped of each group, and of its squares: [num_groups, number of shapes, 2]."""
    columns = []
    for keep, block in shapes:
        lost = lost_of_blocks(groups.view(-1, block), keep).view(groups.shape).mul_(groups)
        columns.append(torch.stack([lost.sum(1), lost.mul_(groups).sum(1)], 1))
    return torch.stack(columns, 1)


def _num_dropped(shape: Shape, numel: int) -> int:
    """Of a group with so many elements before zeros that fill it up, which are dropped first."""
    keep, block = shape
    return sum(max(0, min(block, numel - start) - keep) for start in range(0, numel, block))
