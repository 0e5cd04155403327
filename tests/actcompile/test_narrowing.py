"""Indices are stored in the narrowest type that holds those of every call, not those of the traced one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from actcompile import records

OPTIONS = {"level": "L0", "lowering": "eager", "min_numel": 1}

# Each has indices along the batch that its backward reads.
STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda y: y.max(0)[0].square().sum(),
    "min": lambda y: y.min(0)[0].square().sum(),
    "sort": lambda y: (y.sort(0)[0] * torch.arange(y.shape[0])[:, None]).square().sum(),
    "topk": lambda y: y.topk(8, 0)[0].square().sum(),
    "argmax": lambda y: y.gather(0, y.argmax(0, keepdim=True)).square().sum(),
    "argmin": lambda y: y.flatten()[y.argmin()].square(),
    "pool": lambda y: torch.nn.functional.adaptive_max_pool2d(y[None, None], (3, 3)).square().sum(),
}


def narrowed() -> set[torch.dtype | None]:
    plans = [record.plan for record in records.finished()]
    return {decision.dtype for plan in plans for decision in plan.values() if decision.action == "narrow"}


def gradient(layer: nn.Linear, step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    layer.zero_grad()
    step(x).backward()
    assert layer.weight.grad is not None
    return layer.weight.grad.clone()


@pytest.mark.parametrize("name", STEPS)
def test_batches_that_grow(name: str) -> None:
    layer = nn.Linear(16, 8)

    def step(x: Tensor) -> Tensor:
        return STEPS[name](layer(x))

    compiled = torch.compile(step, backend="act", dynamic=True, options=OPTIONS)
    for batch in (20, 30, 300, 40000):
        x = torch.randn(batch, 16)
        torch.testing.assert_close(gradient(layer, compiled, x), gradient(layer, step, x))


def test_static_sizes_are_narrowed() -> None:
    layer, x = nn.Linear(16, 8), torch.randn(32, 16)
    compiled = torch.compile(lambda x: STEPS["sort"](layer(x)), backend="act", dynamic=False, options=OPTIONS)
    gradient(layer, compiled, x)
    assert narrowed() == {torch.uint8}


def test_bounds_that_are_guarded_count() -> None:
    """The user's bound is checked at every call; beyond it, the model is compiled again."""
    layer = nn.Linear(16, 8)

    def step(x: Tensor) -> Tensor:
        return STEPS["sort"](layer(x))

    compiled = torch.compile(step, backend="act", options=OPTIONS)
    x = torch.randn(20, 16)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=32)
    gradient(layer, compiled, x)
    assert narrowed() == {torch.uint8}
    for batch in (30, 300):
        x = torch.randn(batch, 16)
        torch.testing.assert_close(gradient(layer, compiled, x), gradient(layer, step, x))


@pytest.mark.parametrize("bits", [32, 8])
def test_a_layer_without_features(bits: int) -> None:
    """An optional branch that is switched off."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.optional, self.out = nn.Linear(32, 16), nn.Linear(0, 16, bias=False), nn.Linear(16, 8)

        def forward(self, x: Tensor, extra: Tensor) -> Tensor:
            return self.out(torch.tanh(self.main(x) + self.optional(extra))).square().mean()

    model, inputs = Net(), (torch.randn(64, 32), torch.zeros(64, 0))
    model(*inputs).backward()
    exact = {name: value.grad for name, value in model.named_parameters()}
    model.zero_grad()
    options = {"bits": bits, "lowering": "eager", "min_numel": 0}
    torch.compile(model, backend="act", options=options)(*inputs).backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, exact[name], rtol=0.1, atol=0.02 if bits == 8 else 1e-6)
