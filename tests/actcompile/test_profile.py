"""profile: plans ahead of training, for any batch size, and nothing changed by it."""

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import actcompile
from actcompile import Config, ConfigError, Plan, backend, records
from actcompile.following import follow
from actcompile.planner import counted_nbytes
from actcompile.records import GraphRecord
from actcompile.sensitivity import Probe

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


def probed_steps(model: nn.Module, batches: Sequence[int], **options: object) -> list[GraphRecord]:
    """Trains a step per batch size; the records of what was compiled."""
    step = torch.compile(model, backend="act", options={"lowering": "eager", "min_numel": 0, "auto": True, **options})
    for batch in batches:
        step(torch.randn(batch, 64)).square().mean().backward()
    return [record for record in records._records if record.rows]


def counted(record: GraphRecord) -> int:
    return counted_nbytes(record.rows, record.plan)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 8))


@pytest.mark.parametrize("dynamic", [False, True])
def test_other_sizes_reuse_what_the_first_probe_found(dynamic: bool) -> None:
    """The same code of the same model, compiled again: no second probe, no second interpreted step."""
    probes = []

    class Counted(Probe):
        def interpret(self, graph: fx.GraphModule, is_backward: bool) -> Callable[[list[object]], object]:
            run = super().interpret(graph, is_backward)

            def call(args: list[object]) -> object:
                probes.append(is_backward)
                return run(args)

            call._boxed_call = True  # type: ignore[attr-defined]
            return call

    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(automatic_dynamic_shapes=dynamic):
        patch.setattr(backend, "Probe", Counted)
        made = probed_steps(layers(), (4, 4, 32, 33, 4))
    # One forward and one backward were interpreted.
    assert probes == [False, True]
    assert [record.own_profile is not None for record in made] == [True, *[False] * (1 if dynamic else 2)]
    assert made[0].solved == made[0].plan
    assert all(dict(record.plan) == dict(made[0].plan) for record in made)
    assert all(record.plan.graphs == (record.sites,) for record in made)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_another_model_of_the_same_code_is_probed() -> None:
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        made = [probed_steps(Stack(), (batch, batch))[-1] for batch in (16, 32)]
    assert [record.own_profile is not None for record in made] == [True, True]
    assert made[0].sites == made[1].sites
    assert not made[1].replaces(made[0])


def test_memory_holds_at_other_sizes() -> None:
    """What was found at 4 samples, exact bits, takes too much at 64; a share is the same at both."""
    small, large = probed_steps(layers(), (4, 4, 64, 64), memory=60_000)
    assert counted(small) <= 60_000
    assert counted_nbytes(large.rows, follow(small.plan, large.rows, large.config)) > 60_000
    assert 30_000 < counted(large) <= 60_000
    actcompile.reset()
    small, large = probed_steps(layers(), (16, 16, 64, 64), memory=0.1)
    assert counted(large) <= 0.1 * large.baseline_nbytes


def test_memory_holds_at_other_sizes_beside_the_hosts() -> None:
    """At the first size all codes are the host's: their share of the device's bytes is not nothing."""
    first, second = probed_steps(layers(), (4096, 4096, 1024, 1024, 6144), memory=2000, offload=True, min_numel=4096)[
        :2
    ]
    for record in (first, second):
        assert counted(record) <= 2000
        assert any(decision.offload for decision in record.plan.values())


def test_memory_of_a_model_that_saves_nothing_at_other_sizes() -> None:
    for record in probed_steps(nn.Linear(64, 8), (4, 4, 64, 64), memory=0.5):
        assert counted(record) == 0


def test_graphs_keep_their_shares_of_the_memory() -> None:
    first, second = layers(), nn.Sequential(nn.Linear(8, 64), nn.Sigmoid(), nn.Linear(64, 4))

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y.sin())

    made = probed_steps(Broken(), (4, 4, 64, 64), memory=50_000)
    assert [record.own_profile is not None for record in made] == [True, True, False, False]
    assert sum(counted(record) for record in made[:2]) <= 50_000
    assert 25_000 < sum(counted(record) for record in made[2:]) <= 50_000


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


def test_a_gradient_that_is_not_finite_has_no_plan() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    with pytest.raises(ConfigError, match="finite gradient to be profiled"):
        actcompile.profile(model, torch.randn(64, 64), loss=lambda y: y.square().sum() * torch.inf)
