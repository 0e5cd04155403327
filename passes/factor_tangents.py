"""Collects what a gradient is multiplied with, one factor after the other, in one factor. Changes rounding alone.

    joint:     t = mul(g, s);  u = div(t, y);  gx = where(m, u, g)
becomes
    joint:     f = where(m, s / y, 1);  gx = mul(g, f)

What saved tensors' noise does to a gradient can be told from the whole factor: s / y may be a bounded function of x
where 1 / y has a pole, and where it is none, f is what to store, of the selected branch alone. Each of s, y and m by
itself would have noise of the size of its largest values.

    1. products     of a gradient with factors, quotients by them, negation
    2. selections   between products of the same gradient, or zero
    3. sums         and differences of products of the same gradient
    4. masks        made of the same elements as a cut: where(m, 1 / y, 0), so that what is not selected, which may be
                    as large as it likes, is never stored
    5. quotients    that stand alone: mul(g, 1 / y), so that the divisor may be stored as its inverse

Never touches: gradients that something else reads, factors computed from parameters alone, types that differ.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ._bounded import constant_of
from ._fx import call, hint, is_tensor, tangent_dependent
from ._noise import SMALLEST_GROUP, Kind, Noise

aten, prims = torch.ops.aten, torch.ops.prims

_HALVES = (torch.float16, torch.bfloat16)
# Nodes between a gradient and its product; longer ones are cut.
_MOST_STEPS = 64
# What a new node has from the one whose place it takes.
_KEPT = ("nn_module_stack", "fwd_nn_module_stack", "stack_trace", "original_aten", "recompute", "ac_graph_id")

# A factor: a node, a number, or an operator on factors.
_Factor = fx.Node | float | tuple[Any, ...]


@dataclass(frozen=True)
class _Product:
    """``base``, a node or one that is repeated, times ``factor``; ``steps`` are the nodes between."""

    base: Any
    factor: _Factor
    steps: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class _Group:
    """Factors ``over`` and divisors ``under``, made of the same elements, and zero where one of ``masks`` says so."""

    origins: frozenset[Any]
    over: list[_Factor]
    under: list[_Factor]
    masks: tuple[tuple[Any, ...], ...] = ()


def factor_tangents(joint: fx.GraphModule, noise: Noise) -> None:
    """Rewrites ``joint`` in place; ``noise`` tells what its nodes are made of."""
    graph = joint.graph
    dependent = tangent_dependent(graph)
    stops: set[fx.Node] = set()
    while True:
        products = _products(graph, dependent, stops)
        inner = {step for product in products.values() for step in product.steps[:-1]}
        # What others read is computed in any case.
        found = {node for node in inner if any(node not in _steps_of(products, user) for user in node.users)} - stops
        if not found:
            break
        stops |= found
    for node, product in products.items():
        groups = [] if node in inner else _groups(node, product, noise)
        if any(map(_is_worth_it, groups)):
            _rewrite(node, product, groups)
    graph.eliminate_dead_code()
    graph.lint()
    joint.recompile()


def _products(graph: fx.Graph, dependent: set[fx.Node], stops: set[fx.Node]) -> dict[fx.Node, _Product]:
    """What gradients are products of; ``stops`` are taken as they are."""
    products: dict[fx.Node, _Product] = {}
    for node in graph.nodes:
        if node in dependent and node.op == "call_function" and is_tensor(node):
            found = _product(node, dependent, products, stops)
            if found is not None and len(found.steps) <= _MOST_STEPS:
                products[node] = found
    return products


def _steps_of(products: Mapping[fx.Node, _Product], node: fx.Node) -> tuple[fx.Node, ...]:
    return products[node].steps if node in products else ()


def _product(
    node: fx.Node, dependent: set[fx.Node], products: Mapping[fx.Node, _Product], stops: set[fx.Node]
) -> _Product | None:
    """What ``node`` is, if that is a gradient of its shape and type times a factor."""
    rule, is_spread = _RULES.get(node.target), node.target in _SPREADS
    if rule is None or node.kwargs or not node.meta["val"].dtype.is_floating_point:
        return None

    def read(value: Any) -> _Product | _Factor | None:
        if not isinstance(value, fx.Node):
            return value if isinstance(value, int | float) else None
        if value not in dependent:
            constant = constant_of(value)
            return value if constant is None or value.meta["val"].dim() else float(constant)
        one = products.get(value)
        if not is_spread and not _is_alike(value, node):
            return _broadcast(one, node) if one is not None and value not in stops and rule is _mul else None
        return one if one is not None and value not in stops else _Product(value, 1.0)

    if is_spread:
        return _spread(node, read(node.args[0]))
    operands = [read(value) for value in node.args]
    if any(value is None for value in operands) or not all(map(_fits(node), operands)):
        return None
    found = rule(*operands)
    return None if found is None else _Product(found.base, found.factor, (*found.steps, node))


def _broadcast(product: _Product, node: fx.Node) -> _Product | None:
    """A product of fewer elements, repeated for all that ``node`` multiplies with."""
    value, result = product.steps[-1].meta["val"], node.meta["val"]
    if value.dtype != result.dtype or value.dim() != result.dim() or product.factor == 1.0:
        return None
    pairs = list(zip(value.shape, result.shape, strict=True))
    # A graph takes no symbolic size as it is; -1 leaves one as it is.
    sizes = [new if isinstance(new, int) else -1 for _, new in pairs]
    if not all(isinstance(new, int) or guard_or_false(old == new) for old, new in pairs):
        return None
    return _spread_by((aten.expand.default, sizes), product)


def _is_alike(value: fx.Node, node: fx.Node) -> bool:
    one, other = value.meta["val"], node.meta["val"]
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _fits(node: fx.Node) -> Any:
    """Whether an operand leaves type and shape of the gradient as they are."""
    result = node.meta["val"]

    def fits(operand: Any) -> bool:
        if not isinstance(operand, fx.Node):
            return True
        value = operand.meta["val"]
        # A number that depends on sizes, as the mean of a symbolic batch divides by, is no tensor.
        return is_tensor(operand) and value.dtype in (result.dtype, torch.bool) and value.device == result.device

    return fits


def _mul(left: Any, right: Any) -> _Product | None:
    if isinstance(left, _Product) == isinstance(right, _Product):
        return None
    product, factor = (left, right) if isinstance(left, _Product) else (right, left)
    return _Product(product.base, _times(product.factor, factor), product.steps)


def _times(left: _Factor, right: _Factor) -> _Factor:
    return right if left == 1.0 else ("mul", left, right)


def _div(left: Any, right: Any) -> _Product | None:
    if not isinstance(left, _Product) or isinstance(right, _Product):
        return None
    return _Product(left.base, ("div", left.factor, right), left.steps)


def _neg(value: Any) -> _Product | None:
    return _Product(value.base, ("neg", value.factor), value.steps) if isinstance(value, _Product) else None


def _both(kind: str, left: Any, right: Any, *mask: Any) -> _Product | None:
    """Of the same gradient; zero is any gradient times zero."""
    given = [value for value in (left, right) if isinstance(value, _Product)]
    zeros = [value for value in (left, right) if not isinstance(value, _Product)]
    if not given or any(value.base != given[0].base for value in given) or any(value != 0 for value in zeros):
        return None
    factors = [value.factor if isinstance(value, _Product) else 0.0 for value in (left, right)]
    factor = (kind, *mask, *factors)
    if kind == "add":
        factor = _complement(*map(_selection, factors)) or factor
    return _Product(given[0].base, factor, tuple(step for value in given for step in value.steps))


def _selection(factor: _Factor) -> tuple[Any, ...] | None:
    """What ``factor`` selects where a mask says so, and where not; one of the two is zero."""
    if not isinstance(factor, tuple):
        return None
    kind, *operands = factor
    if kind == "where":
        return tuple(operands) if 0.0 in operands[1:] else None
    found = _selection(operands[0]) if kind in ("mul", "div", "neg") else None
    if found is None:
        return None
    mask, *branches = found
    others = operands[1:]
    return mask, *(0.0 if one == 0.0 else _applied(kind, one, others) for one in branches)


def _applied(kind: str, value: _Factor, others: Sequence[_Factor]) -> _Factor:
    return _times(value, others[0]) if kind == "mul" else (kind, value, *others)


def _complement(left: tuple[Any, ...] | None, right: tuple[Any, ...] | None) -> _Factor | None:
    """The sum of two selections by the same mask, each of which is zero where the other is not."""
    if left is None or right is None or left[0] is not right[0]:
        return None
    if left[1] == 0.0 == right[2]:
        left, right = right, left
    return ("where", left[0], left[1], right[2]) if left[2] == 0.0 == right[1] else None


def _spread(node: fx.Node, value: Any) -> _Product | None:
    """A gradient and its factor, each repeated."""
    if not isinstance(value, _Product) or value.factor == 1.0:
        return None
    found = _spread_by((node.target, *node.args[1:]), value)
    return _Product(found.base, found.factor, (*found.steps, node))


def _spread_by(step: tuple[Any, ...], value: _Product) -> _Product:
    return _Product(("spread", step, value.base), ("spread", step, value.factor), value.steps)


def _where(mask: Any, left: Any, right: Any) -> _Product | None:
    return _both("where", left, right, mask) if isinstance(mask, fx.Node) else None


def _add(left: Any, right: Any) -> _Product | None:
    return _both("add", left, right)


def _sub(left: Any, right: Any) -> _Product | None:
    return _both("sub", left, right)


# Operators that repeat a gradient for all that a reduction read.
_SPREADS = frozenset({aten.unsqueeze.default, aten.expand.default})

# Operator -> what it makes of products of a gradient.
_RULES: Mapping[Any, Any] = {
    **dict.fromkeys(_SPREADS, _spread),
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.div.Tensor: _div,
    aten.div.Scalar: _div,
    aten.neg.default: _neg,
    aten.where.self: _where,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
}


def _parts(factor: _Factor) -> set[fx.Node]:
    """What ``factor`` is made of, masks left out."""
    if isinstance(factor, fx.Node):
        return set() if factor.meta["val"].dtype == torch.bool else {factor}
    if isinstance(factor, tuple) and factor[0] == "spread":
        return _parts(factor[2])
    return set().union(*map(_parts, factor[1:])) if isinstance(factor, tuple) else set()


def _is_worth_it(group: _Group) -> bool:
    """Whether there is more to a factor than one value as it was computed."""
    if not group.origins:
        return False
    pieces = [*group.over, *group.under]
    return (
        bool(group.under or group.masks)
        or len(pieces) > 1
        or any(isinstance(piece, tuple) and _has_choice(piece) for piece in pieces)
    )


def _has_choice(factor: _Factor) -> bool:
    """Whether it has a divisor, is a sum, or selects more than a mask's zero."""
    if not isinstance(factor, tuple):
        return False
    kind, *operands = factor
    if kind == "spread":
        return _has_choice(operands[1])
    is_one = kind in ("add", "sub", "div") or (kind == "where" and 0.0 not in operands[1:])
    return is_one or any(map(_has_choice, operands))


