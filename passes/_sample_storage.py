"""What operators with pruned gradients store, and the list of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actcompile.plan import Action
from actcompile.triton_kernels.sample_topk import prune_samples

# Back Razor's type of what is kept, except where values keep that of the tensor.
VALUE_DTYPE = torch.float16


@dataclass(frozen=True)
class Stored:
    """One tensor that an operator stored: what it is to the operator, its own size, and what is stored of it."""

    what: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    action: Action
    parts: tuple[int, ...]
    nbytes: int
    kind: str = "path"


class Storage:
    """Prunes what operators store, and lists it.

    Args:
        sparsity: Share of each sample to drop.
    """

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        self.stored: list[Stored] = []

    def prune(self, x: Tensor, what: str, dtype: torch.dtype = VALUE_DTYPE, kind: str = "path") -> list[Tensor]:
        """The bits and values of the largest elements of each sample, values of ``dtype``."""
        bits, values = prune_samples(x, self.sparsity, dtype)
        self._list(x, what, Action.PRUNE, [bits, values], kind)
        return [bits, values]

    def narrow(self, x: Tensor, what: str) -> Tensor:
        """All of ``x``, in 16 bits."""
        narrow = x.to(VALUE_DTYPE)
        self._list(x, what, Action.NARROW, [narrow], "path")
        return narrow

    def _list(self, x: Tensor, what: str, action: Action, parts: Sequence[Tensor], kind: str) -> None:
        places = tuple(part.untyped_storage().data_ptr() for part in parts)
        nbytes = sum(part.nbytes for part in parts)
        self.stored.append(Stored(what, tuple(x.shape), x.dtype, action, places, nbytes, kind))
