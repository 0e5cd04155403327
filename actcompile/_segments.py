"""Cuts a backward graph into segments, so that a vector-Jacobian product through it takes little memory."""

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


def split(nodes: Sequence[fx.Node], leaves: frozenset[fx.Node]) -> list[Segment]:
    """The segments that together with what is kept between them take the least memory."""
    crossing, sizes = crossing_nbytes(nodes, leaves), new_nbytes(nodes)
    best: tuple[float, list[Segment]] | None = None
    for limit in sorted(set(crossing))[:: max(1, len(set(crossing)) // _LIMITS)]:
        for count in _COUNTS:
            segments = cut(nodes, leaves, crossing, sizes, limit, count)
            nbytes = cost(segments, leaves, sizes)
            if best is None or nbytes < best[0]:
                best = nbytes, segments
    return [] if best is None else best[1]


def cost(segments: Sequence[Segment], leaves: frozenset[fx.Node], sizes: Mapping[fx.Node, int]) -> float:
    """About the bytes of what is kept between segments and of the largest of them under autograd."""
    kept = {storage(node) for segment in segments for node in segment.inputs if node not in leaves}
    largest = max((sum(map(sizes.__getitem__, segment.nodes)) for segment in segments), default=0)
    return _AUTOGRAD_FACTOR * largest + sum(map(_nbytes, kept))


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


def cut(
    nodes: Sequence[fx.Node],
    leaves: frozenset[fx.Node],
    crossing: Sequence[int],
    sizes: Mapping[fx.Node, int],
    limit: int,
    count: int,
) -> list[Segment]:
    """At most ``count`` segments, cut where no more than ``limit`` bytes cross; tuples stay with what unpacks them."""
    size = sum(sizes.values()) / count
    parts: list[list[fx.Node]] = []
    filled = 0
    for node, nbytes in zip(nodes, crossing, strict=True):
        if not parts or (filled >= size and nbytes <= limit and node.target is not operator.getitem):
            parts.append([])
            filled = 0
        parts[-1].append(node)
        filled += sizes[node]
    return [Segment(tuple(part), _inputs(part, leaves)) for part in parts]


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