def _groups(node: fx.Node, product: _Product, noise: Noise) -> list[_Group]:
    """The factors of a product, in groups that are made of different elements; one group is exact."""
    over: list[_Factor] = []
    under: list[_Factor] = []
    _flatten(product.factor, over, under)
    masks = [piece for piece in over if _is_mask(piece)]
    over = [piece for piece in over if not _is_mask(piece)]
    groups = [_Group(frozenset(), [], [])]
    for piece, is_over in [*((piece, True) for piece in over), *((piece, False) for piece in under)]:
        origins = frozenset().union(*(noise.origins(part) for part in _parts(piece)))
        group = _Group(origins, [piece], []) if is_over else _Group(origins, [], [piece])
        alike = [one for one in groups if (one.origins & origins) or (not origins and not one.origins)]
        groups = [one for one in groups if one not in alike] + [_merged([*alike, group])]
    for mask in masks:
        groups = _masked(groups, mask, noise)
    exact = [group for group in groups if not group.origins]
    noisy = [group for group in groups if group.origins]
    if noisy and any(_is_of_short_rows(node, piece) for group in noisy for piece in group.over):
        noisy = [_merged(noisy)]
    return [*exact, *noisy]


def _is_mask(piece: _Factor) -> bool:
    """Whether it is a number where a mask says so, and zero elsewhere."""
    if not isinstance(piece, tuple) or piece[0] != "where":
        return False
    return 0.0 in piece[2:] and all(isinstance(value, int | float) for value in piece[2:])


