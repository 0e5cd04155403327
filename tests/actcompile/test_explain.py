"""explain: what a step would save, and that asking changes nothing."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import actcompile
from actcompile import CompileError, Config, ConfigError
from actcompile.reporting import Report

from ..models import Task, bert, gpt, resnet

EAGER = Config(lowering="eager")


def contents(report: Report) -> list[tuple[object, ...]]:
    return [(row.op, row.shape, row.dtype, row.action, row.bits, row.stored_nbytes, row.kind) for row in report.rows]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("make", [lambda: gpt(0.1), lambda: bert(0.1), resnet], ids=["gpt", "bert", "resnet"])
def test_says_what_a_step_reports(make: Callable[[], Task]) -> None:
    task = make()
    expected = actcompile.explain(lambda: task.loss(task.model), config=EAGER)
    torch.compile(lambda: task.loss(task.model), backend="act", options={"config": EAGER})().backward()
    report = actcompile.report(task.model)
    assert contents(expected) == contents(report) != []
    assert expected.saved_nbytes == report.saved_nbytes
    assert expected.baseline_nbytes == report.baseline_nbytes
    assert expected.predicted_peak_nbytes == report.predicted_peak_nbytes


@pytest.mark.slow
def test_says_what_inductor_saves() -> None:
    """Random numbers are drawn by other operators than in interpreted graphs."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Dropout(), nn.GELU(), nn.Linear(64, 8)), torch.randn(128, 64)
    expected = actcompile.explain(model, x)
    torch.compile(model, backend="act")(x).sum().backward()
    assert contents(expected) == contents(actcompile.report(model))
    assert contents(expected) != contents(actcompile.explain(model, x, config=EAGER))


@pytest.mark.parametrize("make", [lambda: gpt(0.1), lambda: bert(0.1), resnet], ids=["gpt", "bert", "resnet"])
def test_changes_nothing(make: Callable[[], Task]) -> None:
    task = make()
    before, random = state_of(task.model), torch.get_rng_state()
    identities = [id(value) for value in (*task.model.parameters(), *task.model.buffers())]
    assert actcompile.explain(lambda: task.loss(task.model)).rows
    assert actcompile.get_rng_state() == {"position": 0}
    assert torch.equal(torch.get_rng_state(), random)
    assert not actcompile.report().rows
    assert [id(value) for value in (*task.model.parameters(), *task.model.buffers())] == identities
    torch.testing.assert_close(task.model.state_dict(), before, rtol=0, atol=0)
    assert all(value.grad is None for value in task.model.parameters())


def test_computes_nothing() -> None:
    """A model that no machine holds."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(10**5, 10**5), nn.GELU(), nn.Linear(10**5, 10**5))
        x = torch.empty(10**4, 10**5)
    report = actcompile.explain(model, x)
    assert report.baseline_nbytes > 7 * 2**30
    assert report.ratio > 7


def test_python_state_is_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.register_buffer("mean", torch.zeros(64))
            self.calls, self.outputs = 0, []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y = self.fc(x).exp()
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            self.outputs.append(y)
            return y.sin()

    model = Counting()
    assert actcompile.explain(model, torch.randn(64, 64)).rows
    assert (model.calls, model.outputs) == (0, [])
    assert type(model.mean) is torch.Tensor and not model.mean.any()


def test_functions_and_keyword_arguments() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    x, labels = torch.randn(128, 64), torch.randint(10, (128,))

    def loss(x: Tensor, *, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(x), labels)

    assert len(actcompile.explain(loss, x, labels=labels).rows) > len(actcompile.explain(model, x).rows) > 0


def test_model_output_with_a_loss() -> None:
    task = bert()
    ids, mask, labels = task.inputs
    report = actcompile.explain(task.model, input_ids=ids, attention_mask=mask, labels=labels)
    assert "bert.encoder.layer.0.intermediate.dense" in {row.module for row in report.rows}


def test_graph_breaks() -> None:
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)

    def function(x: Tensor) -> Tensor:
        y = first(x).sin()
        torch._dynamo.graph_break()
        return second(y).sin()

    # Beyond Dynamo's limit of compilations for one piece of code.
    reports = [actcompile.explain(function, torch.randn(64, 64)) for _ in range(10)]
    assert all(len(report.timelines) == 2 for report in reports)
    assert len({tuple(contents(report)) for report in reports}) == 1


def test_bits_and_sizes_follow_the_arguments() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU())
    small, large = (actcompile.explain(model, torch.randn(size, 64)) for size in (64, 256))
    assert large.baseline_nbytes == 4 * small.baseline_nbytes
    assert all(isinstance(size, int) for row in large.rows for size in row.shape)
    two = actcompile.explain(model, torch.randn(256, 64), config=Config(bits=2))
    assert two.saved_nbytes < 0.6 * large.saved_nbytes


def test_compiled_and_transformed_models() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)), torch.randn(64, 64)
    expected = contents(actcompile.explain(model, x))
    assert contents(actcompile.explain(torch.compile(model), x)) == expected
    assert contents(actcompile.explain(actcompile.transform(model), x)) == expected


def test_training_afterwards_compiles_once() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)), torch.randn(64, 64)
    actcompile.explain(model, x)
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model, backend="act", options={"lowering": "eager"})
    for size in (64, 64):
        step(torch.randn(size, 64)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert {row.shape[0] for row in actcompile.report(model).rows if row.action == "quantize"} == {64}


def test_works_without_gradients_enabled() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU()), torch.randn(64, 64)
    with torch.no_grad():
        assert actcompile.explain(model, x).rows


def test_a_model_that_reads_values() -> None:
    model = nn.Linear(64, 64)

    def function(x: Tensor) -> Tensor:
        y = model(x)
        return y * 2 if y.sum() > 0 else y

    before = torch.get_rng_state()
    with pytest.raises(CompileError, match=r"train one step .* and call actcompile.report"):
        actcompile.explain(function, torch.randn(64, 64))
    assert not actcompile.report().rows
    del before


@pytest.mark.parametrize(
    ("model", "config", "rule"),
    [
        (3, None, "model must be a torch.nn.Module or a function, got int"),
        (nn.Linear(64, 64), 4, "config must be an actcompile.Config"),
        (nn.Linear(64, 64, device="meta"), None, "got tensors on meta"),
        (nn.Sequential(nn.Linear(64, 64), nn.GELU()), Config(plan=actcompile.Plan()), "made for another model"),
    ],
)
def test_bad_input(model: object, config: object, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        actcompile.explain(model, torch.randn(64, 64), config=config)  # type: ignore[arg-type]
    assert actcompile.get_rng_state() == {"position": 0}
