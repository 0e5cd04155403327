"""Finds factors of a gradient that are divided by again what they are made of, with a sum between.

    out = cumprod(x);  ...;  t = mul(g, out);  s = cumsum(t);  gx = div(s, x)

Where x is near zero, so is out, and their quotient is not. Of noise in out, nothing is near zero. A sum with anything
else, exp(x), or what a matrix product or a normalization makes of x is no factor of this kind: it is not near zero
where x is.
"""

import itertools
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ._bounded import constant_of
from .held import is_product

aten = torch.ops.aten

# Nodes to look through above a quotient.
_MOST_STEPS = 64

Roots = Callable[[fx.Node], Iterable[fx.Node]]


def cancelled_factors(
    nodes: Iterable[fx.Node],
    dependent: Container[fx.Node],
    is_noisy: Callable[[fx.Node], bool],
    divisors: Roots,
    is_pointwise: Callable[[fx.Node], bool],
) -> set[fx.Node]:
    """Noisy nodes that gradients are multiplied with above a quotient by what these are near zero with.

    Args:
        nodes: Of a joint graph, in order.
        dependent: What a tangent reaches.
        is_noisy: Whether a node may carry noise.
        divisors: What a factor has a pole in, the nearest first; nothing where it has none.
        is_pointwise: Whether an operator works on one element after the other.
    """
    found, nodes = set[fx.Node](), list(nodes)
    small: dict[fx.Node, set[fx.Node]] = {}
    for node in nodes:
        if node in dependent and node.target in (aten.mul.Tensor, aten.div.Tensor):
            roots = {root for value in _noisy(node, dependent, is_noisy) for root in _roots(node, value, divisors)}
            if roots:
                for root in roots - small.keys():
                    small[root] = _small_with(root, nodes, is_noisy, is_pointwise)
                found |= set().union(*(small[root] for root in roots)) & set(_factors_above(node, dependent, is_noisy))
    return found


def _small_with(
    root: fx.Node,
    nodes: Iterable[fx.Node],
    is_noisy: Callable[[fx.Node], bool],
    is_pointwise: Callable[[fx.Node], bool],
) -> set[fx.Node]:
    """``root``, and those of ``nodes`` that are zero where it is; of operators on more than single elements, all."""
    small = {root}
    for node in nodes:
        if small.isdisjoint(node.all_input_nodes) or not is_noisy(node) or is_product(node):
            continue
        if not is_pointwise(node) or _yields_zero(node, small):
            small.add(node)
    return small


def _yields_zero(node: fx.Node, zeros: Container[fx.Node]) -> bool:
    """Whether a pointwise operator makes nothing of ``zeros``, whatever its masks say; of the others, one."""
    masks = [value for value in node.all_input_nodes if _dtype(value) is torch.bool]

    def is_zero(chosen: tuple[bool, ...]) -> bool:
        choices = dict(zip(masks, chosen, strict=True))

        def given(value: fx.Node) -> Any:
            if not isinstance(value.meta["val"], torch.Tensor):
                return 1
            constant = constant_of(value)
            number = choices.get(value, 0 if value in zeros else 1 if constant is None else constant)
            return torch.tensor(number, dtype=_dtype(value))

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), given)
        try:
            return not bool(node.target(*args, **kwargs))  # type: ignore[operator]
        except (RuntimeError, TypeError, NotImplementedError):
            # It takes no single numbers, or none of this type.
            return True

    with unset_fake_temporarily(), torch.no_grad():
        return any(map(is_zero, itertools.product((True, False), repeat=len(masks))))


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _roots(node: fx.Node, value: fx.Node, divisors: Roots) -> Iterable[fx.Node]:
    return divisors(value) if node.target is aten.mul.Tensor else (value,) if value is node.args[1] else ()


def _noisy(node: fx.Node, dependent: Container[fx.Node], is_noisy: Callable[[fx.Node], bool]) -> Iterator[fx.Node]:
    return (value for value in node.all_input_nodes if value not in dependent and is_noisy(value))


def _factors_above(
    node: fx.Node, dependent: Container[fx.Node], is_noisy: Callable[[fx.Node], bool]
) -> Iterator[fx.Node]:
    """What the gradient that ``node`` reads was multiplied with, since the matrix product before."""
    pending, seen = [value for value in node.all_input_nodes if value in dependent], set[fx.Node]()
    while pending and len(seen) < _MOST_STEPS:
        current = pending.pop()
        if current in seen or is_product(current):
            continue
        seen.add(current)
        if current.target is aten.mul.Tensor:
            yield from _noisy(current, dependent, is_noisy)
        pending.extend(value for value in current.all_input_nodes if value in dependent)