def _masked(groups: Sequence[_Group], mask: tuple[Any, ...], noise: Noise) -> list[_Group]:
    """``groups``, of which those with a cut made of what ``mask`` is made of select; else it is a factor as others."""
    _, condition, left, right = mask
    origins = noise.origins(condition)
    alike = [
        group
        for group in groups
        if group.origins & origins and (group.under or any(noise.kind(root) is Kind.CUT for root, _ in group.origins))
    ]
    ones = ("where", condition, float(left != 0), float(right != 0))
    rest = left + right if alike else mask
    return [
        replace(group, masks=(*group.masks, ones))
        if group in alike
        else (group if group.origins or rest == 1.0 else replace(group, over=[*group.over, rest]))
        for group in groups
    ]


def _merged(groups: Sequence[_Group]) -> _Group:
    return _Group(
        frozenset().union(*(group.origins for group in groups)),
        [piece for group in groups for piece in group.over],
        [piece for group in groups for piece in group.under],
        tuple(mask for group in groups for mask in group.masks),
    )


def _is_of_short_rows(node: fx.Node, piece: _Factor) -> bool:
    """Whether a factor is one for each row, and groups cannot end where rows do."""
    if not isinstance(piece, tuple) or piece[0] != "spread":
        return False
    numel = max((hint(part.meta["val"].numel()) for part in _parts(piece)), default=0)
    length = hint(node.meta["val"].numel()) // max(1, numel)
    return length > 1 and length % SMALLEST_GROUP != 0


