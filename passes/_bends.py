"""Finds where gradients pass functions that are not linear in them, though a backward as a whole is.

    glog = log(g);  a = sub(glog, result);  b = logcumsumexp(a);  c = add(b, x);  gx = exp(c)

Noise in ``result`` or ``x`` enters a sum, and leaves it through an exponential function.
"""

from collections.abc import Callable, Container, Sequence

from torch import fx

from ._noise_rules import LINEAR, PRODUCTS
from .held import is_product

# Operators that are not linear in what they read, beside pointwise ones.
_OTHERS = ("logcumsumexp", "logsumexp", "amax", "amin", "prod", "cumprod", "cummax", "cummin")


def between_bends(
    nodes: Sequence[fx.Node], dependent: Container[fx.Node], is_pointwise: Callable[[fx.Node], bool]
) -> set[fx.Node]:
    """Those of ``nodes`` that gradients reach through one such function, and leave through another; these, too.

    A matrix product ends such a stretch.

    Args:
        nodes: Of a joint graph or a backward, in order.
        dependent: What a tangent reaches.
        is_pointwise: Whether a node computes element by element.
    """
    bends = {node for node in nodes if node in dependent and _bends(node, dependent, is_pointwise)}
    if not bends:
        return set()
    below, above = set(bends), set(bends)
    for node in nodes:
        if node in dependent and not is_product(node) and not below.isdisjoint(node.all_input_nodes):
            below.add(node)
    for node in reversed(nodes):
        if node in above and not is_product(node):
            above.update(value for value in node.all_input_nodes if value in dependent)
    return below & above


def _bends(node: fx.Node, dependent: Container[fx.Node], is_pointwise: Callable[[fx.Node], bool]) -> bool:
    if node.op != "call_function":
        return False
    positions = [position for position, value in enumerate(node.args) if _is_in(value, dependent)]
    if not positions:
        return False
    name = str(node.target)
    if name in LINEAR:
        return not set(positions) <= set(LINEAR[name]) or set(PRODUCTS.get(name, (-1,))) <= set(positions)
    return is_pointwise(node) or name.removeprefix("aten.").split(".")[0] in _OTHERS


def _is_in(value: object, dependent: Container[fx.Node]) -> bool:
    return isinstance(value, fx.Node) and value in dependent
