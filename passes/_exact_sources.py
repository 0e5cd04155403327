"""What to keep exact in place of what is computed from it: a few numbers that many are made of."""

from collections.abc import Callable, Iterable

import torch
from torch import fx

from ._fx import hint
from ._views import VIEW_OPS

# Bits of an element in codes, which no plan has chosen yet.
_BITS_OF_A_CODE = 4
_BITS_OF_A_MASK = 1
# Nodes to look through.
_MOST_STEPS = 40


def exact_sources(
    cut: fx.Node, is_noisy: Callable[[fx.Node], bool], is_cheap: Callable[[fx.Node], bool]
) -> frozenset[fx.Node]:
    """The noisy nodes from which ``cut`` can be computed again, where they take fewer bytes exact than it in codes.

    Empty where they do not. A decay exp(a * dt), one for each of 16 states, comes from dt, a sixteenth of its elements.

    Args:
        cut: A node that must be computed from exact values.
        is_noisy: Whether a node may carry noise.
        is_cheap: Whether a node may be computed again.
    """
    value = cut.meta.get("val")
    if not isinstance(value, torch.Tensor) or not is_cheap(cut):
        return frozenset()
    bits = _BITS_OF_A_MASK if value.dtype is torch.bool else _BITS_OF_A_CODE
    sources = {one for one in cut.all_input_nodes if is_noisy(one)}
    best = set(sources)
    for _ in range(_MOST_STEPS):
        largest = max(sources, key=lambda one: _nbytes([one]), default=None)
        if largest is None or not (is_cheap(largest) or largest.target in VIEW_OPS):
            break
        sources = sources - {largest} | {one for one in largest.all_input_nodes if is_noisy(one)}
        # Of as many bytes, those that need no function in between.
        if _nbytes(sources) <= _nbytes(best):
            best = set(sources)
    return frozenset(best) if 8 * _nbytes(best) <= bits * hint(value.numel()) else frozenset()


def _nbytes(nodes: Iterable[fx.Node]) -> int:
    values = [node.meta.get("val") for node in nodes]
    return sum(hint(one.numel()) * one.element_size() for one in values if isinstance(one, torch.Tensor))
