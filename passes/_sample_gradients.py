"""Gradients that read pruned tensors: the autograd functions behind ``SampleOperators``.

x' is x with all but the largest elements of each sample zero. Forwards are those of torch, on dense tensors.

    linear          dX = dY W              dW = dY^T X'            db = sum dY
    matmul          dA = dY B'^T           dB = A'^T dY
    softmax         dS = P' * (dP - sum(dP * P'))
    attend          dP = dO V'^T           dV = P'^T dO            dS as above, of P = softmax(S), O = P V
    layer_norm      that of torch on X', with the mean and deviation of X
    conv2d          dX exact               dW from dY and X'       db = sum dY
    gelu            dX = dY gelu'(x rounded to float16), nothing dropped

Each function takes the ``Storage`` that prunes for it first. What no gradient reads is not stored.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from actcompile.triton_kernels.sample_topk import restore_samples

from ._sample_storage import Storage


class Linear(Function):
    """``F.linear`` whose weight gradient reads the pruned input."""

    @staticmethod
    def forward(ctx: Any, storage: Storage, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See "linear" in the module docstring."""
        ctx.shape, ctx.dtype = x.shape, x.dtype
        pruned = storage.prune(x, "input", kind="leaf") if ctx.needs_input_grad[2] else []
        ctx.save_for_backward(weight, *pruned)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of input, weight and bias."""
        weight, *pruned = ctx.saved_tensors
        _, for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        x = restore_samples(pruned, ctx.shape, ctx.dtype).to(grad.dtype) if for_weight else None
        return (
            None,
            grad @ weight.to(grad.dtype) if for_x else None,
            None if x is None else rows.t() @ x.view(-1, x.shape[-1]),
            rows.sum(0) if for_bias else None,
        )


class Matmul(Function):
    """``torch.matmul`` of two pruned operands, each with a mask of its own."""

    @staticmethod
    def forward(ctx: Any, storage: Storage, a: Tensor, b: Tensor) -> Tensor:
        """See "matmul" in the module docstring."""
        ctx.shapes, ctx.dtypes = (a.shape, b.shape), (a.dtype, b.dtype)
        _, for_a, for_b = ctx.needs_input_grad
        pruned = [
            *(storage.prune(b, "second operand") if for_a else (None, None)),
            *(storage.prune(a, "first operand") if for_b else (None, None)),
        ]
        ctx.save_for_backward(*pruned)
        return torch.matmul(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of both operands."""
        of_b, of_a = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        (shape_a, shape_b), (dtype_a, dtype_b) = ctx.shapes, ctx.dtypes
        grad_a = grad_b = None
        if ctx.needs_input_grad[1]:
            b = restore_samples(of_b, shape_b, dtype_b).to(grad.dtype)
            grad_a = (grad @ b.mT).sum_to_size(shape_a)
        if ctx.needs_input_grad[2]:
            a = restore_samples(of_a, shape_a, dtype_a).to(grad.dtype)
            grad_b = (a.mT @ grad).sum_to_size(shape_b)
        return None, grad_a, grad_b


class Softmax(Function):
    """Softmax whose backward reads its pruned result."""

    @staticmethod
    def forward(
        ctx: Any, storage: Storage, scores: Tensor, dim: int, dtype: torch.dtype | None, zero_masked: bool
    ) -> Tensor:
        """See "softmax" in the module docstring."""
        p = softmax(scores, dim, dtype, zero_masked)
        ctx.shape, ctx.dtype, ctx.dim = p.shape, p.dtype, dim
        ctx.save_for_backward(*storage.prune(p, "result"))
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradient of the scores."""
        p = restore_samples(ctx.saved_tensors, ctx.shape, ctx.dtype)
        return None, softmax_gradient(grad, p, ctx.dim), None, None, None


class Attend(Function):
    """``softmax(scores, dim) @ v``, the probabilities stored once for both."""

    @staticmethod
    def forward(
        ctx: Any, storage: Storage, scores: Tensor, v: Tensor, dim: int, dtype: torch.dtype | None, zero_masked: bool
    ) -> Tensor:
        """See "attend" in the module docstring."""
        p = softmax(scores, dim, dtype, zero_masked)
        ctx.shapes, ctx.dtypes, ctx.dim = (p.shape, v.shape), (p.dtype, v.dtype), dim
        of_v = storage.prune(v, "values") if ctx.needs_input_grad[1] else []
        ctx.save_for_backward(*storage.prune(p, "probabilities"), *of_v)
        return torch.matmul(p.to(v.dtype), v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of scores and values."""
        of_p, of_v = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        (shape_p, shape_v), (dtype_p, dtype_v) = ctx.shapes, ctx.dtypes
        p = restore_samples(of_p, shape_p, dtype_p)
        grad_scores = grad_v = None
        if ctx.needs_input_grad[1]:
            v = restore_samples(of_v, shape_v, dtype_v).to(grad.dtype)
            grad_scores = softmax_gradient((grad @ v.mT).sum_to_size(shape_p).to(dtype_p), p, ctx.dim)
        if ctx.needs_input_grad[2]:
            grad_v = (p.to(grad.dtype).mT @ grad).sum_to_size(shape_v)
        return None, grad_scores, grad_v, None, None, None


