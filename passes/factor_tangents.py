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

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ._bounded import constant_of
from ._factor_builder import write_product
from ._factors import Factor, Product, groups_of, is_worth_it
from ._fx import is_tensor, tangent_dependent
from ._noise import Noise

aten, prims = torch.ops.aten, torch.ops.prims

# Nodes between a gradient and its product; longer ones are cut.
_MOST_STEPS = 64


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
        groups = [] if node in inner else groups_of(node, product, noise)
        if any(map(is_worth_it, groups)):
            write_product(node, product, groups)
    graph.eliminate_dead_code()
    graph.lint()
    joint.recompile()


def _products(graph: fx.Graph, dependent: set[fx.Node], stops: set[fx.Node]) -> dict[fx.Node, Product]:
    """What gradients are products of; ``stops`` are taken as they are."""
    products: dict[fx.Node, Product] = {}
    for node in graph.nodes:
        if node in dependent and node.op == "call_function" and is_tensor(node):
            found = _product(node, dependent, products, stops)
            if found is not None and len(found.steps) <= _MOST_STEPS:
                products[node] = found
    return products


def _steps_of(products: Mapping[fx.Node, Product], node: fx.Node) -> tuple[fx.Node, ...]:
    return products[node].steps if node in products else ()


def _product(
    node: fx.Node, dependent: set[fx.Node], products: Mapping[fx.Node, Product], stops: set[fx.Node]
) -> Product | None:
    """What ``node`` is, if that is a gradient of its shape and type times a factor."""
    rule, is_spread = _RULES.get(node.target), node.target in _SPREADS
    if rule is None or node.kwargs or not node.meta["val"].dtype.is_floating_point:
        return None

    def read(value: Any) -> Product | Factor | None:
        if not isinstance(value, fx.Node):
            return value if isinstance(value, int | float) else None
        if value not in dependent:
            constant = constant_of(value)
            return value if constant is None or value.meta["val"].dim() else float(constant)
        one = products.get(value)
        if not is_spread and not _is_alike(value, node):
            return _broadcast(one, node) if one is not None and value not in stops and rule is _mul else None
        return one if one is not None and value not in stops else Product(value, 1.0)

    if is_spread:
        return _spread(node, read(node.args[0]))
    operands = [read(value) for value in node.args]
    if any(value is None for value in operands) or not all(map(_fits(node), operands)):
        return None
    found = rule(*operands)
    return None if found is None else Product(found.base, found.factor, (*found.steps, node))


def _broadcast(product: Product, node: fx.Node) -> Product | None:
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


def _mul(left: Any, right: Any) -> Product | None:
    if isinstance(left, Product) == isinstance(right, Product):
        return None
    product, factor = (left, right) if isinstance(left, Product) else (right, left)
    return Product(product.base, _times(product.factor, factor), product.steps)


def _times(left: Factor, right: Factor) -> Factor:
    return right if left == 1.0 else ("mul", left, right)


def _div(left: Any, right: Any) -> Product | None:
    if not isinstance(left, Product) or isinstance(right, Product) or (not isinstance(right, fx.Node) and right == 0):
        return None
    return Product(left.base, ("div", left.factor, right), left.steps)


def _neg(value: Any) -> Product | None:
    return Product(value.base, ("neg", value.factor), value.steps) if isinstance(value, Product) else None


def _both(kind: str, left: Any, right: Any, *mask: Any) -> Product | None:
    """Of the same gradient; zero is any gradient times zero."""
    given = [value for value in (left, right) if isinstance(value, Product)]
    zeros = [value for value in (left, right) if not isinstance(value, Product)]
    if not given or any(value.base != given[0].base for value in given) or any(value != 0 for value in zeros):
        return None
    factors = [value.factor if isinstance(value, Product) else 0.0 for value in (left, right)]
    factor: Factor = (kind, *mask, *factors)
    if kind == "add":
        factor = _complement(*map(_selection, factors)) or factor
    return Product(given[0].base, factor, tuple(step for value in given for step in value.steps))


def _selection(factor: Factor) -> tuple[Any, ...] | None:
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


def _applied(kind: str, value: Factor, others: Sequence[Factor]) -> Factor:
    return _times(value, others[0]) if kind == "mul" else (kind, value, *others)


def _complement(left: tuple[Any, ...] | None, right: tuple[Any, ...] | None) -> Factor | None:
    """The sum of two selections by the same mask, each of which is zero where the other is not."""
    if left is None or right is None or left[0] is not right[0]:
        return None
    if left[1] == 0.0 == right[2]:
        left, right = right, left
    return ("where", left[0], left[1], right[2]) if left[2] == 0.0 == right[1] else None


def _spread(node: fx.Node, value: Any) -> Product | None:
    """A gradient and its factor, each repeated."""
    if not isinstance(value, Product) or value.factor == 1.0:
        return None
    found = _spread_by((node.target, *node.args[1:]), value)
    return Product(found.base, found.factor, (*found.steps, node))


def _spread_by(step: tuple[Any, ...], value: Product) -> Product:
    return Product(("spread", step, value.base), ("spread", step, value.factor), value.steps)


def _where(mask: Any, left: Any, right: Any) -> Product | None:
    return _both("where", left, right, mask) if isinstance(mask, fx.Node) else None


def _add(left: Any, right: Any) -> Product | None:
    return _both("add", left, right)


def _sub(left: Any, right: Any) -> Product | None:
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
