"""Which products of a backward graph are gradients of weights, and of which saved tensor.

    mm(permute(g), x)              [N, M] x [M, K]: a layer that keeps its weight as [N, K], with or without a bias
    mm(permute(x), g)              [K, M] x [M, N]: one that keeps it as [K, N]
    bmm(permute(g), x)             the same with one batch, as einsum writes it
    sum(bmm(permute(g), x), [0])   the same for each sample and then summed, as a batched product with expanded weights
                                   writes it: nothing needs the gradients of the samples
    convolution_backward(g, x, w)  its gradient of the weight; that of the input reads no values of x

Other products look alike, as attention's do. These count whose result, in other dimensions or dtypes, scaled, or summed
with others, is the gradient of a parameter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from actcompile.plan import Role

from ._fx import call, graph_outputs, tangent_dependent
from ._views import VALUE_PRESERVING_OPS, VIEW_OPS

aten = torch.ops.aten

# Operators whose result surely lies in the memory of their argument; others copy where they must.
_VIEWS = VIEW_OPS - {aten.reshape.default, aten.expand.default}

_PRODUCTS = frozenset({aten.mm.default, aten.bmm.default})
_CONVOLUTION = aten.convolution_backward.default
_SUMS = frozenset({aten.sum.dim_IntList, aten.sum.default})

# What may lie between a weight's gradient and the result of the backward: it is linear.
_CARRIERS = (
    VALUE_PRESERVING_OPS
    | _SUMS
    | {
        torch.ops.prims.convert_element_type.default,
        aten.add.Tensor,
        aten.cat.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.slice_scatter.default,
        aten.select_scatter.default,
    }
)


@dataclass(frozen=True)
class WeightGrad:
    """One gradient of a weight.

    Args:
        node: Computes it: the product, or the sum over samples behind it.
        x: What it reads of the layer's input.
        grad_out: The other operand of a product; of a convolution, the gradient of its output.
        is_left: Whether ``x`` is the first operand of a product, so that the result is [K, N].
    """

    node: fx.Node
    x: fx.Node
    grad_out: fx.Node
    is_left: bool = False

    @property
    def product(self) -> fx.Node:
        """The operator that reads ``x``."""
        return self.node.all_input_nodes[0] if self.node.target in _SUMS else self.node

    @property
    def scale(self) -> float:
        """What the gradient is multiplied by before it is a parameter's, as where the layer scales its weight."""
        found, users = 1.0, list(self.node.users)
        while len(users) == 1 and users[0].op != "output":
            found *= scaling(users[0]) or 1.0
            users = list(users[0].users)
        return found

    @property
    def is_product(self) -> bool:
        """Whether it is no convolution's."""
        return self.node.target is not _CONVOLUTION

    @property
    def in_features(self) -> Any:
        """K; of products alone."""
        return self.x.meta["val"].shape[-2 if self.is_left else -1]

    def reads_rows_of(self, value: fx.Node) -> bool:
        """Whether this is one product of a matrix [M, K] whose rows lie one after the other in the memory of ``value``,
        and K is no symbol.
        """
        node = self.x
        while node is not value:
            if node.target not in _VIEWS:
                return False
            # Symbolic sizes follow.
            node = node.all_input_nodes[0]
        x, result = self.x.meta["val"], self.node.meta["val"]
        rows = x.transpose(-1, -2) if self.is_left else x
        # Of a product that is batched, all results are summed, or there is one.
        is_one = self.is_product and math.prod(result.shape[:-2]) == 1
        return is_one and isinstance(self.in_features, int) and bool(rows.is_contiguous())

    def replace(self, make: Callable[[fx.Node], fx.Node]) -> None:
        """Lets what ``make`` inserts, [N, K] from the gradient of the layer's output [M, N], stand for ``node``."""
        graph, result = self.node.graph, self.node.meta["val"]
        with graph.inserting_before(self.node):
            gradient = make(self._rows_of_gradient())
            if self.is_left:
                gradient = call(graph, aten.permute.default, gradient, [1, 0])
                # Views of the product's result follow.
                gradient = call(graph, aten.clone.default, gradient, memory_format=torch.contiguous_format)
            if result.dim() != 2:
                shape = [*result.shape[:-2], *gradient.meta["val"].shape]
                gradient = call(graph, aten.reshape.default, gradient, shape)
        self.node.replace_all_uses_with(gradient)
        _erase_unused(self.node)

    def _rows_of_gradient(self) -> fx.Node:
        grad_out, num_dims = self.grad_out, self.grad_out.meta["val"].dim()
        graph, swapped = grad_out.graph, [*range(num_dims - 2), num_dims - 1, num_dims - 2]
        if not self.is_left:
            is_swapped = grad_out.target is aten.permute.default and list(grad_out.args[1]) == swapped  # type: ignore[arg-type]
            above = grad_out.all_input_nodes[0]
            grad_out = above if is_swapped else call(graph, aten.permute.default, grad_out, swapped)
        if num_dims == 2:
            return grad_out
        return call(graph, aten.reshape.default, grad_out, [-1, grad_out.meta["val"].shape[-1]])


