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


def stored_by(step: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What is stored of a step, by operator, at 4 bits."""
    actcompile.reset()
    torch.compile(step, backend="act", options={"bits": 4, "lowering": "eager", "min_numel": 1})(x).backward()
    return {row.op: (row.action, row.shape) for row in actcompile.report().rows}


def test_few_numbers_that_many_are_made_of_stay_exact() -> None:
    layer, rates = nn.Linear(8, 16), nn.Parameter(torch.rand(64))
    stored = stored_by(lambda x: torch.exp(-layer(x)[:, :, None] * rates).square().mean(), torch.randn(32, 8))
    assert stored["addmm"] == ("keep", (32, 16))
    assert "exp" not in stored


def test_operands_of_grouped_products_have_codes() -> None:
    layer, experts = nn.Linear(64, 64).bfloat16(), nn.Parameter(torch.randn(3, 64, 64).bfloat16())
    ends = torch.tensor([16, 64, 96], dtype=torch.int32)
    x = torch.randn(96, 64).bfloat16()
    stored = stored_by(lambda x: F.grouped_mm(F.gelu(layer(x)), experts, offs=ends).square().mean(), x)
    assert stored["addmm"] == stored["_grouped_mm"] == ("quantize", (96, 64))


def test_what_is_sampled_at_a_grid_has_codes_and_the_grid_has_none() -> None:
    layer, shift = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(2, 2)
    points = torch.randn(4, 16, 16, 2)
    stored = stored_by(
        lambda x: F.grid_sample(F.gelu(layer(x)), shift(points).tanh(), align_corners=False).square().mean(),
        torch.randn(4, 3, 16, 16),
    )
    assert stored["convolution"] == ("quantize", (4, 8, 16, 16))
    assert stored["tanh"] == ("keep", (4, 16, 16, 2))


def test_operators_that_split_numbers_in_two() -> None:
    layer = nn.Linear(8, 8)
    stored = stored_by(lambda x: torch.frexp(layer(x))[0].sum(), torch.randn(8, 8))
    assert stored


@pytest.mark.parametrize(("function", "expected"), [(lambda h: h, True), (lambda h: h.sigmoid() + 0.1, False)])
def test_running_products_stay_exact_where_they_are_divided_by(function: Loss, expected: bool) -> None:
    layer = nn.Linear(8, 64)
    stored_by(lambda x: torch.cumprod(function(layer(x)), -1).square().mean(), torch.randn(32, 8))
    reasons = {row.reason for row in actcompile.report().rows if row.action == "keep"}
    assert any("the gradient is divided by what it is made of" in reason for reason in reasons) is expected


def test_what_is_more_than_its_divisor_has_codes() -> None:
    """Noise in weights of a mean, of which the rest of the model is made, is no noise in what these are divided by."""
    layer, gate, other = nn.Linear(8, 64), nn.Linear(8, 64), nn.Linear(64, 64)

    def loss(x: Tensor) -> Tensor:
        weights = gate(x).sigmoid()
        hidden = layer(x) + weights / weights.sum(-1, keepdim=True)
        normalized = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        return other(normalized).square().mean()

    stored_by(loss, torch.randn(32, 8))
    assert not any("divided by" in row.reason for row in actcompile.report().rows)


def test_what_gradients_meet_in_logarithms_stays_exact() -> None:
    layer, other = nn.Linear(8, 64), nn.Linear(64, 64)
    stored = stored_by(lambda x: other(torch.logcumsumexp(layer(x), -1)).relu().mean(), torch.randn(32, 8))
    assert stored["logcumsumexp"] == stored["addmm"] == ("keep", (32, 64))
    assert stored["le"][0] == "pack"
