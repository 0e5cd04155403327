"""Interprets a graph with runs of pointwise operators taken a few rows at a time.

An interpreter gives every operator's result memory of its own; compiled code keeps what lies between two pointwise
operators in registers. Here, consecutive operators that treat the rows of their operands one by one

    a [R, ...] -> b = f(a) [R, ...] -> c = g(b, a) [R, ...] -> s = sum(c) [...]

run for a part of the rows after the other, so that of b and c, which nobody else reads, only a part is there at a time.
Codes are decoded a part at a time, too, and what several runs compute from codes, each computes for itself. Results
are the same but for the order of sums; the bytes come close to those of compiled code.
"""

import functools
import math
import operator
from collections.abc import Callable, Container, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ._rowwise import VIEWS, Run, find_runs, is_sum
from ._seeded import RANDOM
from ._slices import Part, decode
from ._torch import num_in_memory
from .passes._views import ALIAS_OPS
from .passes.place_codecs import DECODERS

aten = torch.ops.aten

# Bytes of the largest tensor of a run that are worked on at a time.
_TILE_NBYTES = 2**20

_IN_PLACE: Mapping[Any, Callable[..., Tensor]] = {aten.scatter_add.default: aten.scatter_add_.default}

# Operators whose bodies for interpreters take many times the memory of what they read; they treat samples one by one.
_BY_SAMPLES = frozenset({"prims::_low_memory_max_pool_with_offsets", "prims::_low_memory_max_pool_offsets_to_indices"})
# Bytes that these take for each element that they read.
_SPREAD = 64


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

    def run(
        self,
        values: MutableMapping[fx.Node, Any],
        readers: MutableMapping[fx.Node, Any] | None,
        expiring: Iterable[fx.Node] = (),
    ) -> None:
        """Computes what is returned, and notes how to read what is decoded.

        One result takes the memory of an ``expiring`` value, which nobody reads behind the run, where it can.
        """
        readers = {} if readers is None else readers
        for node in self.nodes:
            if node.target in DECODERS and node not in readers:
                readers[node] = functools.partial(node.target, *fx.node.map_arg(node.args, values.__getitem__))
        written, memory = self._reused(values, expiring) or (None, None)
        # Last of its rows: the others may be views of what lay there.
        order = [*(node for node in self.returned if node is not written), *([written] if written else [])]
        results = {node: memory if memory is not None and node is written else _start(node) for node in order}
        for index in range(self.count):
            part = Part(index, 1, self.count)
            tile: dict[fx.Node, Any] = {}
            for node in self.nodes:
                tile[node] = self._value(node, part, tile, values, readers)
            for node, result in results.items():
                if is_sum(node):
                    result += tile[node]
                else:
                    result[part.rows(len(result))] = tile[node]
        values.update({node: result.to(node.meta["val"].dtype) for node, result in results.items()})

    def _reused(self, values: Mapping[fx.Node, Any], expiring: Iterable[fx.Node]) -> tuple[fx.Node, Tensor] | None:
        """A result, and the memory of a value that is as large and read row by row, and that nothing else lies in."""
        for source in expiring:
            value = values.get(source)
            reads = {(node, source) for node in self.nodes if source in node.all_input_nodes}
            if source.op != "call_function" or not isinstance(value, Tensor) or not reads <= self.cut:
                continue
            for node in self.returned:
                result = node.meta["val"]
                is_alike = result.dtype == value.dtype and result.numel() == value.numel() and not is_sum(node)
                if is_alike and result.is_contiguous() and value.is_contiguous() and _is_alone(value):
                    return node, value.view(result.shape)
        return None

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
        if node.target in VIEWS or node.target is aten.expand.default:
            shape = [node.meta["val"].shape[0] // self.count, *node.meta["val"].shape[1:]]
            return args[0].reshape(shape) if node.target in VIEWS else args[0].expand(shape)
        return node.target(*args, **fx.node.map_arg(node.kwargs, read))  # type: ignore[operator]


def _is_alone(value: Tensor) -> bool:
    """Whether ``value`` fills its memory, and no other tensor lies there."""
    return value.untyped_storage().nbytes() == value.nbytes and num_in_memory(value) == 1


def _start(node: fx.Node) -> Tensor:
    """Memory for the result of ``node``; sums add up in fp32 at least."""
    value = node.meta["val"]
    if is_sum(node):
        return torch.zeros(
            value.shape, dtype=torch.promote_types(value.dtype, torch.float32), device=value.device
        ).as_strided(value.shape, value.stride())
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


def find_tilings(
    nodes: Sequence[fx.Node], whole: Container[fx.Node] = (), kept: Container[fx.Node] = ()
) -> list[fx.Node | Tiling]:
    """``nodes`` in their order, with runs that are worth it taken together.

    Args:
        nodes: The operators of a graph.
        whole: Those that are part of no run.
        kept: Those that are read after the graph has run.
    """
    runs = find_runs(nodes, whole, lambda run: _count(run) > 1)
    known = {node: run for run in runs for node in run.own}
    pieces: list[fx.Node | Tiling] = []
    for node in nodes:
        run = known.get(node)
        if run is None:
            pieces.append(node)
        elif node is run.own[-1]:
            pieces.extend(_tiled(run, known, kept))
    return pieces


def _tiled(run: Run, known: Mapping[fx.Node, Run], kept: Container[fx.Node]) -> list[fx.Node | Tiling]:
    """The run, and behind it the views of its results that others read."""

    def is_read(node: fx.Node) -> bool:
        readers = [known.get(user) for user in node.users]
        return node in kept or any(reader is None or node not in reader.nodes for reader in readers)

    returned = {node for node in run.own if is_read(node)}
    views = []
    for node in reversed(run.own):
        if node in returned and node.target in ALIAS_OPS:
            returned.remove(node)
            returned.update(source for source in node.all_input_nodes if source in run.own)
            views.append(node)
    used = set(returned)
    for node in reversed(run.nodes):
        if node in used:
            used.update(node.all_input_nodes)
    nodes = tuple(node for node in run.nodes if node in used)
    tiling = Tiling(nodes, run.cut, tuple(node for node in run.own if node in returned), _count(run))
    return [*([tiling] if returned else []), *reversed(views)]


def _count(run: Run) -> int:
    """Into how many parts the rows are cut: as few as make them small."""
    rows = [node.meta["val"].shape[0] for node in run.nodes if not is_sum(node)]
    rows += [source.meta["val"].shape[0] for _, source in run.cut]
    largest = max(source.meta["val"].numel() * source.meta["val"].element_size() for source in run.nodes)
    lengths = math.gcd(*rows)
    return next((c for c in range(1, lengths + 1) if lengths % c == 0 and largest / c <= _TILE_NBYTES), lengths)


def run_graph(
    pieces: Sequence[fx.Node | Tiling],
    results: Sequence[Any],
    values: MutableMapping[fx.Node, Any],
    readers: MutableMapping[fx.Node, Any] | None,
    evaluate: Callable[[fx.Node, Mapping[fx.Node, Any]], Any],
    kept: MutableMapping[fx.Node, Any] | None = None,
    keep: Callable[[Any], Any] = lambda value: value,
) -> list[Any]:
    """The values of ``results``.

    Args:
        pieces: From ``find_tilings``: the operators that compute them.
        results: Nodes, or what is returned as it is.
        values: Arguments of the graph. Every value leaves it when nobody reads it any more.
        readers: How to read what is stored in codes; what is missing is noted, unless there is none.
        evaluate: Computes an operator that is no part of a run.
        kept: Takes the values of its nodes, once nobody reads them any more.
        keep: What it takes of a value.
    """
    kept = {} if kept is None else kept
    returned = {node for node in results if isinstance(node, fx.Node)}
    last: dict[fx.Node, int] = {}
    for position, piece in enumerate(pieces):
        for node in piece.nodes if isinstance(piece, Tiling) else (piece,):
            last.update(dict.fromkeys((node, *node.all_input_nodes), position))
    expiring: dict[int, list[fx.Node]] = {}
    for node, position in last.items():
        if node not in returned or node in kept:
            expiring.setdefault(position, []).append(node)
    for position, piece in enumerate(pieces):
        if isinstance(piece, Tiling):
            unread = [node for node in expiring.get(position, ()) if node not in returned and node not in kept]
            piece.run(values, readers, unread)
        elif _writes_in_place(piece) and piece.args[0] not in kept:
            args = fx.node.map_arg(piece.args, values.__getitem__)
            values[piece] = _IN_PLACE[piece.target](*args)  # type: ignore[index, misc]
        else:
            values[piece] = evaluate(piece, values)
        for node in expiring.get(position, ()):
            if node in kept:
                kept[node] = keep(values[node])
            if node not in returned:
                values.pop(node, None)
    return [values[node] if isinstance(node, fx.Node) else node for node in results]


def _writes_in_place(node: fx.Node) -> bool:
    """Whether ``node`` writes into a copy of a constant that nobody else reads, and may do without the copy."""
    if node.target not in _IN_PLACE:
        return False
    target = node.args[0]
    return isinstance(target, fx.Node) and target.target is aten.full.default and len(target.users) == 1


def call_node(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What ``node`` computes from ``values``."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    args: Any = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    if name in _BY_SAMPLES:
        num_samples = max(1, len(args[0]) * _TILE_NBYTES // (_SPREAD * args[0].numel()))
        parts = [node.target(part, *args[1:], **kwargs) for part in args[0].split(num_samples)]  # type: ignore[operator]
        is_tuple = isinstance(parts[0], tuple)
        return tuple(map(torch.cat, zip(*parts, strict=True))) if is_tuple else torch.cat(parts)
    if node.target is aten.view.default:
        # Kernels may return other strides than those that were traced: attention's backward of cuDNN does.
        return args[0].reshape(args[1])
    if name in RANDOM:
        return RANDOM[name](*args, **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def ordered(graph: fx.Graph) -> list[fx.Node]:
    """The operators of ``graph``, every tuple directly followed by what takes it apart."""
    nodes: list[fx.Node] = []
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and node.target is not operator.getitem:
            pending = [node]
            while pending:
                current = pending.pop(0)
                nodes.append(current)
                pending.extend(user for user in current.users if user.target is operator.getitem)
    return nodes
