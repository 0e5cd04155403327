"""Finds factors of a gradient that are divided by again what they are made of, with a sum between.

    out = cumprod(x);  ...;  t = mul(g, out);  s = cumsum(t);  gx = div(s, x)

Where x is near zero, so is out, and their quotient is not. Of noise in out, nothing is near zero.
"""

from collections.abc import Callable, Container, Iterable, Iterator

import torch
from torch import fx

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
    above: Callable[[fx.Node], Container[fx.Node]],
) -> set[fx.Node]:
    """Noisy nodes that gradients are multiplied with above a quotient by what these were computed from.

    Args:
        nodes: Of a joint graph, in order.
        dependent: What a tangent reaches.
        is_noisy: Whether a node may carry noise.
        divisors: What a factor has a pole in, the nearest first; nothing where it has none.
        above: A node, and the noisy ones that it is computed from.
    """
    found: set[fx.Node] = set()
    for node in nodes:
        if node in dependent and node.target in (aten.mul.Tensor, aten.div.Tensor):
            roots = {root for value in _noisy(node, dependent, is_noisy) for root in _roots(node, value, divisors)}
            if roots:
                factors = set(_factors_above(node, dependent, is_noisy))
                found |= {factor for factor in factors if any(root in above(factor) for root in roots)}
    return found


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
