"""Finds where the batch lies in the tensors of a pair of graphs.

Both graphs are propagated on meta tensors with a batch several times as large (_growth.py): the dimension of a result
that grew with it is the one that holds the batch. Every length that the batch may have is tried.
"""

import logging
from collections import Counter

from ._growth import Growth, NotSeparableError, WrongGuessError
from .passes._fx import GraphPair, hint, is_tensor
from .plan import Role

log = logging.getLogger(__name__)

# Wrong guesses about constants that are mended before a batch is given up.
_MAX_MENDED = 8


def find_batch(pair: GraphPair) -> tuple[int, dict[str, int]] | None:
    """The batch size, and the dimension that holds the batch in nodes of the backward, by name; None without one."""
    for size in _candidates(pair):
        for grown in (True, False):
            try:
                return size, _propagate(pair, size, grown)
            except (NotSeparableError, RuntimeError, ValueError, TypeError, IndexError) as error:
                log.debug("a batch of %d is not it: %s", size, error)
    return None


def _propagate(pair: GraphPair, size: int, grown: bool) -> dict[str, int]:
    """The dimensions of a batch of ``size``; constants that turn out to have grown by mistake are held back."""
    held: frozenset[str] = frozenset()
    for _ in range(_MAX_MENDED):
        try:
            return Growth(pair, size, grown, held).dims
        except WrongGuessError as error:
            log.debug("%s: %s do not grow", error, ", ".join(error.names))
            held |= error.names
    raise NotSeparableError("too many constants are as long as the batch by chance")


def _candidates(pair: GraphPair) -> list[int]:
    """Lengths of the first dimensions of what the caller passed, those of the largest tensors first."""
    numels: Counter[int] = Counter()
    for node, role in pair.roles.items():
        if role in (Role.INPUT, Role.PADDING, Role.BOUNDARY) and is_tensor(node) and node.meta["val"].dim():
            numels[hint(node.meta["val"].shape[0])] += hint(node.meta["val"].numel())
    return [size for size, _ in numels.most_common() if size > 1]
