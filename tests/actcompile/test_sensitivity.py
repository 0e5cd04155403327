"""Predicted against measured noise, and that probing leaves training alone."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import actcompile
from actcompile import Plan, records
from actcompile._sweep import Sweep
from actcompile.choices import CODE_BITS
from actcompile.plan import Action, Decision, Profile, SavedTensor, Sensitivity
from actcompile.triton_kernels._chunked import rounding_variance

from ..models import Task, bert, gpt, resnet

TASKS: dict[str, Callable[[], Task]] = {"gpt": gpt, "bert": bert, "resnet": resnet}
OPTIONS = {"lowering": "eager", "min_numel": 256}
KEEP = Decision(Action.KEEP, "test")


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in gradients.values()])


def compiled(model: nn.Module, **options: object) -> Callable[..., object]:
    torch._dynamo.reset()
    return torch.compile(model, backend="act", options={**OPTIONS, **options})


def probed(task: Task, **options: object) -> tuple[dict[str, SavedTensor], Profile]:
    """Rows and profile after two steps."""
    call = compiled(task.model, auto=True, **options)
    task.gradients(call)
    task.gradients(call)
    (record,) = records.finished()
    assert record.profile is not None
    return {row.key: row for row in record.rows}, record.profile


def measured(task: Task, plan: Plan, draws: int) -> float:
    """The mean of |g' - g|^2."""
    exact = flat(task.gradients())
    call = compiled(task.model, plan=plan)
    return sum(float((flat(task.gradients(call)) - exact).square().sum()) for _ in range(draws)) / draws


@pytest.mark.parametrize("name", TASKS)
def test_prediction_is_what_is_measured(name: str) -> None:
    """Of the tensors that carry most of the noise, each by itself, and of all together.

    One draw of the direction leaves a wide spread for tensors that reach the gradient through few numbers.
    """
    task = TASKS[name]()
    rows, profile = probed(task)
    known = profile.sensitivities
    codec = Decision(Action.QUANTIZE, "test", bits=4, group_size=256)
    predicted = sum(value.variance[4] for value in known.values())
    largest = [key for key in known if known[key].variance[4] > 0.1 * predicted][:3]
    assert largest
    for key in largest:
        found = measured(task, Plan({**dict.fromkeys(rows, KEEP), key: codec}), 32)
        assert 0.7 < known[key].variance[4] / found < 1.4, key
    total = measured(task, Plan({key: codec if key in known else KEEP for key in rows}), 16)
    assert 0.7 < predicted / total < 1.4
    assert profile.gradient_square == pytest.approx(float(flat(task.gradients()).square().sum()), rel=0.05)


