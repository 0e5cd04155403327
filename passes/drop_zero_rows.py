"""Computes the backward of a picked row for that row alone. Lossless.

    joint:     y = f(x);  z = select(y, 1, 0);  ...
               g = select_scatter(zeros, gz, 1, 0);  gx = mul(g, x);  gw = mm(permute(view(gx)), view(h))
becomes
    joint:     ...;  g = unsqueeze(gz, 1);  gx = mul(g, slice(x, 1, 0, 1));  gw = mm(permute(view(gx)), select(h, ...))

A classifier that reads the first token alone hands the last layers a gradient whose other rows are exactly zero. What
works row by row keeps it so: its rows are computed for the picked one, and of what it reads, only these rows are saved,
or, where nothing else reads it, computed.

    1. select_scatter  into zeros starts it
    2. row by row      products with dense factors, sums and differences of such gradients, views, permutations,
                       products of matrices from the left: the same on fewer rows
    3. summed rows     sums along the rows, and products that contract them, as the gradients of weights: dense again
    4. anything else   reads what it read: zeros with the rows in their place

Never touches: what no gradient with a single row in it reaches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ._fx import call, draws_random_numbers

aten = torch.ops.aten
convert = torch.ops.prims.convert_element_type.default


@dataclass(frozen=True)
class _Row:
    """A value that is zero but for the element ``index`` of each run of ``length`` along ``dim``.

    The dimension holds ``outer`` runs one after the other; ``compact`` has one element in the place of each.
    """

    compact: fx.Node
    dim: int
    outer: int
    length: int
    index: int

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Where the elements lie."""
        return self.dim, self.outer, self.length, self.index


Rows = Mapping[fx.Node, _Row]


def drop_zero_rows(joint: fx.GraphModule) -> None:
    """Rewrites ``joint`` in place; graphs with symbolic sizes stay as they are."""
    graph = joint.graph
    rows: dict[fx.Node, _Row] = {}
    dense: dict[fx.Node, fx.Node] = {}
    starts = graph.find_nodes(op="call_function", target=aten.select_scatter.default)
    if not starts or any(_is_symbolic(node) for node in graph.nodes):
        return
    for node in list(graph.nodes):
        rule = _RULES.get(node.target)
        is_reached = node in starts or not rows.keys().isdisjoint(node.all_input_nodes)
        if rule is None or not is_reached:
            continue
        with graph.inserting_before(node):
            found = rule(node, rows)
        if isinstance(found, _Row):
            rows[node] = found
        elif found is not None:
            dense[node] = found
    for node, value in dense.items():
        node.replace_all_uses_with(value)
    for node in reversed([*rows, *dense]):
        _retire(node, rows)
    graph.lint()
    joint.recompile()


def _retire(node: fx.Node, rows: Rows) -> None:
    """Erases ``node``; what no rule took over reads zeros with the rows in their place."""
    if node.users:
        with node.graph.inserting_before(node):
            node.replace_all_uses_with(_scattered(rows[node], node.meta["val"]))
    node.graph.erase_node(node)


def _scattered(row: _Row, value: torch.Tensor) -> fx.Node:
    graph, shape = row.compact.graph, list(value.shape)
    split = [*shape[: row.dim], row.outer, row.length, *shape[row.dim + 1 :]]
    runs = [*shape[: row.dim], row.outer, *shape[row.dim + 1 :]]
    zeros = call(graph, aten.full.default, split, 0.0, dtype=value.dtype, device=value.device)
    elements = call(graph, aten.reshape.default, row.compact, runs)
    placed = call(graph, aten.select_scatter.default, zeros, elements, row.dim + 1, row.index)
    return call(graph, aten.view.default, placed, shape)


def _pick(value: fx.Node, dim: int, row: _Row, reader: fx.Node) -> fx.Node:
    """The elements of ``value`` along ``dim`` where ``row`` has its own, named as ``value`` is.

    What ``reader`` alone reads is computed for these alone: a whole derivative would be, in the forward, to save a row.
    """
    graph, tensor = value.graph, value.meta["val"]
    if _is_pointwise(value) and value.users.keys() == {reader}:
        picked = _compact(value, lambda source: _pick_operand(source, tensor.dim() - dim, row, value))
    elif row.outer == 1:
        picked = call(graph, aten.slice.Tensor, value, dim, row.index, row.index + 1)
    else:
        split = [*tensor.shape[:dim], row.outer, row.length, *tensor.shape[dim + 1 :]]
        picked = call(graph, aten.select.int, call(graph, aten.reshape.default, value, split), dim + 1, row.index)
    kept = ("nn_module_stack", "stack_trace", "fwd_nn_module_stack", "original_aten")
    picked.meta.update({name: value.meta[name] for name in kept if name in value.meta})
    return picked


def _pick_operand(source: fx.Node, from_end: int, row: _Row, reader: fx.Node) -> fx.Node:
    """``_pick`` of what ``reader`` may broadcast, along the dimension that is ``from_end`` counted from behind."""
    value = source.meta["val"]
    if value.dim() < from_end or value.shape[-from_end] == 1:
        return source
    return _pick(source, value.dim() - from_end, row, reader)


