"""Runs of operators that treat the rows of their operands (what has one index in the first dimension) one by one."""

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from .passes._fx import is_tensor
from .passes.place_codecs import DECODERS

aten = torch.ops.aten

VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_REDUCTIONS = frozenset({aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.mean.dim})
_REARRANGING = frozenset({aten.permute.default, aten.unsqueeze.default})

# Operators that a run repeats, at most, to have what an earlier run computed from codes.
_MAX_REPEATED = 16


@dataclass(frozen=True)
class Run:
    """Consecutive operators of a graph, ``own``, and those of earlier runs that are repeated for them."""

    own: tuple[fx.Node, ...]
    repeated: tuple[fx.Node, ...] = ()

    @cached_property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All that the run computes, in the order of the graph."""
        return (*self.repeated, *self.own)

    @cached_property
    def cut(self) -> frozenset[tuple[fx.Node, fx.Node]]:
        """(operator, operand) pairs whose operand is read row by row."""
        return frozenset(
            (node, source) for node in self.nodes for source in node.all_input_nodes if reads_rows(node, source)
        )


def find_runs(nodes: Sequence[fx.Node], whole: Container[fx.Node], is_worth_it: Callable[[Run], bool]) -> list[Run]:
    """Runs of more than one of ``nodes`` that are worth it, none of them with one of ``whole``."""
    groups: list[list[fx.Node]] = [[]]
    for node in nodes:
        if node in whole or not (is_rowwise(node) or is_sum(node)):
            groups.append([])
            continue
        if not _fits(node, groups[-1]):
            groups.append([])
        groups[-1].append(node)
    runs = [Run(tuple(group)) for group in groups if len(group) > 1]
    runs = [run for run in runs if is_worth_it(run)]
    taken = {node for run in runs for node in run.own}
    order = {node: position for position, node in enumerate(nodes)}
    return [Run(run.own, tuple(sorted(_repeated(run, taken), key=order.__getitem__))) for run in runs]


def _repeated(run: Run, taken: Container[fx.Node]) -> set[fx.Node]:
    """What ``run`` reads of earlier runs and can compute from codes, with all that this takes."""
    repeated: set[fx.Node] = set()
    for _, source in run.cut:
        if source not in run.own and all(user in taken for user in source.users):
            chain = _chain(source, taken)
            if chain is not None and _same_rows((*chain, *run.own)):
                repeated |= chain
    return repeated


def _chain(end: fx.Node, taken: Container[fx.Node]) -> set[fx.Node] | None:
    """Operators that compute ``end`` row by row from codes; None when there are none, or too many."""
    chain: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node not in taken or node.target in _REDUCTIONS or len(chain) == _MAX_REPEATED:
            return None
        chain.add(node)
        pending.extend(source for source in node.all_input_nodes if reads_rows(node, source) and source not in chain)
    return chain


def is_sum(node: fx.Node) -> bool:
    """Whether ``node`` adds up the rows of its operand, and maybe more."""
    if node.target is not aten.sum.dim_IntList or not node.meta["val"].is_floating_point():
        return False
    source = node.all_input_nodes[0].meta["val"]
    dims: Any = node.args[1]
    return _has_rows(source) and any(dim % source.dim() == 0 for dim in dims or ())


def is_rowwise(node: fx.Node) -> bool:
    """Whether each row of the result of ``node`` comes from one row of its operands, or from all of what is small."""
    if node.op != "call_function" or not is_tensor(node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    value, sources = node.meta["val"], node.all_input_nodes
    if not sources or not all(map(is_tensor, sources)) or not _has_rows(value):
        return False
    source = sources[0].meta["val"]
    if node.target in DECODERS:
        return bool(value.is_contiguous())
    if node.target in VIEWS:
        return _has_rows(source) and bool(source.is_contiguous())
    if node.target in _REDUCTIONS:
        dims: Any = node.args[1] if len(node.args) > 1 else None
        return bool(dims) and all(dim % source.dim() for dim in dims)
    if node.target is aten.permute.default:
        return bool(node.args[1][0] == 0)  # type: ignore[index]
    if node.target is aten.unsqueeze.default:
        return bool(node.args[1] != 0)
    is_pointwise = torch.Tag.pointwise in node.target.tags and not node.target._schema.is_mutable
    return node.target is aten.expand.default or is_pointwise


def reads_rows(node: fx.Node, source: fx.Node) -> bool:
    """Whether a row of the result of ``node`` reads one row of ``source``, not all of it."""
    if node.target in DECODERS:
        return False
    if node.target in VIEWS or node.target in _REDUCTIONS or node.target in _REARRANGING:
        return True
    value, read = node.meta["val"], source.meta["val"]
    return bool(read.dim() == value.dim() and read.shape[0] == value.shape[0])


def _has_rows(value: Tensor) -> bool:
    return value.dim() > 0 and all(isinstance(size, int) for size in value.shape) and value.shape[0] > 1


def _fits(node: fx.Node, run: Sequence[fx.Node]) -> bool:
    """Whether ``node`` may join ``run``: what it reads from there has to be read row by row, on the same parts."""
    if any(source in run and (is_sum(source) or not reads_rows(node, source)) for source in node.all_input_nodes):
        return False
    return _same_rows((*run, node))


def _same_rows(nodes: Sequence[fx.Node]) -> bool:
    """Whether the rows of all are parts of those of the one with the fewest, so that small parts fit all."""
    lengths = [(node.all_input_nodes[0] if is_sum(node) else node).meta["val"].shape[0] for node in nodes]
    return math.gcd(*lengths) == min(lengths)