def test_backward_that_autograd_refuses_is_measured_tensor_by_tensor(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = gpt(layers=1)
    _, known = probed(task)

    def refuse(*args: object) -> None:
        raise RuntimeError("derivative for aten::something is not implemented")

    actcompile.reset()
    monkeypatch.setattr(Sweep, "pull_back", refuse)
    _, measured_profile = probed(task)
    assert "derivative for aten::something" in caplog.text
    assert {value.method for value in measured_profile.sensitivities.values()} == {"perturbed"}
    totals = [sum(v.variance[4] for v in profile.sensitivities.values()) for profile in (known, measured_profile)]
    assert 0.5 < totals[0] / totals[1] < 2


def test_allocated_bits_beat_uniform_ones() -> None:
    task = gpt()
    rows, profile = probed(task, bits=4)
    automatic = actcompile.report(task.model)
    (record,) = records.finished()
    codec = Decision(Action.QUANTIZE, "test", bits=4, group_size=256)
    uniform = Plan({key: codec if key in profile.sensitivities else KEEP for key in rows})
    assert 1.3 * measured(task, record.plan, 8) < measured(task, uniform, 8)
    actcompile.reset()
    task.gradients(compiled(task.model, bits=4))
    assert automatic.saved_nbytes <= actcompile.report(task.model).saved_nbytes


def test_probing_disturbs_nothing() -> None:
    """Dropout, buffers and gradients are those of a run that is not probed."""
    results = []
    for auto in (False, True):
        torch.manual_seed(0)
        actcompile.set_rng_state({"position": 0})
        task = resnet()
        task.model.stem.append(nn.Dropout(0.5))
        call = compiled(task.model, auto=auto, bits=8, seed=1)
        first = task.gradients(call)
        results.append((first, dict(task.model.named_buffers()), torch.get_rng_state()))
    torch.testing.assert_close(results[0], results[1])


def test_every_width_gets_noise_that_falls() -> None:
    _, profile = probed(gpt())
    for key, value in profile.sensitivities.items():
        noises = [value.variance[bits] for bits in sorted(value.variance)]
        assert noises == sorted(noises, reverse=True), key
        assert value.method == "probed"


def test_rounding_variance_is_that_of_the_codec() -> None:
    x = torch.randn(4096).relu()
    predicted = rounding_variance(x, (1, 2, 4, 8), 256)
    for column, bits in enumerate((1, 2, 4, 8)):
        squares = torch.zeros(4096)
        for seed in range(200):
            codes = torch.ops.actcompile.quantize(x, bits, 256, torch.tensor(seed), 0)
            decoded = torch.ops.actcompile.dequantize(*codes, bits, 256, x.shape, x.stride(), x.dtype)
            squares += (decoded - x).square() / 200
        torch.testing.assert_close(squares.view(-1, 256).mean(1), predicted[:, column], rtol=0.15, atol=1e-9)


def test_rounding_variance_of_odd_groups() -> None:
    x = torch.cat([torch.full((256,), 3.0), torch.randn(256), torch.tensor([1.0, float("nan")])])
    predicted = rounding_variance(x, (4,), 256)
    assert predicted.shape == (3, 1)
    assert predicted[0, 0] == 0 and predicted[1, 0] > 0 and predicted[2, 0] == 0


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_pairs_of_tensors_on_few_bits_are_counted(name: str) -> None:
    """Queries and keys on one bit each add several times what both add alone.

    What is measured for two bits is carried over to one bit, where it holds within a factor of two.
    """
    task = TASKS[name]()
    rows, profile = probed(task)
    known = {key: value for key, value in profile.sensitivities.items() if "permute" in key}

    def ratios(bits: int) -> tuple[float, float]:
        codec = Decision(Action.QUANTIZE, "test", bits=bits, group_size=256)
        found = measured(task, Plan({**dict.fromkeys(rows, KEEP), **dict.fromkeys(known, codec)}), 16)
        alone = sum(value.variance[bits] for value in known.values())
        return alone / found, sum(value.noise(bits) for value in known.values()) / found

    assert 0.7 < ratios(2)[1] < 1.4
    alone, together = ratios(1)
    assert alone < 0.4
    assert 0.7 < together < 2


def test_a_gradient_that_is_not_finite_is_not_probed(caplog: pytest.LogCaptureFixture) -> None:
    """Training with a scaled loss begins with steps that overflow and are left out."""
    task = gpt(layers=1)
    call = compiled(task.model, auto=True)
    (task.loss(call) * torch.inf).backward()
    task.model.zero_grad()
    assert "the gradient is not finite" in caplog.text
    assert all(record.profile is None for record in records.finished())
    exact = task.gradients()
    for _ in range(2):
        found = task.gradients(call)
    (record,) = records.finished()
    assert record.profile is not None
    assert all(v.variance[4] > 0 for v in record.profile.sensitivities.values())
    assert torch.cosine_similarity(flat(found), flat(exact), dim=0) > 0.98


def test_sensitivities_that_are_not_finite_are_unknown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = actcompile.sensitivity.measure

    def broken(*args: Any) -> dict[str, Sensitivity]:
        found = original(*args)
        first = min(found)
        return {**found, first: Sensitivity(dict.fromkeys(CODE_BITS, math.nan), "probed")}

    monkeypatch.setattr(actcompile.sensitivity, "measure", broken)
    _, profile = probed(gpt(layers=1))
    assert profile.sensitivities
    assert "taken as unknown" in caplog.text


class Broken(nn.Module):
    """Two layers, a graph break, and a loss in a graph of its own, whose noise all passes on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 512)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """[B, 64] -> loss."""
        logits = self.second(nn.functional.gelu(self.first(x)))
        torch._dynamo.graph_break()
        return nn.functional.cross_entropy(3 * logits, targets)


def test_noise_of_a_loss_in_its_own_graph_counts_for_what_it_becomes() -> None:
    """Its gradient of the logits is small beside that of the weights, and the same share of it is lost in both."""
    model, x, targets = Broken(), torch.randn(256, 64), torch.randint(512, (256,))
    call = compiled(model, auto=True)
    for _ in range(2):
        call(x, targets).backward()
    first, loss = (record.profile for record in records.finished())
    assert first is not None and loss is not None
    assert loss.gradient_square == loss.handed_square == 0 and first.gradient_square > 0
    raw = records.finished()[1].probe.profile  # type: ignore[union-attr]
    assert raw is not None and raw.own_square == 0
    for key, found in loss.sensitivities.items():
        share = raw.sensitivities[key].variance[4] / raw.handed_square
        assert found.variance[4] / first.gradient_square == pytest.approx(share)