def _flatten(factor: _Factor, over: list[_Factor], under: list[_Factor]) -> None:
    if isinstance(factor, tuple) and factor[0] == "mul":
        _flatten(factor[1], over, under)
        _flatten(factor[2], over, under)
    elif isinstance(factor, tuple) and factor[0] == "div":
        _flatten(factor[1], over, under)
        _flatten(factor[2], under, over)
    elif isinstance(factor, tuple) and factor[0] == "neg":
        _flatten(factor[1], over, under)
        over.append(-1.0)
    elif factor != 1.0:
        over.append(factor)


def _rewrite(node: fx.Node, product: _Product, groups: Sequence[_Group]) -> None:
    """Puts base times factors in the place of ``node``. Quotients of half-precision numbers are computed in float32."""
    graph, dtype = node.graph, node.meta["val"].dtype
    precision = torch.float32 if dtype in _HALVES and any(group.under for group in groups) else dtype
    with graph.inserting_before(node):
        build = _Builder(node, precision)
        result = build.factor(product.base) if isinstance(product.base, tuple) else product.base
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
class _Builder:
    """Writes factors in front of ``node``, computed in ``precision``."""

    node: fx.Node
    precision: torch.dtype

    def call(self, target: Any, *args: Any) -> fx.Node:
        """One operator."""
        made = call(self.node.graph, target, *args)
        made.meta.update({name: self.node.meta[name] for name in _KEPT if name in self.node.meta})
        return made

    def product(self, group: _Group) -> fx.Node | float:
        """The value of ``group``."""
        over = self._multiplied(group.over)
        value = over if not group.under else self._divided(over, self._multiplied(group.under))
        for _, condition, left, _ in group.masks:
            branches = [self._tensor(value), self._tensor(0.0)]
            value = self.call(aten.where.self, condition, *(branches if left else branches[::-1]))
        return value

    def _multiplied(self, factors: Sequence[_Factor]) -> fx.Node | float:
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

    def factor(self, factor: _Factor) -> fx.Node | float:
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
            left, right = (*given, 1.0)[:2]
            return {
                "div": left / right,
                "mul": left * right,
                "add": left + right,
                "sub": left - right,
                "neg": -left,
            }.get(kind, left)
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