def _compact(node: fx.Node, operand: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """The call of ``node`` on what ``operand`` makes of its operands."""
    arguments: Any = fx.node.map_arg((node.args, node.kwargs), operand)
    return call(node.graph, _operator(node), *arguments[0], **arguments[1])


def _is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result needs one element of each operand, and nothing drawn at random."""
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return node.target is convert or (torch.Tag.pointwise in tags and not draws_random_numbers(node))


def _start(node: fx.Node, rows: Rows) -> _Row | None:
    arguments: Any = node.args
    base, source, dim, index = arguments
    if not isinstance(base, fx.Node) or base.target is not aten.full.default or base.args[1] != 0:
        return None
    shape = node.meta["val"].shape
    dim, index = dim % len(shape), index % shape[dim]
    return _Row(call(node.graph, aten.unsqueeze.default, source, dim), dim, 1, shape[dim], index)


def _pointwise(node: fx.Node, rows: Rows) -> _Row | None:
    """Products and quotients with dense factors; of sums, every term must be such a row."""
    given = [rows[source] for source in node.all_input_nodes if source in rows]
    first, result = given[0], node.meta["val"]
    is_alike = all(row.place == first.place for row in given)
    are_wide = all(source.meta["val"].dim() == result.dim() for source in node.all_input_nodes if source in rows)
    if not is_alike or not are_wide or not _keeps_zeros(node, rows):
        return None

    def compact(source: fx.Node) -> fx.Node:
        if source in rows:
            return rows[source].compact
        return _pick_operand(source, result.dim() - first.dim, first, node)

    return replace(first, compact=_compact(node, compact))


def _keeps_zeros(node: fx.Node, rows: Rows) -> bool:
    """Whether the result is zero wherever the rows that ``node`` reads are."""
    operands = list(node.args)
    if node.target is aten.where.self:
        return all(operand in rows or _is_zero(operand) for operand in operands[1:])
    if node.target in _SUMS:
        return all(operand in rows for operand in operands[:2])
    # Zero divided by zero is none.
    return node.target is aten.mul.Tensor or (
        operands[0] in rows and not any(operand in rows for operand in operands[1:])
    )


def _is_zero(operand: Any) -> bool:
    """Whether ``operand`` is the constant zero."""
    positions = {aten.full.default: 1, aten.scalar_tensor.default: 0}
    is_constant = isinstance(operand, fx.Node) and operand.target in positions
    return is_constant and operand.args[positions[operand.target]] == 0


def _sum(node: fx.Node, rows: Rows) -> _Row | fx.Node:
    arguments: Any = node.args
    source, dims, *rest = arguments
    row, num_dims = rows[source], source.meta["val"].dim()
    along = {dim % num_dims for dim in dims}
    summed = call(node.graph, _operator(node), row.compact, dims, *rest, **node.kwargs)
    if row.dim in along:
        return summed
    is_kept = bool(rest and rest[0])
    return replace(row, compact=summed, dim=row.dim if is_kept else row.dim - sum(dim < row.dim for dim in along))


def _view(node: fx.Node, rows: Rows) -> _Row | None:
    (source,) = node.all_input_nodes
    row, old, new = rows[source], list(source.meta["val"].shape), list(node.meta["val"].shape)
    dim, shape = row.dim, list(row.compact.meta["val"].shape)
    place: dict[str, int] = {}
    if new[: dim + 1] == old[: dim + 1]:
        shape = [*shape[: dim + 1], *new[dim + 1 :]]
    elif row.outer == 1 and dim and new == [*old[: dim - 1], old[dim - 1] * old[dim], *old[dim + 1 :]]:
        place, shape = {"dim": dim - 1, "outer": old[dim - 1]}, [*shape[:dim], *shape[dim + 1 :]]
    elif new == [*old[:dim], row.outer, row.length, *old[dim + 1 :]]:
        place, shape = {"dim": dim + 1, "outer": 1}, [*shape[: dim + 1], 1, *shape[dim + 1 :]]
    else:
        return None
    return replace(row, compact=call(node.graph, aten.reshape.default, row.compact, shape), **place)


def _permute(node: fx.Node, rows: Rows) -> _Row:
    arguments: Any = node.args
    source, dims = arguments
    row, order = rows[source], [dim % len(dims) for dim in dims]
    return replace(row, compact=call(node.graph, _operator(node), row.compact, order), dim=order.index(row.dim))


def _mm(node: fx.Node, rows: Rows) -> _Row | fx.Node | None:
    left, right = node.all_input_nodes if len(node.all_input_nodes) == 2 else (None, None)
    if left is None or right is None or (left in rows and right in rows):
        return None
    row = rows[left] if left in rows else rows[right]
    is_contracted = row.dim == (1 if left in rows else 0)
    other = right if left in rows else left
    if is_contracted:
        other = _pick(other, 0 if left in rows else 1, row, node)
    operands = (row.compact, other) if left in rows else (other, row.compact)
    product = call(node.graph, aten.mm.default, *operands)
    return product if is_contracted else replace(row, compact=product)


def _operator(node: fx.Node) -> torch._ops.OpOverload:
    assert isinstance(node.target, torch._ops.OpOverload), node
    return node.target


def _is_symbolic(node: fx.Node) -> bool:
    value = node.meta.get("val")
    sizes = value.shape if isinstance(value, torch.Tensor) else [value]
    return any(isinstance(size, torch.SymInt) for size in sizes)


_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})

# Operator -> what it makes of a row.
_RULES: Mapping[Any, Callable[[fx.Node, Rows], _Row | fx.Node | None]] = {
    aten.select_scatter.default: _start,
    **dict.fromkeys((*_SUMS, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.where.self), _pointwise),
    convert: _pointwise,
    aten.clone.default: _pointwise,
    aten.sum.dim_IntList: _sum,
    aten.view.default: _view,
    aten.permute.default: _permute,
    aten.mm.default: _mm,
}
