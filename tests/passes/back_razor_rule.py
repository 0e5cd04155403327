"""Back Razor's gradients once more, in plain torch, to compare with: surrogates that autograd differentiates.

``with_value(s, y)`` has the value of y and the gradient of s, which is linear in whatever has an exact gradient and in
whatever is pruned. In float64 the difference to what is tested is rounding alone.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

SPARSITY = 0.8


def with_value(surrogate: Tensor, value: Tensor) -> Tensor:
    """The value of ``value``, the gradient of ``surrogate``."""
    return surrogate - surrogate.detach() + value.detach()


def largest(x: Tensor, dtype: torch.dtype = torch.float16, sparsity: float = SPARSITY) -> Tensor:
    """``x`` with all but the largest of each sample zero, and those rounded to ``dtype``; no gradient."""
    samples = []
    for sample in x.detach():
        rank = min(max(int(sample.numel() * sparsity), 1), sample.numel())
        threshold = sample.abs().flatten().sort().values[rank - 1]
        samples.append(sample.to(dtype).to(x.dtype) * (sample.abs() >= threshold))
    return torch.stack(samples)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A pruned input in the weight's gradient."""
    surrogate = F.linear(x, weight.detach()) + F.linear(largest(x), weight, bias)
    return with_value(surrogate, F.linear(x, weight, bias))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, **settings: object) -> Tensor:
    """The same, in the input's own type."""
    surrogate = F.conv2d(x, weight.detach(), **settings) + F.conv2d(largest(x, x.dtype), weight, bias, **settings)
    return with_value(surrogate, F.conv2d(x, weight, bias, **settings))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Pruned operands in both gradients."""
    return with_value(a @ largest(b) + largest(a) @ b, a @ b)


def softmax(scores: Tensor, dim: int = -1) -> Tensor:
    """A pruned result in the gradient."""
    value, finite = scores.softmax(dim), scores.masked_fill(scores == -torch.inf, 0)
    p = largest(value)
    return with_value(p * finite - p * (p * finite).sum(dim, True), value)


def attend(scores: Tensor, v: Tensor) -> Tensor:
    """Pruned probabilities and values."""
    return matmul(softmax(scores), v)


def layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """A pruned input, in its own type, beside the true mean and deviation."""
    dims = tuple(range(-len(shape), 0))
    mean, variance = x.detach().mean(dims, True), x.detach().var(dims, unbiased=False, keepdim=True)
    normalized = (largest(x, x.dtype) - mean) * (variance + eps).rsqrt()
    centered = x - x.mean(dims, True) - normalized * (x * normalized).mean(dims, True)
    surrogate = centered * (variance + eps).rsqrt() * weight.detach() + normalized * weight + bias
    return with_value(surrogate, F.layer_norm(x, shape, weight, bias, eps))


def gelu(x: Tensor) -> Tensor:
    """The derivative at the input in float16."""
    stored = x.detach().half().to(x.dtype)
    density = (-stored.square() / 2).exp() / (2 * torch.pi) ** 0.5
    derivative = (1 + torch.erf(stored / 2**0.5)) / 2 + stored * density
    return with_value(derivative * x, F.gelu(x))
