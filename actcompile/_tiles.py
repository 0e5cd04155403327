"""Interprets a graph with runs of pointwise operators taken a few rows at a time.

An interpreter gives every operator's result memory of its own; compiled code keeps what lies between two pointwise
operators in registers. Here, consecutive operators that treat the rows of their operands one by one

    a [R, ...] -> b = f(a) [R, ...] -> c = g(b, a) [R, ...]

run for a part of the rows after the other, so that of b, which nobody else reads, only a part is there at a time. The
results are the same; their bytes come close to those of compiled code. Codes are decoded a part at a time, too.
"""

import functools
import math
import operator
from collections.abc import Callable, Container, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ._seeded import RANDOM
from ._slices import Part, decode
from .passes._fx import graph_outputs, is_tensor
from .passes._views import ALIAS_OPS

aten = torch.ops.aten

# Bytes of the largest tensor of a run that are worked on at a time.
_TILE_NBYTES = 2**20

_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_ROW_REDUCTIONS = frozenset({aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.mean.dim})

dequantize = torch.ops.actcompile.dequantize.default


@dataclass(frozen=True)
class Tiling:
    """A run of operators and what it takes.

    Args:
        nodes: In the order of the graph.
        cut: (operator, operand) pairs whose operand is read row by row; others are read whole.
        returned: Nodes that are read behind the run.
        count: How many parts the rows are taken in.
    """

    nodes: tuple[fx.Node, ...]
    cut: frozenset[tuple[fx.Node, fx.Node]]
    returned: tuple[fx.Node, ...]
    count: int

    def run(self, values: MutableMapping[fx.Node, Any], readers: MutableMapping[fx.Node, Any]) -> None:
        """Computes what is returned, and notes how to read what is decoded."""
        for node in self.nodes:
            if node.target is dequantize and node not in readers:
                readers[node] = functools.partial(node.target, *fx.node.map_arg(node.args, values.__getitem__))
        results = {node: _empty_like(node) for node in self.returned}
        for index in range(self.count):
            part = Part(index, 1, self.count)
            tile: dict[fx.Node, Any] = {}
            for node in self.nodes:
                tile[node] = self._value(node, part, tile, values, readers)
            for node, result in results.items():
                rows = part.rows(len(result))
                result[rows] = tile[node]
        values.update(results)

    def _value(
        self,
        node: fx.Node,
        part: Part,
        tile: Mapping[fx.Node, Any],
        values: Mapping[fx.Node, Any],
        readers: Mapping[fx.Node, Any],
    ) -> Any:
        if node in readers:
            return decode(readers[node].func, readers[node].args, 0, part)

        def read(source: fx.Node) -> Any:
            if source in tile:
                return tile[source]
            value = values[source]
            return value[part.rows(len(value))] if (node, source) in self.cut else value

        args: list[Any] = list(fx.node.map_arg(node.args, read))
        shape = [node.meta["val"].shape[0] // self.count, *node.meta["val"].shape[1:]]
        if node.target in _VIEWS:
            return args[0].reshape(shape)
        if node.target is aten.expand.default:
            args[1] = shape
        return node.target(*args, **fx.node.map_arg(node.kwargs, read))  # type: ignore[operator]


def find_tilings(
    nodes: Sequence[fx.Node], whole: Container[fx.Node] = (), kept: Container[fx.Node] = ()
) -> list[fx.Node | Tiling]:
    """``nodes`` in their order, with runs that are worth it taken together.

    Args:
        nodes: The operators of a graph.
        whole: Those that are part of no run.
        kept: Those that are read after the graph has run.
    """
    pieces: list[fx.Node | Tiling] = []
    run: list[fx.Node] = []
    for node in nodes:
        if node in whole or not _is_rowwise(node):
            pieces.extend(_tiled(run, kept))
            pieces.append(node)
            run = []
            continue
        if not _fits(node, run):
            pieces.extend(_tiled(run, kept))
            run = []
        run.append(node)
    pieces.extend(_tiled(run, kept))
    return pieces


def _tiled(run: Sequence[fx.Node], kept: Container[fx.Node]) -> list[fx.Node | Tiling]:
    cut = frozenset((node, source) for node in run for source in node.all_input_nodes if _reads_rows(node, source))
    lengths = math.gcd(*(node.meta["val"].shape[0] for node in (*run, *(source for _, source in cut))))
    largest = max((node.meta["val"].numel() * node.meta["val"].element_size() for node in run), default=0)
    count = next((c for c in range(1, lengths + 1) if lengths % c == 0 and largest / c <= _TILE_NBYTES), lengths)
    if len(run) < 2 or count == 1:
        return list(run)
    inside = set(run)
    returned = {node for node in run if node in kept or any(user not in inside for user in node.users)}
    # What is read behind the run in the memory of something else is made there, of all rows.
    views = []
    for node in reversed(run):
        if node in returned and node.target in ALIAS_OPS:
            returned.remove(node)
            returned.update(source for source in node.all_input_nodes if source in inside)
            views.append(node)
    used = set(returned)
    for node in reversed(run):
        if node in used:
            used.update(node.all_input_nodes)
    nodes = tuple(node for node in run if node in used)
    return [Tiling(nodes, cut, tuple(node for node in run if node in returned), count), *reversed(views)]


def _is_rowwise(node: fx.Node) -> bool:
    """Whether each row of the result of ``node`` comes from one row of its operands, or from all of what is small."""
    if node.op != "call_function" or not is_tensor(node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    value = node.meta["val"]
    tensors = [source for source in node.all_input_nodes if is_tensor(source)]
    if len(tensors) != len(node.all_input_nodes) or not tensors or not _has_rows(value):
        return False
    if node.target is dequantize:
        return value.is_contiguous() and not any(isinstance(size, fx.Node) for size in node.args[5])  # type: ignore[union-attr]
    if node.target in _VIEWS:
        source = tensors[0].meta["val"]
        return _has_rows(source) and source.is_contiguous()
    if node.target in _ROW_REDUCTIONS:
        dims: Any = node.args[1] if len(node.args) > 1 else None
        return bool(dims) and all(dim % tensors[0].meta["val"].dim() for dim in dims)
    if node.target is aten.permute.default:
        return node.args[1][0] == 0  # type: ignore[index]
    if node.target is aten.unsqueeze.default:
        return node.args[1] != 0
    is_pointwise = torch.Tag.pointwise in node.target.tags and not node.target._schema.is_mutable
    return node.target is aten.expand.default or is_pointwise


def _has_rows(value: Tensor) -> bool:
    return value.dim() > 0 and all(isinstance(size, int) for size in value.shape) and value.shape[0] > 1


def _fits(node: fx.Node, run: Sequence[fx.Node]) -> bool:
    """Whether ``node`` may join ``run``: what it reads from there has to be read row by row, on the same parts."""
    if any(source in run and not _reads_rows(node, source) for source in node.all_input_nodes):
        return False
    # One view of the rows as more or fewer of them is enough to make parts that are too large.
    lengths = [other.meta["val"].shape[0] for other in (*run, node)]
    return math.gcd(*lengths) == min(lengths)


def _reads_rows(node: fx.Node, source: fx.Node) -> bool:
    """Whether a row of the result of ``node`` reads one row of ``source``, not all of it."""
    if node.target is dequantize:
        return False
    if node.target in _VIEWS or node.target in _ROW_REDUCTIONS:
        return True
    if node.target in (aten.permute.default, aten.unsqueeze.default):
        return True
    value, read = node.meta["val"], source.meta["val"]
    return bool(read.dim() == value.dim() and read.shape[0] == value.shape[0])


def _empty_like(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def run_graph(
    pieces: Sequence[fx.Node | Tiling],
    graph: fx.Graph,
    values: MutableMapping[fx.Node, Any],
    readers: MutableMapping[fx.Node, Any],
    evaluate: Callable[[fx.Node, Mapping[fx.Node, Any]], Any],
    kept: Container[fx.Node] = (),
) -> list[Any]:
    """The results of ``graph``, whose operators are ``pieces``.

    Args:
        pieces: From ``find_tilings``.
        graph: The graph.
        values: Its arguments. Every value leaves it when nobody reads it any more.
        readers: How to read what is stored in codes.
        evaluate: Computes an operator that is no part of a run.
        kept: What stays in ``values``.
    """
    returned = set(graph.output_node().all_input_nodes)
    last: dict[fx.Node, int] = {}
    for position, piece in enumerate(pieces):
        for node in piece.nodes if isinstance(piece, Tiling) else (piece,):
            last.update(dict.fromkeys((node, *node.all_input_nodes), position))
    expiring: dict[int, list[fx.Node]] = {}
    for node, position in last.items():
        if node not in returned and node not in kept:
            expiring.setdefault(position, []).append(node)
    for position, piece in enumerate(pieces):
        if isinstance(piece, Tiling):
            piece.run(values, readers)
        else:
            values[piece] = evaluate(piece, values)
        for node in expiring.get(position, ()):
            values.pop(node, None)
    return [values[node] if isinstance(node, fx.Node) else node for node in graph_outputs(graph)]


def call_node(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What ``node`` computes from ``values``."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    args: Any = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    name = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
    if name in RANDOM:
        return RANDOM[name](*args, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def ordered(graph: fx.Graph) -> list[fx.Node]:
    """The operators of ``graph``, every tuple directly followed by what takes it apart."""
    nodes: list[fx.Node] = []
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and node.target is not operator.getitem:
            nodes.append(node)
            nodes.extend(user for user in node.users if user.target is operator.getitem)
    return nodes
