"""One vector-Jacobian product through a backward graph, in segments, so that it takes little memory.

The graph runs once without autograd, and what crosses from one segment to the next is kept. Then each segment, the last
first, runs again under autograd, from what was kept, and hands the cotangents of its inputs to those before it.

Operators that autograd cannot differentiate are opaque: nothing passes through them, and what they read is named.
"""

import functools
from collections.abc import Callable, Container, Iterable, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ._derivatives import call_differentiable, is_opaque
from ._segments import Segment, cost, narrow, new_nbytes, split
from ._short import Short, shorten
from ._tiles import call_node, find_tilings, ordered, run_graph
from .passes._fx import graph_outputs, is_tensor
from .passes.place_codecs import DECODERS

# Takes a node that is about to run, and the values that it reads.
See = Callable[[fx.Node, Mapping[fx.Node, Any]], None]


def _ignore(node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
    """Sees nothing."""


class Sweep:
    """A backward graph that is differentiated by the nodes ``leaves``, which every segment that reads them reads anew.

    ``readers`` says how, and how to read what else is stored in codes; the first run notes their operators and
    arguments where they are not given. ``is_tiled`` lets runs of pointwise operators take a few rows at a time; values
    noted in the graph must be as they are when it runs. ``is_short`` keeps values between segments in 8 bits.
    """

    def __init__(
        self, graph: fx.Graph, leaves: frozenset[fx.Node], is_tiled: bool = True, is_short: bool = False
    ) -> None:
        self.graph = graph
        self.leaves = leaves
        self.opaque: set[fx.Node] = set()
        self.readers: dict[fx.Node, functools.partial[Tensor]] = {}
        self.nodes = ordered(graph)
        self._is_tiled = is_tiled
        self._is_short = is_short
        self.dependent = _dependent(self.nodes, leaves)
        self._arguments: MutableMapping[fx.Node, Any] = {}
        self._kept: dict[fx.Node, Any] = {}

    @cached_property
    def segments(self) -> list[Segment]:
        """The graph in pieces."""
        return split(self.nodes, self.leaves, 0.25 if self._is_short else 1.0)

    def cut_like(self, other: "Sweep") -> None:
        """Takes over the segments of a graph with the same nodes, by name, which saves looking for them."""
        own = {node.name: node for node in self.nodes}
        self.segments = [
            Segment(tuple(own[node.name] for node in segment.nodes), tuple(own[node.name] for node in segment.inputs))
            for segment in other.segments
        ]

    @cached_property
    def nbytes(self) -> float:
        """About what ``run_and_keep`` and ``pull_back`` take."""
        return cost(self.segments, self.leaves, new_nbytes(self.nodes))

    def feed(
        self,
        arguments: MutableMapping[fx.Node, Any],
        readers: Mapping[fx.Node, "functools.partial[Tensor]"] | None = None,
    ) -> None:
        """Takes the arguments of one call."""
        self._arguments, self.readers = arguments, dict(readers or {})

    def run(self, change: Mapping[fx.Node, Callable[[Tensor], Tensor]] | None = None) -> list[Any]:
        """The results of the graph, with the values of some leaves changed; keeps nothing."""
        return self._run(self.nodes, graph_outputs(self.graph), frozenset(), change or {})

    def value(self, node: fx.Node) -> Any:
        """What ``node`` computes; runs only what that takes. How to read the leaves has to be known."""
        needed = sources_of([node])
        (value,) = self._run([one for one in self.nodes if one in needed], [node], frozenset(), {})
        return value

    def run_last(self, see: See = _ignore) -> list[Any]:
        """The results of the graph; lets go of its arguments meanwhile, so that nothing can run behind it.

        ``see`` takes every node that runs by itself, with the values it reads, right before.
        """

        def evaluate(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
            see(node, values)
            return call_node(node, values)

        values, self._arguments, self.readers = self._arguments, {}, {}
        pieces = find_tilings(self.nodes) if self._is_tiled else self.nodes
        with torch.no_grad():
            return run_graph(pieces, graph_outputs(self.graph), values, None, evaluate)

    def note_readers(self) -> None:
        """Notes how to read what is stored in codes, as running the graph does."""
        values = dict(self._arguments)
        for node in self.nodes:
            if node.target in DECODERS:
                args = fx.node.map_arg(node.args, values.__getitem__)
                self.readers[node] = functools.partial(node.target, *args)  # type: ignore[arg-type, operator, misc]
            elif not is_tensor(node) and all(source in values for source in node.all_input_nodes):
                # Sizes that are computed.
                values[node] = call_node(node, values)

    def run_and_keep(self, see: See = _ignore) -> list[Any]:
        """The results of the graph; keeps what ``pull_back`` starts from. ``see`` is as in ``run_last``."""
        return self._run(self.nodes, graph_outputs(self.graph), self._crossing(), {}, see)

    def keep(self) -> None:
        """Keeps what ``pull_back`` starts from, and computes only that; how to read the leaves has to be given."""
        crossing = self._crossing()
        needed = set(crossing)
        for node in reversed(self.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        self._run([node for node in self.nodes if node in needed], [], crossing, {})

    def _crossing(self) -> frozenset[fx.Node]:
        return frozenset(node for segment in self.segments for node in segment.inputs) - self.leaves

    @torch.no_grad()
    def _run(
        self,
        nodes: Sequence[fx.Node],
        results: Sequence[Any],
        kept: frozenset[fx.Node],
        change: Mapping[fx.Node, Callable[[Tensor], Tensor]],
        see: See = _ignore,
    ) -> list[Any]:
        def evaluate(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
            see(node, values)
            if (node in self.leaves or node.target in DECODERS) and node not in self.readers:
                args = fx.node.map_arg(node.args, values.__getitem__)
                self.readers[node] = functools.partial(node.target, *args)  # type: ignore[arg-type, operator, misc]
            value = self._value(node, values)
            if node in change:
                value = change[node](value)
            return value

        pieces = find_tilings(nodes, change, kept) if self._is_tiled else nodes
        values = dict(self._arguments)
        self._kept = dict.fromkeys(kept)
        keep = shorten if self._is_short else lambda value: value
        return run_graph(pieces, results, values, self.readers, evaluate, self._kept, keep)

    def _value(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        return self.readers[node]() if node in self.readers else call_differentiable(node, values)

    def _kept_value(self, node: fx.Node) -> Any:
        kept = self._kept[node]
        return kept.read() if isinstance(kept, Short) else kept

    @torch.no_grad()
    def pull_back(
        self,
        targets: Iterable[fx.Node],
        draw: Callable[[fx.Node, Tensor], Tensor],
        see: Callable[[fx.Node, Tensor], None],
    ) -> None:
        """One vector-Jacobian product; needs ``run_and_keep`` or ``keep`` before it.

        Args:
            targets: Results of the graph that have a cotangent.
            draw: Gives it, from the node and its value.
            see: Takes each leaf and its cotangent, in the layout of the leaf's value, as soon as it is complete.
        """
        wanted = {node for node in targets if node in self.dependent}
        segments = narrow(self.segments, sources_of(wanted), self.leaves)
        first_reader = {
            node: index
            for index, segment in reversed(list(enumerate(segments)))
            for node in (*segment.inputs, *(self.leaves & segment.inside))
        }
        self._kept = {node: value for node, value in self._kept.items() if node in first_reader}
        cotangents: dict[fx.Node, Tensor] = {}
        for index, segment in reversed(list(enumerate(segments))):
            directions = {node: cotangents.pop(node) for node in cotangents.keys() & (segment.inside - self.leaves)}
            for node, cotangent in self._pull_back_through(segment, wanted, directions, draw).items():
                cotangents[node] = _sum(cotangents.get(node), cotangent)
                del cotangent
            for node in (*segment.inputs, *(self.leaves & segment.inside)):
                if first_reader[node] == index:
                    self._kept.pop(node, None)
                    if node in self.leaves and node in cotangents:
                        see(node, cotangents.pop(node))

    def _pull_back_through(
        self,
        segment: Segment,
        wanted: Container[fx.Node],
        directions: dict[fx.Node, Tensor],
        draw: Callable[[fx.Node, Tensor], Tensor],
    ) -> dict[fx.Node, Tensor]:
        """The cotangents of what a segment reads, given those of its results; nothing else is left of it."""
        ends = [node for node in segment.nodes if node not in self.leaves and (node in directions or node in wanted)]
        values, sources = self._forward(segment, ends)
        ends = [node for node in ends if _needs_grad(values[node])]
        if not ends or not sources:
            return {}
        for node in ends:
            if node in wanted:
                directions[node] = _sum(directions.get(node), draw(node, values[node]))
        found = torch.autograd.grad(
            [values[node] for node in ends],
            list(sources.values()),
            [directions.pop(node) for node in ends],
            allow_unused=True,
        )
        return {
            node: torch.empty_like(value).copy_(cotangent) if node in self.leaves else cotangent
            for (node, value), cotangent in zip(sources.items(), found, strict=True)
            if cotangent is not None
        }

    def _forward(self, segment: Segment, ends: Iterable[fx.Node]) -> tuple[dict[fx.Node, Any], dict[fx.Node, Tensor]]:
        """Values of ``ends``, computed under autograd, and the sources: leaves, and inputs that depend on them."""
        values: dict[fx.Node, Any] = dict(self._arguments)
        sources: dict[fx.Node, Tensor] = {}
        last = {source: node for node in segment.nodes for source in (node, *node.all_input_nodes)}
        expiring: dict[fx.Node, list[fx.Node]] = {}
        for node in last.keys() - set(ends):
            expiring.setdefault(last[node], []).append(node)
        for node in (*segment.inputs, *segment.nodes):
            if node in self.leaves or node not in segment.inside:
                value = self.readers[node]() if node in self.leaves else self._kept_value(node)
                if node in self.dependent and isinstance(value, Tensor) and value.is_floating_point():
                    value = sources[node] = value.detach().requires_grad_()
                values[node] = value
            else:
                with torch.set_grad_enabled(node in self.dependent):
                    values[node] = self._value(node, values)
                if is_opaque(values[node]):
                    self.opaque.add(node)
                    values[node] = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, values[node])
            for done in expiring.get(node, ()) if node in segment.inside else ():
                values.pop(done, None)
        return values, sources

    def behind_opaque(self) -> set[fx.Node]:
        """The leaves that an opaque operator reads, directly or not."""
        return sources_of(self.opaque) & self.leaves


def sources_of(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes, and all that they are computed from."""
    pending, seen = list(nodes), set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.all_input_nodes)
    return seen


def _dependent(nodes: Sequence[fx.Node], leaves: frozenset[fx.Node]) -> set[fx.Node]:
    dependent = set(leaves)
    for node in nodes:
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return dependent


def _needs_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor:
    if first is None or second is None:
        result = first if second is None else second
        assert result is not None
        return result
    return first + second
