"""Rows of a softmax that allow nothing: what the model throws away changes no gradient, and nan is where eager's is."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import actcompile

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Relative errors of one draw; eager's own are of another order.
TOLERANCE = {8: 0.02, 4: 0.3}


def by_hand(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    p = (q @ k.transpose(-1, -2) / 4).masked_fill(~allowed, -math.inf).softmax(-1)
    return p.masked_fill(~allowed, 0.0) @ v


def additive_bias(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    bias = torch.zeros_like(allowed, dtype=q.dtype).masked_fill(~allowed, -math.inf)
    p = (q @ k.transpose(-1, -2) / 4 + bias).softmax(-1)
    return torch.where(allowed, p, 0.0) @ v


def kept(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / 4).masked_fill(~allowed, -math.inf).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    # A bias that needs a gradient takes plain math.
    bias = (q[:1, :1, :, :1] * 0).expand(1, 1, -1, k.shape[-2]).masked_fill(~allowed, -math.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class Attention(nn.Module):
    """Attention in one layer, by ``attend``."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.qkv, self.out, self.other = nn.Linear(64, 192), nn.Linear(64, 64), nn.Linear(64, 64)
        self.attend = attend

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = self.attend(q, k, v, allowed)
        # Of another branch, which nan does not reach.
        return self.out(attended.transpose(1, 2).flatten(2)).square().mean() + F.gelu(self.other(x)).square().mean()


def gradients(model: nn.Module, *args: Tensor, **options: object) -> dict[str, Tensor]:
    """Those of one step; with ``options``, of a compiled one."""
    model.zero_grad()
    torch._dynamo.reset()
    actcompile.reset()
    run = torch.compile(model, backend="act", options={"lowering": "eager", "min_numel": 0, **options})
    (run if options else model)(*args).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def inputs(length: int) -> tuple[Tensor, Tensor]:
    """Tokens, and which keys each may see: the first of them none."""
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[: max(1, length // 20)] = False
    return torch.randn(2, length, 64), allowed


@pytest.mark.parametrize("bits", TOLERANCE)
@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("length", [7, 64, 100, 197])
@pytest.mark.parametrize("attend", [by_hand, sdpa], ids=lambda attend: attend.__name__)
def test_rows_that_are_thrown_away_change_no_gradient(attend: Attend, length: int, recompute: str, bits: int) -> None:
    torch.manual_seed(0)
    model, (x, allowed) = Attention(attend), inputs(length)
    exact = gradients(model, x, allowed)
    got = gradients(model, x, allowed, bits=bits, recompute=recompute)
    assert any(row.action == "quantize" for row in actcompile.report().rows)
    for name, gradient in exact.items():
        assert gradient.isfinite().all()
        assert got[name].isfinite().all(), name
        assert (got[name] - gradient).norm() <= TOLERANCE[bits] * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("bits", TOLERANCE)
@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("length", [64, 100])
@pytest.mark.parametrize("attend", [kept, additive_bias], ids=lambda attend: attend.__name__)
def test_nan_that_the_model_keeps_is_where_eagers_is(attend: Attend, length: int, recompute: str, bits: int) -> None:
    torch.manual_seed(0)
    model, (x, allowed) = Attention(attend), inputs(length)
    exact = gradients(model, x, allowed)
    got = gradients(model, x, allowed, bits=bits, recompute=recompute)
    broken = {name: not gradient.isfinite().all() for name, gradient in exact.items()}
    assert broken["qkv.weight"]
    assert not broken["other.weight"]
    assert {name: not gradient.isfinite().all() for name, gradient in got.items()} == broken


class Selected(nn.Module):
    """Single elements are infinite, selected against and thrown away."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        powers = y.masked_fill(y > 1, math.inf).exp()
        return self.second(torch.where(y > 1, 0.0, powers)).square().mean()


@pytest.mark.parametrize("bits", TOLERANCE)
@pytest.mark.parametrize("width", [64, 100])
def test_elements_that_are_thrown_away(width: int, bits: int) -> None:
    torch.manual_seed(0)
    model, x = Selected(width), torch.randn(256, width)
    exact, got = gradients(model, x), gradients(model, x, bits=bits)
    for name, gradient in exact.items():
        assert got[name].isfinite().all(), name
        assert (got[name] - gradient).norm() <= TOLERANCE[bits] * gradient.norm(), name


class Overflow(nn.Module):
    """One column of a layer's input is infinite; its gradient is that of one column of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        y = self.first(x).sin() * factor
        return (self.second(y) * x[:, :32].detach()).nan_to_num(0.0, 0.0, 0.0).sum()


@pytest.mark.parametrize("bits", TOLERANCE)
def test_an_infinite_column_reaches_its_own_gradients_alone(bits: int) -> None:
    torch.manual_seed(0)
    model, x, factor = Overflow(), torch.randn(64, 64), torch.ones(128)
    factor[5] = math.inf
    exact, got = gradients(model, x, factor), gradients(model, x, factor, bits=bits)
    assert 0 < exact["second.weight"].isfinite().sum() < exact["second.weight"].numel()
    assert torch.equal(got["second.weight"].isfinite(), exact["second.weight"].isfinite())
