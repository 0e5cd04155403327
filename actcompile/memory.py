"""Bytes that are alive while a pair of graphs runs: interpreted, operator by operator, or compiled, as symbols."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ._inductor import known_sizes, planned_changes
from ._torch import TRAINING_SETTINGS, copied
from .passes._fx import GraphPair, graph_outputs, hint
from .passes._views import ALIAS_OPS, storage


@dataclass(frozen=True)
class Timeline:
    """Live bytes after each operator of a step, forward first; parameters and graph inputs left out.

    ``labels`` names the operators, ``num_forward`` says how many of them belong to the forward.
    """

    labels: tuple[str, ...]
    live_nbytes: tuple[int, ...]
    num_forward: int

    @property
    def peak_nbytes(self) -> int:
        """The most bytes alive at once."""
        return max(self.live_nbytes, default=0)

    @property
    def stored_nbytes(self) -> int:
        """Bytes that the forward leaves alive."""
        return self.live_nbytes[self.num_forward - 1] if self.num_forward else 0


@dataclass(frozen=True)
class SymbolicTimeline:
    """A ``Timeline`` whose bytes are expressions in the graph's symbolic sizes.

    ``traced`` holds the sizes of the traced call by symbol.
    """

    labels: tuple[str, ...]
    live_nbytes: tuple[sympy.Expr, ...]
    num_forward: int
    traced: Mapping[sympy.Symbol, int]

    def at(self, sizes: Mapping[sympy.Symbol, int] | None = None) -> Timeline:
        """The timeline of a call of these ``sizes``; symbols that are left out have those of the traced call."""
        values = {symbol: sympy.Integer(size) for symbol, size in {**self.traced, **(sizes or {})}.items()}
        live = tuple(int(nbytes.xreplace(values)) for nbytes in self.live_nbytes)
        return Timeline(self.labels, live, self.num_forward)


class CompiledStep:
    """A pair of rewritten graphs whose timeline, once somebody asks, is that of the code Inductor makes of it.

    Args:
        pair: The graphs, which are copied: compilers change what they get.
        settings: Of Inductor's, on top of those that this package always has.
    """

    def __init__(self, pair: GraphPair, settings: Mapping[str, Any]) -> None:
        self._forward, self._backward = copied(pair.forward), copied(pair.backward)
        self._settings = {**TRAINING_SETTINGS, **settings}
        returned = {storage(node) for node in pair.user_outputs if isinstance(node, fx.Node)}
        self._owned = [
            placeholder.name
            for slot in pair.slots
            for node, placeholder in zip(slot.outputs, slot.placeholders, strict=True)
            if storage(node).op != "placeholder" and storage(node) not in returned
        ]

    @functools.cached_property
    def timeline(self) -> SymbolicTimeline:
        """Live bytes after each allocation and release; parameters and the caller's inputs left out."""
        forward = planned_changes(self._forward, False, (), self._settings)
        backward = planned_changes(self._backward, True, self._owned, self._settings)
        level, live = sympy.S.Zero, []
        for change in (*forward, *backward):
            level += change.nbytes
            live.append(level + change.temporary)
        labels = tuple(change.label for change in (*forward, *backward))
        return SymbolicTimeline(labels, tuple(live), len(forward), known_sizes(self._forward))


def step_peak(timelines: Sequence[Timeline]) -> int:
    """The most bytes alive in a step of several graphs, in the order of their forwards; backwards run in reverse.

    A graph runs on top of what the forwards before it left, and a backward on top of what those before it returned.
    """
    peak = 0
    kept: list[int] = []
    for timeline in timelines:
        before = sum(kept)
        peak = max([peak, *(before + nbytes for nbytes in timeline.live_nbytes[: timeline.num_forward])])
        kept.append(timeline.stored_nbytes)
    returned = 0
    for timeline in reversed(timelines):
        kept.pop()
        backward = timeline.live_nbytes[timeline.num_forward :]
        peak = max([peak, *(sum(kept) + returned + nbytes for nbytes in backward)])
        returned += backward[-1] if backward else 0
    return peak


def step_timeline(forward: fx.Graph, backward: fx.Graph) -> Timeline:
    """The timeline of one training step, every operator's result taken as one allocation.

    Fused operators allocate less than this says; the order is that of the graphs.
    """
    labels: list[str] = []
    live: list[int] = []
    kept = {node for node in _nodes(forward) if node.op != "placeholder"}
    level = _walk(forward, set(), kept, 0, labels, live)
    num_forward = len(live)
    received = {n for n in backward.find_nodes(op="placeholder") if not n.name.startswith(("primals", "tangents"))}
    _walk(backward, received, set(_nodes(backward)), level, labels, live)
    return Timeline(tuple(labels), tuple(live), num_forward)


def _walk(
    graph: fx.Graph, owned: set[fx.Node], kept: set[fx.Node], level: int, labels: list[str], live: list[int]
) -> int:
    """Appends one entry per operator of ``graph`` and returns the bytes alive at its end."""
    storage: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        is_view = node.target in ALIAS_OPS and node.all_input_nodes
        storage[node] = storage[node.all_input_nodes[0]] if is_view else node
    last_use = {}
    for node in graph.nodes:
        for source in (node, *node.all_input_nodes):
            last_use[storage[source]] = node
    expiring: dict[fx.Node, list[fx.Node]] = {}
    kept = {storage[node] for node in kept}
    for source, user in last_use.items():
        if source not in kept and (source in owned or source.op == "call_function"):
            expiring.setdefault(user, []).append(source)
    for node in graph.nodes:
        if node.op == "call_function":
            if storage[node] is node:
                level += _nbytes(node)
            labels.append(node.name)
            live.append(level)
        level -= sum(_nbytes(source) for source in expiring.get(node, ()))
    return level


def _nbytes(node: fx.Node) -> int:
    # A tuple's bytes are counted where its elements are taken out.
    value = node.meta.get("val")
    return hint(value.numel()) * value.element_size() if isinstance(value, torch.Tensor) else 0


def _nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that ``graph`` returns."""
    return [value for value in graph_outputs(graph) if isinstance(value, fx.Node)]
