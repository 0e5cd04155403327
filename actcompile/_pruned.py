"""What pruning a saved tensor, or sampling its rows, adds to the gradient.

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
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ._dropped import Dropped, Shape, lost_share, shapes_of
from .passes._weight_grads import WeightGrad, WeightGrads
from .plan import Pruning, Role, Sensitivity
from .triton_kernels._layout import to_storage_order
from .triton_kernels._topk_sizes import group_numel
from .triton_kernels.rows import inclusion_probability, num_kept_rows, row_norms, sampling_variance

# Fewer rows or columns than this say too little.
_MIN_SUMS = 16
# Position of the output mask among the arguments of a convolution's backward, and the mask of the weight's gradient.
_MASK, _WEIGHT_ALONE = 10, [False, True, False]


class PruningNoise:
    """Sums up, over a backward and over products through parts of it, what pruning each tensor adds to the gradient.

    Args:
        graph: The backward.
        input_roles: Roles of the inputs whose gradients it returns.
        keys: Row keys of what it decodes.
        prunings: What tensors may be pruned to.
        rows: The share of rows that may be sampled of layer inputs.
    """

    def __init__(
        self,
        graph: fx.Graph,
        input_roles: Sequence[Role],
        keys: Mapping[fx.Node, str],
        prunings: Sequence[Pruning],
        rows: float | None = None,
    ) -> None:
        weights, self._prunings = WeightGrads(graph, input_roles), prunings
        self.shapes = shapes_of(prunings)
        readers = {node: weights.of(node) for node in keys} if prunings else {}
        matrices = {node: found for node, found in readers.items() if all(one.reads_rows_of(node) for one in found)}
        self._share, self._features = rows, {keys[n]: found[0].in_features for n, found in matrices.items() if found}
        self._samplings: dict[str, float] = defaultdict(float)
        others = {keys[node] for node, found in readers.items() if not found}
        self._weights = {key: dict.fromkeys(self.shapes, 0.0) for key in keys.values() if key not in others}
        self._readers = {
            reader.product: (keys[node], reader)
            for node, found in readers.items()
            for reader in found
            if keys[node] in self._weights
        }
        self._biases: dict[tuple[str, Shape], list[_Bias]] = {}
        self._residuals: dict[tuple[str, Shape], float] = defaultdict(float)
        self._roundings: dict[tuple[str, Pruning], float] = defaultdict(float)

    def see(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Called before the backward computes ``node`` from ``values``; for layer inputs."""
        if node in self._readers:
            key, reader = self._readers[node]
            for shape in self.shapes:
                self._weights[key][shape] += _weight_bias(reader, values, shape)

    def weigh(self, key: str, value: Tensor, cotangent: Tensor, dropped: Dropped) -> None:
        """Takes a tensor, or some samples of it as ``dropped`` says, and u, which is of the same v for all samples."""
        u = cotangent.float()
        if self._share is not None and key in self._weights and key in self._features:
            self._samplings[key] += _sampling(value, u, self._features[key], self._share)
        for shape in self.shapes:
            share = lost_share(value, shape)
            errors = [dropped.mean(shape), *([] if key in self._weights else [value])]
            dim = dropped.groups.dim
            biases = self._biases.setdefault((key, shape), [_Bias(dim) for _ in errors])
            for bias, error in zip(biases, errors, strict=True):
                bias.add(share * u * error)
            self._residuals[key, shape] += float((share * u.square() * dropped.variance(shape)).sum())
            for pruning in self._prunings:
                if (pruning.keep, pruning.block) == shape:
                    self._roundings[key, pruning] += _rounding(value, u, share, pruning)

    def added_to(self, sensitivities: Mapping[str, Sensitivity], scale: float = 1.0) -> dict[str, Sensitivity]:
        """``sensitivities`` with what pruning adds; ``scale`` is how many times what was weighed all samples are."""
        found = dict(sensitivities)
        for key in {key for key, _ in self._biases} & found.keys():
            biases = {shape: scale * self._bias(key, shape) for shape in self.shapes}
            for shape, square in self._weights.get(key, {}).items():
                biases[shape] = max(biases[shape], square)
            pruned = {
                pruning: biases[pruning.keep, pruning.block] + scale * self._roundings[key, pruning]
                for pruning in self._prunings
            }
            sampled = scale * self._samplings[key] if key in self._samplings else None
            found[key] = replace(found[key], pruned=pruned, sampled=sampled)
        return found

    def _bias(self, key: str, shape: Shape) -> float:
        """Of what was weighed: what the forward noted, or what was decoded."""
        noted, *decoded = (bias.square() for bias in self._biases[key, shape])
        return max([noted + self._residuals[key, shape], *decoded])


class _Bias:
    """Sums of the products of error and cotangent: over all, and over each row and column but ``dim``, which is cut."""

    def __init__(self, dim: int | None) -> None:
        self._dim = dim
        self._total = 0.0
        self._sums: dict[int, Tensor] = {}
        self._squares = 0.0

    def add(self, products: Tensor) -> None:
        """Takes those of some samples."""
        self._total += float(products.sum())
        self._squares += float(products.square().sum())
        for dim in range(products.dim()):
            if dim != self._dim and products.shape[dim] >= _MIN_SUMS:
                sums = products.sum([other for other in range(products.dim()) if other != dim] or None)
                self._sums[dim] = self._sums[dim] + sums if dim in self._sums else sums

    def square(self) -> float:
        """The largest estimate of the square of the bias; see the module docstring."""
        return max(self._total**2, self._squares, *(float(sums.square().sum()) for sums in self._sums.values()), 0.0)


def _weight_bias(reader: WeightGrad, values: Mapping[fx.Node, Any], shape: Shape) -> float:
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


def _sampling(value: Tensor, u: Tensor, in_features: int, share: float) -> float:
    """The variance that sampling rows adds; |u_m|^2 of a row has |g_m|^2 times their number of elements as its mean."""
    x, cotangents = (to_storage_order(tensor).view(-1, in_features) for tensor in (value, u))
    norms = row_norms(x)
    p = inclusion_probability(norms, num_kept_rows(share, len(x)))
    return float(sampling_variance(norms * cotangents.norm(dim=1), p)) / in_features


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
