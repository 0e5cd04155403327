"""``check=True``: planted faults are found and named, ordinary models pass, and training is as without it."""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import actcompile
from actcompile import Config, GradientError, records
from actcompile.passes import _noise, partition
from actcompile.triton_kernels import _chunked

from ..models import Task, bert, gpt, resnet

CHECKED = {"lowering": "eager", "check": True}
ROWS, WIDTH = 256, 128


class Net(nn.Module):
    """Two layers with a function between; ``norm`` is the module whose input is [ROWS, WIDTH]."""

    def __init__(self, function: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64)
        self.function = function
        self.register_buffer("scale", torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        """[ROWS, 64] -> loss."""
        return self.second(self.function(self.norm(self.first(x)))).square().mean()


class Written(Net):
    """Writes a buffer that the backward reads."""

    def forward(self, x: Tensor) -> Tensor:
        """[ROWS, 64] -> loss."""
        y = self.second(self.first(x)) * self.scale.exp()
        with torch.no_grad():
            self.scale.add_(1.0)
        return y.sin().square().mean()


def batch() -> Tensor:
    """[ROWS, 64]."""
    return torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: int = 1, **options: Any) -> list[list[Tensor]]:
    """The gradients of each step."""
    torch._dynamo.reset()
    actcompile.reset()
    actcompile.set_rng_state({"position": 0})
    call, found = torch.compile(model, backend="act", options={**CHECKED, "seed": 1, **options}), []
    for _ in range(steps):
        model.zero_grad()
        call(batch()).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    return found


def bias(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Lets what the first layer yields come back ``factor`` times as large."""
    decode = _chunked.dequantize_in_chunks

    def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, size: int, shape: Any, *rest: Any) -> Tensor:
        value = decode(codes, scale, zero, bits, size, shape, *rest)
        return value * factor if tuple(shape) == (ROWS, WIDTH) else value

    monkeypatch.setattr(_chunked, "dequantize_in_chunks", dequantize)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("factor", "finding"),
    [(1.05, "relative error|component along the exact one"), (2.0, "relative error of 1.5"), (math.nan, "inf or nan")],
)
def test_a_biased_decoder_is_found_and_named(
    factor: float, finding: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias(monkeypatch, factor)
    with pytest.raises(GradientError, match=finding) as found:
        train(Net(), bits=bits)
    assert f"'first/addmm' in {bits} bits (module 'first'" in str(found.value)
    assert "skip=('first',) keeps it exact, overrides={'first': 8}" in str(found.value)


def test_noise_that_a_function_multiplies_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """log's derivative is one by an argument that comes close to zero; without rules its noise goes there."""
    net = Net(lambda x: (x.square() + 1e-4).log())
    train(net, bits=8)
    monkeypatch.setattr(_noise.Noise, "_classify", lambda self, node: None)
    monkeypatch.setattr(_noise.Noise, "demands", lambda self: _noise.Demands())
    with pytest.raises(GradientError, match=r"relative error of .* should leave 0.05 at most.*'first/addmm' in 8 bits"):
        train(net, bits=8)


@pytest.mark.parametrize("options", [{"level": "L0"}, {"bits": 4}], ids=str)
def test_a_rewrite_that_computes_something_else_is_found(
    options: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without copies the backward reads what the forward wrote in the meantime."""
    train(Written(), **options)
    monkeypatch.setattr(partition, "snapshot_inputs", lambda pair: None)
    monkeypatch.setattr(partition, "mark_changing_inputs", lambda joint, roles: None)
    with pytest.raises(GradientError, match=r"where nothing is rounded, got one for .*first.* off"):
        train(Written(), **options)


@pytest.mark.parametrize("make", [gpt, bert, resnet])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_ordinary_models_pass(make: Callable[[], Task], bits: int) -> None:
    actcompile.reset()
    torch._dynamo.reset()
    task = make()
    task.gradients(torch.compile(task.model, backend="act", options={**CHECKED, "bits": bits}))
    (record,) = records.finished()
    assert record.check is not None and record.check.is_done


@pytest.mark.parametrize(
    "options",
    [
        {"auto": True},
        {"memory": 0.1},
        {"memory": "64KiB", "auto": False},
        {"sparsity": 0.8},
        {"rows": 0.5},
        {"offload": True},
        {"memory": 0.05, "auto": False, "recompute": "full"},
        {"level": "L0"},
    ],
    ids=str,
)
def test_other_settings_pass_and_steps_after_it_are_not_checked(options: dict[str, Any]) -> None:
    train(Net(), steps=4, **options)
    (record,) = records.finished()
    assert record.check is not None and record.check.is_done


@pytest.mark.parametrize("auto", [False, True])
def test_gradients_are_those_of_unchecked_steps(auto: bool) -> None:
    dropping = lambda x: F.dropout(F.gelu(x), 0.2)  # noqa: E731
    torch.manual_seed(0)
    found = train(Net(dropping), steps=3, auto=auto)
    torch.manual_seed(0)
    expected = train(Net(dropping), steps=3, auto=auto, check=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_off_by_default_nothing_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config().check is False
    train(Net(), check=False)
    (record,) = records.finished()
    assert record.check is None


def test_validation_and_other_calls_leave_the_check_alone() -> None:
    """Of two calls whose backwards come later one is checked; a forward alone is not."""
    net, call = Net(), None
    torch._dynamo.reset()
    actcompile.reset()
    call = torch.compile(net, backend="act", options=CHECKED)
    call(batch())
    first, second = call(batch()), call(batch() + 1)
    first.backward()
    (record,) = {call.record for call in actcompile.steps.latest()}
    assert record.check is not None and not record.check.is_done
    second.backward()
    assert record.check.is_done


def test_a_gradient_that_is_not_finite_leaves_it_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    torch._dynamo.reset()
    actcompile.reset()
    call = torch.compile(net, backend="act", options=CHECKED)
    (call(batch()) * math.inf).backward()
    (record,) = records.finished()
    assert record.check is not None and not record.check.is_done
    assert "the exact gradient is not finite" in caplog.text
    call(batch()).backward()
    assert record.check.is_done


def test_profile_checks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """With settings that a plan takes the place of."""
    config = Config(group_size=64, rows=0.5, recompute="none")
    with caplog.at_level(logging.WARNING, "actcompile"):
        assert actcompile.profile(Net(), batch(), config=config)
    assert "no effect" not in caplog.text
    assert actcompile.profile(Net(), batch(), config=Config(sparsity=0.8, sparse_value_bits=8))
    bias(monkeypatch, 2.0)
    with pytest.raises(GradientError, match="'first/addmm' in"):
        actcompile.profile(Net(), batch())


@pytest.mark.slow
@pytest.mark.parametrize("auto", [False, True])
def test_compiled_graphs_follow_the_check(auto: bool) -> None:
    net = Net()
    steps = train(net, steps=3, lowering="inductor", auto=auto)
    (record,) = records.finished()
    assert record.check is not None and record.check.is_done
    exact = torch.autograd.grad(net(batch()), list(net.parameters()))
    for found in steps:
        error = sum(float((a - b).square().sum()) for a, b in zip(found, exact, strict=True))
        assert error < 0.01 * sum(float(b.square().sum()) for b in exact)
