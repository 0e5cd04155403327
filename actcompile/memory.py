"""Bytes that are alive while a pair of graphs runs, node by node."""

from dataclasses import dataclass

import torch
from torch import fx

from .passes._fx import graph_outputs, hint
from .passes._views import ALIAS_OPS


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
