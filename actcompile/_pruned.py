"""What pruning a saved tensor adds to the gradient.

Pruning x takes a known error d away from it, x itself where an element is dropped, so that it adds a bias to the
gradient, |J d|^2 to first order, J = dg/dx. Rounding what is left to few bits adds a variance, as codes do.

    layer inputs    the gradient of the weight is linear in them: its product is computed once more, for d alone, where
                    the backward computes it, for the whole batch
    others          for random signs v and u = J^T v, the sum of u_i d_i has |J d|^2 as the mean of its square, but one
                    sum is one draw. Sums over single rows or columns, whose squares are added, are as many draws as
                    there are of them, but know nothing of how these add up. The largest of all is taken

x comes from codes, where small elements may be lost. What the forward noted of them (_dropped.py) gives a second
estimate, with the mean of its group in the place of what was dropped, and what differs from that as independent noise;
the larger one counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ._dropped import Dropped, lost_share, shapes_of
from .passes._weight_grads import WeightGrad, WeightGrads
from .plan import Pruning, Role, Sensitivity
from .triton_kernels._layout import to_storage_order
from .triton_kernels._topk_sizes import group_numel

# Position of the output mask among the arguments of a convolution's backward, and the mask of the weight's gradient.
_MASK, _WEIGHT_ALONE = 10, [False, True, False]


class WeightBiases:
    """Sums up, while a backward runs, what pruning layer inputs adds to the gradients of their weights.

    Args:
        graph: The backward.
        input_roles: Roles of the inputs whose gradients it returns.
        keys: Row keys of what it decodes.
        prunings: What tensors may be pruned to.
    """

    def __init__(
        self,
        graph: fx.Graph,
        input_roles: Sequence[Role],
        keys: Mapping[fx.Node, str],
        prunings: Sequence[Pruning],
    ) -> None:
        weights, self._shapes = WeightGrads(graph, input_roles), shapes_of(prunings)
        readers = {node: weights.of(node) for node in keys} if prunings else {}
        others = {keys[node] for node, found in readers.items() if not found}
        self.squares = {key: dict.fromkeys(self._shapes, 0.0) for key in keys.values() if key not in others}
        self._readers = {
            reader.product: (keys[node], reader)
            for node, found in readers.items()
            for reader in found
            if keys[node] in self.squares
        }

    def see(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Called before ``node`` is computed from ``values``."""
        if node in self._readers:
            key, reader = self._readers[node]
            for shape in self._shapes:
                self.squares[key][shape] += _weight_bias(reader, values, shape)

    def added_to(self, sensitivities: Mapping[str, Sensitivity]) -> dict[str, Sensitivity]:
        """``sensitivities`` with these biases in what pruning adds, where they are larger."""
        found = dict(sensitivities)
        for key in found.keys() & self.squares.keys():
            squares, known = self.squares[key], found[key].pruned
            pruned = {pruning: max(noise, squares[pruning.keep, pruning.block]) for pruning, noise in known.items()}
            found[key] = replace(found[key], pruned=pruned)
        return found


def _weight_bias(reader: WeightGrad, values: Mapping[fx.Node, Any], shape: tuple[int, int]) -> float:
    """The square of the bias for one layer and one shape."""
    node, x = reader.product, values[reader.x]
    dropped = (lost_share(x, shape) * x).to(x.dtype)
    args = list(fx.node.map_arg(node.args, lambda n: dropped if n is reader.x else values[n]))
    if not reader.is_product:
        args[_MASK] = _WEIGHT_ALONE
    result = node.target(*args)  # type: ignore[operator]
    change = result if reader.is_product else result[1]
    if node is not reader.node:
        change = change.sum(0)
    return float(change.float().square().sum())


def pruned_noise(
    value: Tensor, cotangent: Tensor, dropped: Dropped, prunings: Sequence[Pruning], is_layer_input: bool
) -> dict[Pruning, float]:
    """E|g' - g|^2 for each of ``prunings``; of layer inputs, what the forward noted alone.

    Args:
        value: The tensor, or some samples of it, as it was decoded.
        cotangent: u, in the same shape.
        dropped: What the forward noted of these samples.
        prunings: What it may be pruned to.
        is_layer_input: Whether gradients of weights alone read it.
    """
    u, found = cotangent.float(), {}
    for shape in shapes_of(prunings):
        share = lost_share(value, shape)
        lost = share * u
        noise = _square(lost * dropped.mean(shape)) + float((share * u.square() * dropped.variance(shape)).sum())
        if not is_layer_input:
            noise = max(noise, _square(lost * value))
        for pruning in prunings:
            if (pruning.keep, pruning.block) == shape:
                found[pruning] = noise + _rounding(value, u, share, pruning)
    return found


def _square(products: Tensor) -> float:
    """The square of the bias, from the products of error and cotangent; see the module docstring."""
    dims = range(products.dim())
    sums = [products.sum([other for other in dims if other != dim] or None) for dim in dims if products.shape[dim] > 1]
    return max(float(one.square().sum()) for one in [products.sum(), *sums])


def _rounding(value: Tensor, u: Tensor, share: Tensor, pruning: Pruning) -> float:
    """The variance that rounding what is kept adds: f (1 - f) scale^2 for what lies at f between two levels."""
    if pruning.value_bits == 16:
        return 0.0
    group, missing = group_numel(pruning.block), -value.numel() % group_numel(pruning.block)
    flat, squares, lost = (
        F.pad(to_storage_order(tensor).float(), (0, missing)).view(-1, group)
        for tensor in (value, (1 - share) * u.square(), share)
    )
    high, low = (torch.where(lost < 1, flat, sign * math.inf) for sign in (-1, 1))
    zero = low.amin(1, keepdim=True)
    scale = ((high.amax(1, keepdim=True) - zero) / (2**pruning.value_bits - 1)).clamp_min(torch.finfo().tiny)
    fraction = torch.where(lost < 1, (flat - zero) / scale, 0).frac()
    return float((squares * fraction * (1 - fraction) * scale.square()).sum())
