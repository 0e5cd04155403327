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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ._dropped import GROUP, Dropped, Shape, chunk_numel, lost_of_blocks, lost_share, rows_of, shapes_of
from .passes._weight_grads import WeightGrad, WeightGrads
from .plan import Pruning, Role, Sensitivity
from .triton_kernels._layout import storage_permutation, to_storage_order
from .triton_kernels._topk_sizes import group_numel
from .triton_kernels.rows import inclusion_probability, num_kept_rows, row_norms, sampling_variance

# Fewer rows or columns than this say too little.
_MIN_SUMS = 16
# Variances of single elements are summed over one row in so many, of many rows.
_SAMPLED, _MANY_ROWS = 8, 64
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
        self._biases: dict[str, _Biases] = {}
        self._residuals: dict[tuple[str, Shape], Tensor | float] = defaultdict(float)
        self._roundings: dict[tuple[str, Pruning], Tensor | float] = defaultdict(float)

    def see(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> None:
        """Called before the backward computes ``node`` from ``values``; for layer inputs."""
        if node in self._readers:
            key, reader = self._readers[node]
            for shape in self.shapes:
                self._weights[key][shape] += _weight_bias(reader, values, shape)

    def weigh(self, key: str, value: Tensor, cotangent: Tensor, dropped: Dropped) -> None:
        """Takes a tensor, or some samples of it as ``dropped`` says, and u, which is of the same v for all samples."""
        if self._share is not None and key in self._weights and key in self._features:
            self._samplings[key] += _sampling(value, cotangent, self._features[key], self._share)
        order, dim = storage_permutation(value.shape, value.stride()), dropped.groups.dim
        x, u = value.permute(order), cotangent.permute(order)
        noted = {shape: dropped.in_rows(shape, order) for shape in self.shapes}
        num_errors = 1 if key in self._weights else 2
        if key not in self._biases:
            num_products = num_errors * len(self.shapes)
            self._biases[key] = _Biases(num_products, x.shape, None if dim is None else order.index(dim), x.device)
        start = 0
        for index in _chunks(x.shape, chunk_numel(x)):
            part = x[index]
            values, cotangents = rows_of(part.float()), rows_of(u[index].float())
            chosen = _sample(len(values), values.device)
            ratio = len(values) / len(chosen)
            products = values.new_empty(len(self.shapes), num_errors, *values.shape)
            for shape, out in zip(self.shapes, products, strict=True):
                keep, block = shape
                share = lost_of_blocks(values.view(-1, block), keep).view(values.shape)
                mean, variance = (rows[start : start + len(values)] for rows in noted[shape])
                weighted = share * cotangents
                torch.mul(weighted, mean, out=out[0])
                if num_errors > 1:
                    torch.mul(weighted, values, out=out[1])
                self._add_variances(
                    key, shape, values[chosen], cotangents[chosen], share[chosen], variance[chosen], ratio
                )
            self._biases[key].add(products.flatten(2)[..., : part.numel()].reshape(-1, *part.shape), index)
            start += len(values)

    def _add_variances(
        self, key: str, shape: Shape, values: Tensor, u: Tensor, share: Tensor, variance: Tensor, ratio: float
    ) -> None:
        """Of ``ratio`` times as many rows as these."""
        squares = u.square()
        self._residuals[key, shape] += ratio * (share * squares * variance).sum()
        rounded = [p for p in self._prunings if (p.keep, p.block) == shape and p.value_bits < 16]
        if rounded:
            values, squares, share = (x.reshape(-1, group_numel(shape[1])) for x in (values, squares, share))
            noises = ratio * _rounding(values, squares, share, [pruning.value_bits for pruning in rounded])
            for pruning, noise in zip(rounded, noises, strict=True):
                self._roundings[key, pruning] += noise

    def added_to(self, sensitivities: Mapping[str, Sensitivity], scale: float = 1.0) -> dict[str, Sensitivity]:
        """``sensitivities`` with what pruning adds; ``scale`` is how many times what was weighed all samples are."""
        found = dict(sensitivities)
        for key in self._biases.keys() & found.keys():
            biases = {shape: scale * self._bias(key, shape) for shape in self.shapes}
            for shape, square in self._weights.get(key, {}).items():
                biases[shape] = max(biases[shape], square)
            pruned = {
                pruning: biases[pruning.keep, pruning.block] + scale * float(self._roundings[key, pruning])
                for pruning in self._prunings
            }
            sampled = scale * self._samplings[key] if key in self._samplings else None
            found[key] = replace(found[key], pruned=pruned, sampled=sampled)
        return found

    def _bias(self, key: str, shape: Shape) -> float:
        """Of what was weighed: what the forward noted, or what was decoded."""
        noted, *decoded = self._biases[key].squares().view(len(self.shapes), -1)[self.shapes.index(shape)].tolist()
        return max([noted + float(self._residuals[key, shape]), *decoded])


class _Biases:
    """Sums of products of errors and cotangents: over all, and over each row and column but ``dim``, which is cut."""

    def __init__(self, num_products: int, shape: Sequence[int], dim: int | None, device: torch.device) -> None:
        self._totals, self._squares = torch.zeros(2, num_products, device=device, dtype=torch.float64)
        self._sums = {
            other: torch.zeros(num_products, length, device=device)
            for other, length in enumerate(shape)
            if other != dim and length >= _MIN_SUMS and len(shape) > 1
        }

    def add(self, products: Tensor, index: Sequence[slice]) -> None:
        """Takes those of some elements: [num_products, ...], at ``index`` in the first dimensions."""
        flat = products.flatten(1)
        self._totals += flat.sum(1)
        self._squares += torch.linalg.vector_norm(flat, dim=1).square()
        for dim, sums in self._sums.items():
            others = [other for other in range(1, products.dim()) if other != dim + 1]
            here = sums[:, index[dim]] if dim < len(index) else sums
            here += products.sum(others)

    def squares(self) -> Tensor:
        """The largest estimates of the squares of the biases; see the module docstring: float64 [num_products]."""
        found = [self._totals.square(), self._squares, *(sums.double().square().sum(1) for sums in self._sums.values())]
        return torch.stack(found).amax(0)


def _chunks(shape: Sequence[int], numel: int) -> Iterator[tuple[slice, ...]]:
    """Cuts a tensor that lies in memory as ``shape`` says into runs of about ``numel`` elements, of whole groups."""
    inner = math.prod(shape[1:])
    if not shape or shape[0] * inner <= numel:
        yield ()
    elif inner > numel and inner % GROUP == 0:
        for start in range(shape[0]):
            for rest in _chunks(shape[1:], numel):
                yield slice(start, start + 1), *rest
    else:
        unit = GROUP // math.gcd(inner, GROUP)
        step = max(1, numel // inner // unit) * unit
        for start in range(0, shape[0], step):
            yield (slice(start, start + step),)


def _sample(num_rows: int, device: torch.device) -> Tensor:
    """Numbers of rows that stand for all."""
    if num_rows < _MANY_ROWS:
        return torch.arange(num_rows, device=device)
    generator = torch.Generator().manual_seed(num_rows)
    starts = torch.arange(0, num_rows - _SAMPLED + 1, _SAMPLED)
    # One of each few: columns of a matrix come again every so many rows.
    return (starts + torch.randint(_SAMPLED, starts.shape, generator=generator)).to(device)


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
    return reader.scale**2 * float(change.float().square().sum())


def _sampling(value: Tensor, u: Tensor, in_features: int, share: float) -> float:
    """The variance that sampling rows adds; |u_m|^2 of a row has |g_m|^2 times their number of elements as its mean."""
    x, cotangents = (to_storage_order(tensor).view(-1, in_features) for tensor in (value, u))
    norms = row_norms(x)
    p = inclusion_probability(norms, num_kept_rows(share, len(x)))
    return float(sampling_variance(norms * row_norms(cotangents), p)) / in_features


def _rounding(values: Tensor, squares: Tensor, share: Tensor, widths: Sequence[int]) -> Tensor:
    """The variance that rounding what is kept adds: f (1 - f) scale^2 for what lies at f between two levels.

    Args:
        values: Whole groups.
        squares: Of the cotangents.
        share: What is lost.
        widths: Bits of the values: [num_widths] of the result.
    """
    is_lost, levels = share == 1, torch.tensor([2.0**bits - 1 for bits in widths], device=values.device)
    zero = values.masked_fill(is_lost, math.inf).amin(1, keepdim=True)
    ranges = values.masked_fill(is_lost, -math.inf).amax(1, keepdim=True) - zero
    scale = (ranges / levels[:, None, None]).clamp_min_(torch.finfo().tiny)
    # Far below what is kept, elements that are lost would leave the range of numbers where all others are equal.
    fraction = ((values - zero).masked_fill_(is_lost, 0) / scale).frac_()
    noise = torch.addcmul(fraction, fraction, fraction, value=-1).mul_((1 - share) * squares)
    return (noise.sum(2, keepdim=True) * scale.square()).sum((1, 2))
