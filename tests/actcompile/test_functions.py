"""What is saved of functions in gated and in steep places, and that their gradients are unbiased."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import actcompile
from actcompile.analysis import analyze
from actcompile.plan import Role

from ..passes.pairs import trace


@pytest.mark.parametrize("act", [nn.Tanh(), nn.Sigmoid()])
def test_gradients_of_humps_have_no_bias(act: nn.Module) -> None:
    """1 - tanh(x)^2 is a hump, in however many operators: of large values it is not computed from noisy ones."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 256, bias=False), act, nn.Linear(256, 8, bias=False)), torch.randn(2048, 64)
    model[0].weight.data *= 30
    model(x).square().mean().backward()
    exact = model[0].weight.grad
    model.zero_grad()
    torch.compile(model, backend="act", options={"lowering": "eager", "bits": 4})(x).square().mean().backward()
    got = model[0].weight.grad
    assert abs(float((got * exact).sum() / exact.square().sum()) - 1) < 0.01
    assert actcompile.report(model).ratio > 3.7


@pytest.mark.parametrize("act", [F.silu, F.gelu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_products_are_computed_again(act: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """The two factors are saved, and not what is made of them."""

    def function(gate: Tensor, up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        return (act(x @ gate) * (x @ up)) @ down

    weights = [torch.randn(32, 32, dtype=dtype, requires_grad=True) for _ in range(3)]
    pair = trace(function, *weights, torch.randn(64, 32, dtype=dtype), recompute="cheap").pair
    assert sorted(row.name for row in analyze(pair) if row.role is Role.ACTIVATION) == ["mm", "mm_1"]
