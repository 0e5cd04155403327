"""profile: plans ahead of training, for any batch size, and nothing changed by it."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import actcompile
from actcompile import Config, ConfigError, Plan

from ..models import cosine, gpt

SMALL = Config(bits=4, min_numel=256)


class Model(nn.Module):
    """With a buffer that its forward writes, dropout, and a layer that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 64))
        self.frozen = nn.Linear(64, 8).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 64] -> [B, 8]."""
        return self.frozen(self.body(x) + random.random() + float(np.random.rand()))


def gpt_step() -> Callable[[], Tensor]:
    """A function of a model that returns its loss."""
    task = gpt()
    model = task.model
    return lambda: task.loss(model)


def state(model: nn.Module) -> dict[str, object]:
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[union-attr, index]
        "noise": actcompile.get_rng_state(),
        "mode": [module.training for module in model.modules()],
    }


def test_nothing_changes() -> None:
    model = Model()
    x = torch.randn(16, 64)
    model(x).sum().backward()
    before = state(model)
    plan = actcompile.profile(model, x, loss=lambda y: y.square().mean(), config=SMALL)
    assert [decision.bits for decision in plan.values() if decision.bits]
    after = state(model)
    torch.testing.assert_close(after.pop("values"), before.pop("values"), rtol=0, atol=0)
    torch.testing.assert_close(after.pop("grads"), before.pop("grads"), rtol=0, atol=0)
    assert torch.equal(after.pop("torch"), before.pop("torch"))  # type: ignore[arg-type]
    assert after == before
    assert not actcompile.report().rows


@pytest.mark.parametrize("batch", [4, 16, 17])
def test_plan_serves_other_batch_sizes(batch: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 8))
    plan = actcompile.profile(model, torch.randn(4, 64), loss=lambda y: y.square().mean(), config=SMALL)
    x = torch.randn(batch, 64)
    exact = torch.autograd.grad(model(x).square().mean(), list(model.parameters()))
    call = torch.compile(model, backend="act", options={"plan": plan, "lowering": "eager"}, dynamic=False)
    noisy = torch.autograd.grad(call(x).square().mean(), list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    assert 0.98 < cosine(dict(zip(names, noisy, strict=True)), dict(zip(names, exact, strict=True))) < 1
    assert {row.bits for row in actcompile.report(model).rows} == {decision.bits for decision in plan.values()}


def test_saved_plan_is_the_same(tmp_path: object) -> None:
    plan = actcompile.profile(gpt_step(), config=SMALL)
    path = f"{tmp_path}/plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert len({decision.bits for decision in plan.values()}) > 2


def test_memory_and_noise_are_targets() -> None:
    step = gpt_step()
    few, many = (actcompile.profile(step, config=Config(noise=noise, min_numel=256)) for noise in (0.3, 1e-4))
    mean = [sum(decision.bits or 32 for decision in plan.values()) for plan in (few, many)]
    assert mean[0] < mean[1]
    with pytest.raises(ConfigError, match="memory must leave room for what is saved at 1 bit"):
        actcompile.profile(step, config=Config(memory=1, min_numel=256))


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: actcompile.profile(nn.Linear(4, 4), torch.ones(2, 4)), "one number to differentiate, got Tensor"),
    (lambda: actcompile.profile(nn.ReLU(), torch.ones(2, 4)), "parameters that require gradients, got none"),
    (lambda: actcompile.profile(nn.Linear(4, 4), config=Config(level="L0")), "leave bits to be chosen, got .*bits=32"),
    (
        lambda: actcompile.profile(nn.Linear(4, 4), config=Config(plan=Plan())),
        r"leave bits to be chosen, got plan=Plan",
    ),
    (lambda: actcompile.profile(3), "model must be a torch.nn.Module or a function, got int"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


@pytest.mark.slow
def test_second_step_is_compiled() -> None:
    """Interpreted and probed first, then compiled by Inductor with more than one width; gradients are close in both."""
    task = gpt(layers=1)
    exact = task.gradients()
    call = torch.compile(task.model, backend="act", options={"auto": True, "min_numel": 256})
    first = actcompile.report(task.model)
    for _ in range(3):
        assert cosine(task.gradients(call), exact) > 0.98
    assert not first.rows
    assert len({row.bits for row in actcompile.report(task.model).rows if row.bits}) > 1
