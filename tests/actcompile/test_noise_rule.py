"""Gradients of functions that turn small noise into large errors, where noise may come from: the rule of _noise.py."""

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import actcompile

from .noisy_functions import FURTHER, TRIED, Loss

# Bits -> the largest relative error of a gradient.
MOST_ERROR = {8: 0.05, 4: 0.5}


def gradient(call: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> Tensor:
    layer.zero_grad()
    call(x).backward()
    return torch.cat(
        [parameter.grad.flatten() for parameter in layer.parameters() if parameter.grad is not None]
    ).double()


@functools.cache
def draws(loss: Loss, bits: int, count: int) -> tuple[Tensor, Tensor]:
    """The exact gradient, and as many with noise: [count, numel]."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 64), torch.randn(128, 32)

    def step(x: Tensor) -> Tensor:
        return loss(layer(x))

    exact = gradient(step, layer, x)
    options = {"bits": bits, "lowering": "eager", "min_numel": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call = torch.compile(step, backend="act", options=options)
        return exact, torch.stack([gradient(call, layer, x) for _ in range(count)])


def check(loss: Loss, bits: int, count: int) -> None:
    exact, found = draws(loss, bits, count)
    assert torch.isfinite(found).all()
    errors = (found - exact).norm(dim=1) / exact.norm()
    assert errors.median() <= MOST_ERROR[bits]
    # The error of a mean of independent draws is smaller by the root of their number.
    noise = errors.square().mean().sqrt() / count**0.5
    assert (found.mean(0) - exact).norm() / exact.norm() <= 3 * noise + 1e-6


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", TRIED)
def test_functions(name: str, bits: int) -> None:
    check(TRIED[name], bits, 8)


@pytest.mark.families
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", [*TRIED, *FURTHER])
def test_more_functions(name: str, bits: int) -> None:
    check({**TRIED, **FURTHER}[name], bits, 64)


class SwiGLU(nn.Module):
    """A gated layer as language models have it."""

    def __init__(self, width: int = 256, hidden: int = 768) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return (x + self.down(F.silu(self.gate(y)) * self.up(y))).square().mean()


@pytest.mark.parametrize("spread", [0.6, 3.0, 8.0, 16.0])
@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.25)])
def test_gates_at_the_scale_of_trained_models(spread: float, bits: int, most: float) -> None:
    torch.manual_seed(0)
    model, x = SwiGLU(), torch.randn(512, 256)
    with torch.no_grad():
        model.gate.weight.mul_(spread / model.gate(model.norm(x)).std())
    exact = gradient(model, model, x)
    call = torch.compile(model, backend="act", options={"bits": bits, "lowering": "eager"})
    found = torch.stack([gradient(call, model, x) for _ in range(8)])
    assert (found - exact).norm(dim=1).mean() <= most * exact.norm()
    assert abs(found.mean(0) @ exact / (exact @ exact) - 1) <= 0.01
    stored = {
        row.op for row in actcompile.report(model).rows if row.action == "quantize" and row.module in ("gate", "up")
    }
    assert stored == {"mm"}
