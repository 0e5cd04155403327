"""Cuts a backward graph into segments, so that a vector-Jacobian product through it takes little memory."""

import bisect
import itertools
import operator
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from .passes._fx import hint, is_tensor
from .passes._views import ALIAS_OPS, storage

# Numbers of segments, and how many limits of what crosses between them, that are tried.
_COUNTS = (1, 2, 4, 8, 16, 32, 64)
_LIMITS = 16
# What a segment takes under autograd, relative to the results of its operators.
_AUTOGRAD_FACTOR = 1.2


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes, and what they read that others compute before."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]

    @cached_property
    def inside(self) -> frozenset[fx.Node]:
        """The nodes as a set."""
        return frozenset(self.nodes)


def split(nodes: Sequence[fx.Node], leaves: frozenset[fx.Node], kept_share: float = 1.0) -> list[Segment]:
    """The segments that together with what is kept between them, ``kept_share`` of it, take the least memory."""
    crossing, sizes = crossing_nbytes(nodes, leaves), new_nbytes(nodes)
    limits = sorted(set(crossing))[:: max(1, len(set(crossing)) // _LIMITS)]
    # Many limits cut at the same places.
    tried = {places for limit in limits for places in starts(nodes, crossing, sizes, limit, _COUNTS)}
    candidates = [cut(nodes, leaves, places) for places in sorted(tried)]
    return min(candidates, key=lambda segments: cost(segments, leaves, sizes, kept_share), default=[])


def cost(
    segments: Sequence[Segment],
    leaves: frozenset[fx.Node],
    sizes: Mapping[fx.Node, int],
    kept_share: float = 1.0,
) -> float:
    """About the bytes of what is kept between segments and of the largest of them under autograd."""
    kept = {storage(node) for segment in segments for node in segment.inputs if node not in leaves}
    largest = max((sum(map(sizes.__getitem__, segment.nodes)) for segment in segments), default=0)
    return _AUTOGRAD_FACTOR * largest + kept_share * sum(map(_nbytes, kept))


def narrow(segments: Sequence[Segment], needed: Container[fx.Node], leaves: frozenset[fx.Node]) -> list[Segment]:
    """The segments with only the nodes that are ``needed``."""
    parts = [[node for node in segment.nodes if node in needed] for segment in segments]
    return [Segment(tuple(part), _inputs(part, leaves)) for part in parts]


def crossing_nbytes(nodes: Sequence[fx.Node], leaves: frozenset[fx.Node]) -> list[int]:
    """For each node, the bytes computed before it that it or later ones read, leaves left out."""
    position = {node: index for index, node in enumerate(nodes)}
    changes = [0] * (len(nodes) + 1)
    users: dict[fx.Node, list[int]] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            users.setdefault(storage(source), []).append(position[node])
    for node in nodes:
        readers = users.get(node)
        if readers and node not in leaves:
            changes[position[node] + 1] += _new_nbytes(node)
            changes[max(readers) + 1] -= _new_nbytes(node)
    return list(itertools.accumulate(changes))[: len(nodes)]


def starts(
    nodes: Sequence[fx.Node], crossing: Sequence[int], sizes: Mapping[fx.Node, int], limit: int, counts: Sequence[int]
) -> list[tuple[int, ...]]:
    """For each of ``counts``, where at most as many segments begin: where no more than ``limit`` bytes cross.

    Tuples stay with what unpacks them.
    """
    is_cut = [
        nbytes <= limit and node.target is not operator.getitem for node, nbytes in zip(nodes, crossing, strict=True)
    ]
    allowed = list(itertools.compress(range(len(nodes)), is_cut))
    # Of what is computed before each node, and in the end.
    filled = list(itertools.accumulate(map(sizes.__getitem__, nodes), initial=0))
    return [_starts(allowed, filled, filled[-1] / count) for count in counts]


def _starts(allowed: Sequence[int], filled: Sequence[int], nbytes: float) -> tuple[int, ...]:
    """Those of ``allowed`` behind which, each time, ``nbytes`` are filled."""
    places = [0]
    while True:
        full = bisect.bisect_left(filled, filled[places[-1]] + nbytes)
        behind = bisect.bisect_left(allowed, max(full, places[-1] + 1))
        if behind == len(allowed):
            return tuple(places)
        places.append(allowed[behind])


def cut(nodes: Sequence[fx.Node], leaves: frozenset[fx.Node], places: Sequence[int]) -> list[Segment]:
    """The segments that begin at ``places``."""
    parts = [tuple(nodes[start:stop]) for start, stop in zip(places, [*places[1:], len(nodes)], strict=True)]
    return [Segment(part, _inputs(part, leaves)) for part in parts]


def _inputs(group: Sequence[fx.Node], leaves: frozenset[fx.Node]) -> tuple[fx.Node, ...]:
    """What ``group`` reads from before, in order."""
    inside = set(group)
    reading = (node for node in group if node not in leaves)
    read = (source for node in reading for source in node.all_input_nodes)
    return tuple(dict.fromkeys(node for node in read if node.op != "placeholder" and node not in inside))


def _nbytes(node: fx.Node) -> int:
    return hint(node.meta["val"].numel()) * node.meta["val"].element_size() if is_tensor(node) else 0


def new_nbytes(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Bytes that the results of ``nodes`` take; views take none."""
    return {node: _new_nbytes(node) for node in nodes}


def _new_nbytes(node: fx.Node) -> int:
    return 0 if node.target in ALIAS_OPS else _nbytes(node)