def softmax(scores: Tensor, dim: int, dtype: torch.dtype | None, zero_masked: bool) -> Tensor:
    """``F.softmax``; with ``zero_masked``, zero where all scores are -inf, as fused attention has it, and not nan."""
    p = F.softmax(scores, dim, dtype=dtype)
    return p.masked_fill((scores == -math.inf).all(dim, keepdim=True), 0) if zero_masked else p


def softmax_gradient(grad: Tensor, p: Tensor, dim: int) -> Tensor:
    """The gradient of the scores from that of the probabilities ``p``."""
    weighted = grad * p
    return weighted - p * weighted.sum(dim, keepdim=True)


class LayerNorm(Function):
    """``F.layer_norm`` whose gradients read the pruned input, with the statistics of the dense one."""

    @staticmethod
    def forward(
        ctx: Any,
        storage: Storage,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        """See "layer_norm" in the module docstring."""
        y, mean, deviation = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)
        ctx.shape, ctx.dtype, ctx.normalized_shape = x.shape, x.dtype, list(normalized_shape)
        is_read = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        pruned = storage.prune(x, "input", x.dtype) if is_read else (None, None)
        ctx.save_for_backward(weight, bias, mean, deviation, *pruned)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of input, weight and bias."""
        weight, bias, mean, deviation, bits, values = ctx.saved_tensors
        _, for_x, _, for_weight, for_bias, _ = ctx.needs_input_grad
        if bits is None:
            x = grad.new_zeros(()).expand(ctx.shape)
        else:
            x = restore_samples((bits, values), ctx.shape, ctx.dtype).to(grad.dtype)
        found = torch.ops.aten.native_layer_norm_backward(
            grad, x, ctx.normalized_shape, mean, deviation, weight, bias, [for_x, for_weight, for_bias]
        )
        return None, found[0], None, found[1], found[2], None


class Conv2d(Function):
    """``torch.conv2d`` whose weight gradient reads the pruned input."""

    @staticmethod
    def forward(
        ctx: Any,
        storage: Storage,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        """See "conv2d" in the module docstring."""
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.settings = stride, padding, dilation, False, [0, 0], groups
        pruned = storage.prune(x, "input", x.dtype, kind="leaf") if ctx.needs_input_grad[2] else []
        ctx.save_for_backward(weight, *pruned)
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Gradients of input, weight and bias."""
        weight, *pruned = ctx.saved_tensors
        _, for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
        if pruned:
            x = restore_samples(pruned, ctx.shape, ctx.dtype).to(grad.dtype)
        else:
            x = grad.new_zeros(()).expand(ctx.shape)
        found = torch.ops.aten.convolution_backward(
            grad, x, weight.to(grad.dtype), [weight.shape[0]], *ctx.settings, [for_x, for_weight, for_bias]
        )
        return None, *found, None, None, None, None


class Gelu(Function):
    """``F.gelu`` with its input in float16."""

    @staticmethod
    def forward(ctx: Any, storage: Storage, x: Tensor, approximate: str) -> Tensor:
        """See "gelu" in the module docstring."""
        ctx.dtype, ctx.approximate = x.dtype, approximate
        ctx.save_for_backward(storage.narrow(x, "input"))
        return F.gelu(x, approximate=approximate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradient of the input."""
        (x,) = ctx.saved_tensors
        return None, torch.ops.aten.gelu_backward(grad, x.to(ctx.dtype), approximate=ctx.approximate), None
