"""is_bounded: functions that may be computed again from a noisy number, and those that may not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from actcompile.passes._bounded import has_pole, is_bounded


def found(function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> bool:
    graph = make_fx(function)(torch.zeros(4, dtype=dtype)).graph
    (root,) = graph.find_nodes(op="placeholder")
    return is_bounded([node for node in graph.nodes if node.op == "call_function"], root)


def gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(x * x * -0.5) * (2 * torch.pi) ** -0.5


def silu_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x)))


BOUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x.clone(),
    "line": lambda x: 3 * x - 2,
    "relu": lambda x: x.relu(),
    "leaky relu": lambda x: torch.where(x > 0, x, x * 0.01),
    "abs": lambda x: x.abs(),
    "clamp": lambda x: x.clamp(-1, 2),
    "sigmoid": lambda x: x.sigmoid(),
    "sigmoid by its parts": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": lambda x: x.tanh(),
    "difference from tanh": lambda x: x - x.tanh(),
    "hard sigmoid": lambda x: F.hardsigmoid(x),
    "silu": lambda x: x * x.sigmoid(),
    "silu's slope": silu_slope,
    "gelu": lambda x: F.gelu(x),
    "gelu's slope": gelu_slope,
    "mish": lambda x: x * torch.tanh(torch.log1p(torch.exp(x.clamp(max=20)))),
    "softplus": lambda x: F.softplus(x),
    "softplus' slope": lambda x: torch.where(x > 20, 1.0, x.exp() / (x.exp() + 1)),
    "elu": lambda x: F.elu(x),
    "elu's slope": lambda x: torch.where(x <= 0, x.exp(), 1.0),
    "log of sigmoid": lambda x: x.clamp(max=0) - torch.log1p(torch.exp(-x.abs())),
    "smooth root": lambda x: torch.sqrt(x * x + 1),
}

UNBOUNDED: dict[str, Callable[[Tensor], Tensor]] = {
    # They grow faster than a line.
    "exponential": lambda x: x.exp(),
    "square": lambda x: x * x,
    "relu to a power": lambda x: x.relu() ** 1.5,
    # They have poles, and spots that are steep.
    "inverse": lambda x: 1 / x,
    "inverse of a shifted square": lambda x: 1 / (x * x + 1e-6),
    "log": lambda x: x.log(),
    "root": lambda x: x.sqrt(),
    "root of relu": lambda x: torch.sqrt(x.relu() + 1e-6),
    # They jump.
    "floor": lambda x: x.floor(),
    "sign": lambda x: x.sign(),
    "step": lambda x: torch.where(x > 0, 1.0, 0.0),
    "selu's slope": lambda x: torch.where(x <= 0, x.exp() * 1.7580993408473766, 1.0507009873554805),
    # They oscillate.
    "sine": lambda x: x.sin(),
    "cosine": lambda x: x.cos(),
    "slow sine": lambda x: torch.sin(x * 0.01),
    "fast sine": lambda x: torch.sin(x * 100),
    "line and sine": lambda x: x + torch.sin(x),
    # They are humps, or holes, which are humps less a constant.
    "tanh's slope": lambda x: 1 - x.tanh() * x.tanh(),
    "square of tanh": lambda x: x.tanh() * x.tanh(),
    "sigmoid's slope": lambda x: x.sigmoid() * (1 - x.sigmoid()),
    "normal density": lambda x: torch.exp(x * x * -0.5),
    "its slope": lambda x: x * torch.exp(-x * x),
    "wide hump": lambda x: torch.exp(x * x * -1e-4),
    "zero": lambda x: x * 0,
    # More elements decide than the one.
    "cumulative sum": lambda x: x.cumsum(0),
    "sum": lambda x: x.sum(),
}


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ramps_and_steps_are_bounded(name: str, dtype: torch.dtype) -> None:
    assert found(BOUNDED[name], dtype)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_everything_else_is_not(name: str) -> None:
    assert not found(UNBOUNDED[name])


def test_constants_are_no_roots() -> None:
    assert found(lambda x: torch.where(x > 0, x, torch.full((), 0.0)))
    assert not found(lambda x: torch.where(x > 0, torch.full((), 1.0), torch.full((), 0.0)))


def test_what_reads_another_tensor_is_no_function_of_one() -> None:
    graph = make_fx(lambda x, y: x + y)(torch.zeros(4), torch.zeros(4)).graph
    root, _ = graph.find_nodes(op="placeholder")
    assert not is_bounded([node for node in graph.nodes if node.op == "call_function"], root)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: 1 / x, True),
        (lambda x: torch.where(x == 0, 0, 0.5 / x.clamp(min=0).sqrt()), True),
        (lambda x: x.abs().log(), False),
        (lambda x: 1 / (x.abs() + 1e-3), False),
        (lambda x: x.sigmoid() / F.softplus(x), False),
        (lambda x: x.exp(), False),
    ],
)
def test_poles(function: Callable[[Tensor], Tensor], expected: bool) -> None:
    graph = make_fx(function)(torch.zeros(4)).graph
    (root,) = graph.find_nodes(op="placeholder")
    assert has_pole([node for node in graph.nodes if node.op == "call_function"], root) is expected