class WeightGrads:
    """The gradients of weights in a backward graph, which returns the gradients of inputs with ``input_roles``."""

    def __init__(self, graph: fx.Graph, input_roles: Sequence[Role]) -> None:
        self._dependent = tangent_dependent(graph)
        roles = dict(enumerate(input_roles))
        self._results: dict[fx.Node, set[Role | None]] = {}
        for position, node in enumerate(graph_outputs(graph)):
            if isinstance(node, fx.Node):
                self._results.setdefault(node, set()).add(roles.get(position))

    def of(self, value: fx.Node) -> list[WeightGrad]:
        """All that reads ``value``, if that is gradients of weights alone; else nothing."""
        views, found = [value], []
        for view in views:
            for user in view.users:
                if user.target in VALUE_PRESERVING_OPS and user not in self._dependent:
                    views.append(user)
                    continue
                gradient = self._gradient(user, view)
                if gradient is None:
                    return []
                found.append(gradient)
        return found

    def _gradient(self, user: fx.Node, x: fx.Node) -> WeightGrad | None:
        if user.target is _CONVOLUTION:
            is_input = user.args[1] is x and x not in (user.args[0], user.args[2])
            weights = [item for item in user.users if item.args[1] == 1]
            is_mine = is_input and all(map(self._is_result, weights))
            return WeightGrad(user, x, user.all_input_nodes[0]) if is_mine else None
        if user.target not in _PRODUCTS:
            return None
        left, right = user.args
        other = right if left is x else left
        if not isinstance(other, fx.Node) or other is x or other not in self._dependent:
            return None
        node = _summed(user)
        return WeightGrad(node, x, other, left is x) if self._is_result(node) else None

    def _is_result(self, gradient: fx.Node) -> bool:
        """Whether all that ``gradient`` reaches are gradients of parameters."""
        pending, seen = [gradient], set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if not self._results.get(node, set()) <= {Role.PARAMETER}:
                return False
            for user in node.users:
                if user.op != "output":
                    if user.target not in _CARRIERS and scaling(user) is None:
                        return False
                    pending.append(user)
        return True


def _erase_unused(node: fx.Node) -> None:
    """Erases ``node`` and what was computed for it alone."""
    if not node.users and node.op != "placeholder":
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            _erase_unused(source)


def scaling(node: fx.Node) -> float | None:
    """What ``node`` multiplies its argument by, if that is a number."""
    numbers = [value for value in node.args if isinstance(value, int | float)]
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or len(numbers) != 1 or not numbers[0]:
        return None
    return 1 / numbers[0] if node.target is aten.div.Tensor else float(numbers[0])


def _summed(product: fx.Node) -> fx.Node:
    """The sum over samples of a batched product, if nothing else reads it; else the product."""
    users = list(product.users)
    is_batched = product.target is aten.bmm.default and len(users) == 1
    if is_batched and users[0].target is aten.sum.dim_IntList and users[0].args[1] == [0]:
        return users[0]
    return product
