"""Writes products of gradients and factors into a graph."""

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ._factors import Factor, Group, Product
from ._fx import call

aten, prims = torch.ops.aten, torch.ops.prims

_HALVES = (torch.float16, torch.bfloat16)
# What a new node has from the one whose place it takes.
_KEPT = ("nn_module_stack", "fwd_nn_module_stack", "stack_trace", "original_aten", "recompute", "ac_graph_id")


def write_product(node: fx.Node, product: Product, groups: Sequence[Group]) -> None:
    """Puts base times factors in the place of ``node``. Quotients of half-precision numbers are computed in float32."""
    graph, dtype = node.graph, node.meta["val"].dtype
    precision = torch.float32 if dtype in _HALVES and any(group.under for group in groups) else dtype
    with graph.inserting_before(node):
        build = Builder(node, precision)
        result: Any = build.factor(product.base) if isinstance(product.base, tuple) else product.base
        if precision is not dtype:
            result = build.call(prims.convert_element_type.default, result, precision)
        for group in groups:
            factor = build.product(group)
            if factor != 1.0:
                result = build.call(aten.mul.Tensor, result, factor)
        if precision is not dtype:
            result = build.call(prims.convert_element_type.default, result, dtype)
    result.meta = {**node.meta, "val": result.meta["val"], "eager_input_vals": result.meta["eager_input_vals"]}
    node.replace_all_uses_with(result)


@dataclass(frozen=True)
class Builder:
    """Writes factors in front of ``node``, computed in ``precision``."""

    node: fx.Node
    precision: torch.dtype

    def call(self, target: Any, *args: Any) -> fx.Node:
        """One operator."""
        made = call(self.node.graph, target, *args)
        made.meta.update({name: self.node.meta[name] for name in _KEPT if name in self.node.meta})
        return made

    def product(self, group: Group) -> fx.Node | float:
        """The value of ``group``."""
        over = self._multiplied(group.over)
        value = over if not group.under else self._divided(over, self._multiplied(group.under))
        for _, condition, left, _ in group.masks:
            branches = [self._tensor(value), self._tensor(0.0)]
            value = self.call(aten.where.self, condition, *(branches if left else branches[::-1]))
        return value

    def _multiplied(self, factors: Sequence[Factor]) -> fx.Node | float:
        number = math.prod(factor for factor in factors if isinstance(factor, int | float))
        nodes = [self.factor(factor) for factor in factors if not isinstance(factor, int | float)]
        result: fx.Node | float = (
            functools.reduce(lambda a, b: self.call(aten.mul.Tensor, a, b), nodes) if nodes else number
        )
        return self.call(aten.mul.Tensor, result, number) if nodes and number != 1 else result

    def _divided(self, over: fx.Node | float, under: fx.Node | float) -> fx.Node | float:
        if not isinstance(under, fx.Node):
            return self.call(aten.div.Tensor, over, under) if isinstance(over, fx.Node) else over / under
        if isinstance(over, fx.Node):
            return self.call(aten.div.Tensor, over, under)
        inverse = self.call(aten.reciprocal.default, under)
        return inverse if over == 1 else self.call(aten.mul.Tensor, inverse, over)

    def factor(self, factor: Factor) -> fx.Node | float:
        """The value of ``factor``."""
        if isinstance(factor, fx.Node):
            if factor.meta["val"].dtype in (torch.bool, self.precision):
                return factor
            return self.call(prims.convert_element_type.default, factor, self.precision)
        if not isinstance(factor, tuple):
            return float(factor)
        kind, *operands = factor
        if kind == "spread":
            (target, *args), value = operands
            inner = self.factor(value)
            return self.call(target, inner, *args) if isinstance(inner, fx.Node) else inner
        given = [self.factor(operand) for operand in operands]
        if kind == "where":
            given[1:] = [self._tensor(value) for value in given[1:]]
        elif kind in ("mul", "add") and not isinstance(given[0], fx.Node):
            given.reverse()
        if not any(isinstance(value, fx.Node) for value in given):
            return float(_NUMBERS[kind](*given))
        if kind == "div":
            return self._divided(given[0], given[1])
        if kind == "sub" and not isinstance(given[0], fx.Node):
            return self.call(aten.rsub.Scalar, given[1], given[0])
        return self.call(_OPERATORS[kind], *given)

    def _tensor(self, value: fx.Node | float) -> fx.Node:
        if isinstance(value, fx.Node):
            return value
        device = self.node.meta["val"].device
        return call(self.node.graph, aten.scalar_tensor.default, value, dtype=self.precision, device=device)


_OPERATORS: Mapping[str, Any] = {
    "mul": aten.mul.Tensor,
    "neg": aten.neg.default,
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "where": aten.where.self,
}

_NUMBERS: Mapping[str, Any] = {
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "add": operator.add,
    "sub": operator.sub,
}
