"""Losses with a restricted domain, a steep spot, a jump or a pole, of what one linear layer yields: [128, 64]."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TARGET = (torch.arange(128 * 64).view(128, 64) % 3 == 0).float()
LABELS = torch.arange(128) % 64
EYE = torch.eye(64)

Loss = Callable[[Tensor], Tensor]


def _entropy(h: Tensor) -> Tensor:
    p = torch.softmax(5 * h, -1)
    return -(p * torch.log(p + 1e-9)).sum(-1).mean()


def _gram(h: Tensor) -> Tensor:
    return h.T @ h / 128 + 0.1 * EYE


def _gated_by_hand(h: Tensor) -> Tensor:
    return (h[:, :32] * torch.sigmoid(8 * h[:, 32:])).pow(2).mean()


# Of the first trials.
TRIED: dict[str, Loss] = {
    "sqrt(relu + eps)": lambda h: torch.sqrt(torch.relu(h) + 1e-6).mean(),
    "relu ** 1.5": lambda h: torch.relu(h).pow(1.5).mean(),
    "cdist": lambda h: torch.cdist(h, h).mean(),
    "std of pairs": lambda h: h.view(128, 32, 2).std(-1).log1p().mean(),
    "log(clamp(softmax))": lambda h: -(TARGET * torch.log(torch.softmax(5 * h, -1).clamp(min=1e-8))).mean(),
    "entropy": _entropy,
    "log(softplus)": lambda h: F.softplus(4 * h).log().pow(2).mean(),
    "lgamma(softplus)": lambda h: torch.lgamma(F.softplus(4 * h) + 0.01).mean(),
    "sin(30 x)": lambda h: torch.sin(30 * h).mul(TARGET).mean(),
    "elu": lambda h: F.elu(3 * h, 2.0).pow(2).mean(),
    "gaussian nll": lambda h: F.gaussian_nll_loss(h[:, :32], TARGET[:, :32], F.softplus(4 * h[:, 32:])),
    "x / (|y| + eps)": lambda h: (h[:, :32] / (h[:, 32:].abs() + 1e-2)).tanh().mean(),
    "inverse": lambda h: torch.linalg.inv(_gram(h)).pow(2).mean(),
    "eigh": lambda h: torch.linalg.eigh(h.T @ h / 128)[0].log().mul(torch.arange(64.0)).mean(),
    "gelu": lambda h: F.gelu(3 * h).pow(2).mean(),
}

# Special functions, functions of matrices, normalizations and losses.
FURTHER: dict[str, Loss] = {
    "silu": lambda h: F.silu(8 * h).pow(2).mean(),
    "silu by hand": lambda h: (8 * h * torch.sigmoid(8 * h)).pow(2).mean(),
    "gelu tanh": lambda h: F.gelu(3 * h, approximate="tanh").pow(2).mean(),
    "mish": lambda h: F.mish(4 * h).pow(2).mean(),
    "selu": lambda h: F.selu(3 * h).pow(2).mean(),
    "celu": lambda h: F.celu(3 * h, 0.5).pow(2).mean(),
    "softplus": lambda h: F.softplus(4 * h, beta=2).pow(2).mean(),
    "softplus by hand": lambda h: torch.log1p(torch.exp(4 * h)).pow(2).mean(),
    "logsigmoid": lambda h: F.logsigmoid(4 * h).mul(TARGET).mean(),
    "hardswish": lambda h: F.hardswish(4 * h).pow(2).mean(),
    "hardsigmoid": lambda h: F.hardsigmoid(4 * h).pow(2).mean(),
    "leaky relu": lambda h: F.leaky_relu(h).pow(2).mean(),
    "relu6": lambda h: F.relu6(8 * h).pow(2).mean(),
    "softsign": lambda h: F.softsign(3 * h).pow(2).mean(),
    "tanhshrink": lambda h: F.tanhshrink(3 * h).pow(2).mean(),
    "softshrink": lambda h: F.softshrink(h, 0.2).pow(2).mean(),
    "glu": lambda h: F.glu(4 * h).pow(2).mean(),
    "gated by hand": _gated_by_hand,
    "tanh": lambda h: torch.tanh(4 * h).mul(TARGET).mean(),
    "sigmoid": lambda h: torch.sigmoid(4 * h).mul(TARGET).mean(),
    "log(sigmoid)": lambda h: torch.sigmoid(4 * h).log().mul(TARGET).mean(),
    "exp": lambda h: torch.exp(2 * h).mean(),
    "expm1": lambda h: torch.expm1(2 * h).pow(2).mean(),
    "exp(-x^2)": lambda h: torch.exp(-((2 * h) ** 2)).mul(TARGET).mean(),
    "cos(10 x)": lambda h: torch.cos(10 * h).mul(TARGET).mean(),
    "tan": lambda h: torch.tan(h.tanh()).pow(2).mean(),
    "atan": lambda h: torch.atan(10 * h).mul(TARGET).mean(),
    "asin": lambda h: torch.asin(0.99 * torch.tanh(h)).pow(2).mean(),
    "acos": lambda h: torch.acos(0.99 * torch.tanh(h)).mul(TARGET).mean(),
    "atanh": lambda h: torch.atanh(0.99 * torch.tanh(h)).pow(2).mean(),
    "asinh": lambda h: torch.asinh(10 * h).mul(TARGET).mean(),
    "acosh": lambda h: torch.acosh(1.01 + h.pow(2)).mean(),
    "sinh": lambda h: torch.sinh(2 * h).pow(2).mean(),
    "cosh": lambda h: torch.cosh(2 * h).mean(),
    "log cosh": lambda h: torch.cosh(4 * h).log().mean(),
    "erf": lambda h: torch.erf(2 * h).mul(TARGET).mean(),
    "erfinv": lambda h: torch.erfinv(0.9 * torch.tanh(h)).pow(2).mean(),
    "ndtri": lambda h: torch.special.ndtri(0.05 + 0.9 * torch.sigmoid(h)).pow(2).mean(),
    "log_ndtr": lambda h: torch.special.log_ndtr(4 * h).mul(TARGET).mean(),
    "digamma": lambda h: torch.digamma(F.softplus(4 * h) + 0.1).mean(),
    "i0": lambda h: torch.i0(2 * h).mean(),
    "sinc": lambda h: torch.sinc(2 * h).mul(TARGET).mean(),
    "xlogy": lambda h: torch.xlogy(TARGET, F.softplus(4 * h)).mean(),
    "logit": lambda h: torch.logit(torch.sigmoid(4 * h), eps=1e-4).pow(2).mean(),
    "square": lambda h: (h * h).mul(TARGET).mean(),
    "cube": lambda h: (h * h * h).mean() + h.pow(2).mean(),
    "x ** 4": lambda h: h.pow(4).mean(),
    "reciprocal": lambda h: (1 / (h.pow(2) + 0.1)).mean(),
    "rsqrt": lambda h: torch.rsqrt(h.pow(2) + 0.1).mean(),
    "log(x^2 + eps)": lambda h: torch.log(h.pow(2) + 1e-3).mean(),
    "hypot": lambda h: torch.hypot(h[:, :32], h[:, 32:]).mean(),
    "atan2": lambda h: torch.atan2(h[:, :32], h[:, 32:]).mul(TARGET[:, :32]).mean(),
    "pow of two": lambda h: torch.pow(F.softplus(h[:, :32]) + 0.1, h[:, 32:]).mean(),
    "logsumexp": lambda h: torch.logsumexp(10 * h, -1).pow(2).mean(),
    "logcumsumexp": lambda h: torch.logcumsumexp(4 * h, -1).mean(),
    "cumprod": lambda h: torch.cumprod(1 + 0.1 * h, -1).mean(),
    "prod": lambda h: (1 + 0.1 * h).prod(-1).mean(),
    "softmin": lambda h: F.softmin(10 * h, -1).mul(TARGET).mean(),
    "softmax of small rows": lambda h: torch.softmax(10 * h.view(128, 16, 4), -1).pow(2).mean(),
    "layer norm of odd rows": lambda h: F.layer_norm(h[:, :50], (50,)).mul(TARGET[:, :50]).pow(3).mean(),
    "rms norm": lambda h: F.rms_norm(h, (64,)).mul(TARGET).pow(3).mean(),
    "group norm": lambda h: F.group_norm(h.view(16, 8, 64), 4).pow(3).mul(TARGET.view(16, 8, 64)).mean(),
    "batch norm": lambda h: F.batch_norm(h, None, None, training=True).pow(3).mul(TARGET).mean(),
    "normalize": lambda h: F.normalize(h, dim=-1).mul(TARGET).mean(),
    "cosine similarity": lambda h: F.cosine_similarity(h[:64], h[64:]).mean(),
    "norm of rows": lambda h: h.norm(dim=-1).mean(),
    "variance of rows": lambda h: h.var(-1).log().mean(),
    "cross entropy": lambda h: F.cross_entropy(10 * h, LABELS),
    "label smoothing": lambda h: F.cross_entropy(10 * h, LABELS, label_smoothing=0.1),
    "focal": lambda h: ((1 - torch.sigmoid(4 * h)).pow(2) * F.logsigmoid(4 * h)).mul(TARGET).mean(),
    "kl": lambda h: F.kl_div(F.log_softmax(5 * h, -1), torch.softmax(TARGET, -1), reduction="batchmean"),
    "poisson nll": lambda h: F.poisson_nll_loss(2 * h, TARGET),
    "huber": lambda h: F.huber_loss(3 * h, TARGET),
    "smooth l1": lambda h: F.smooth_l1_loss(3 * h, TARGET, beta=0.5),
    "bce": lambda h: F.binary_cross_entropy(torch.sigmoid(4 * h), TARGET),
    "bce with logits": lambda h: F.binary_cross_entropy_with_logits(4 * h, TARGET),
    "soft margin": lambda h: F.soft_margin_loss(4 * h, 2 * TARGET - 1),
    "mixture": lambda h: -torch.logsumexp(F.log_softmax(4 * h[:, :32], -1) - h[:, 32:].pow(2), -1).mean(),
    "dice": lambda h: (
        1 - (2 * (torch.sigmoid(4 * h) * TARGET).sum() + 1) / (torch.sigmoid(4 * h).sum() + TARGET.sum() + 1)
    ),
    "determinant": lambda h: torch.linalg.slogdet(_gram(h))[1],
    "cholesky": lambda h: torch.linalg.cholesky(_gram(h)).diagonal().log().mean(),
    "solve": lambda h: torch.linalg.solve(_gram(h), EYE[:, :4]).pow(2).mean(),
    "svd": lambda h: torch.linalg.svdvals(h).mul(torch.arange(64.0)).mean(),
    "qr": lambda h: torch.linalg.qr(_gram(h))[1].diagonal().abs().log().mean(),
    "matrix exponential": lambda h: torch.linalg.matrix_exp(_gram(h) / 4).mean(),
    "nuclear": lambda h: torch.linalg.matrix_norm(_gram(h), "nuc"),
}
