"""Profiling again during training: when plans change, and what is logged."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import actcompile
from actcompile import records
from actcompile._gpt import GPT
from actcompile.plan import Profile, Sensitivity
from actcompile.planner import counted_nbytes

IDS = torch.randint(16, (4, 8), generator=torch.Generator().manual_seed(0))
EVERY = 3


@pytest.fixture
def model() -> GPT:
    actcompile.reset()
    torch.manual_seed(0)
    return GPT(layers=1, width=32, heads=2, ff=64, vocabulary=16, tokens=8, dropout=0.0)


def compiled(model: GPT, **options: object) -> Callable[..., Tensor]:
    settings = {"lowering": "eager", "min_numel": 0, "profile_every": EVERY, **options}
    return torch.compile(model, backend="act", options=settings)


def steps(call: Callable[..., Tensor], count: int) -> None:
    """Training steps that leave the parameters as they are."""
    for _ in range(count):
        call(IDS, IDS).backward()


def found(call_again: list[Profile], monkeypatch: pytest.MonkeyPatch, scale: dict[str, float]) -> None:
    """Lets every probe but the first find sensitivities ``scale`` times as large, by the name of the operator."""
    original = actcompile.sensitivity.Probe._backward

    def changed(self: object, graph: object, args: list[object]) -> object:
        results = original(self, graph, args)  # type: ignore[arg-type]
        call_again.append(self.profile)  # type: ignore[attr-defined]
        if len(call_again) > 1:
            profile = call_again[0]
            self.profile = Profile(  # type: ignore[attr-defined]
                {
                    key: Sensitivity(
                        {b: v * scale.get(key.split("/")[-1], 1) for b, v in s.variance.items()}, s.method, s.excess
                    )
                    for key, s in profile.sensitivities.items()
                },
                profile.gradient_square,
            )
        return results

    monkeypatch.setattr(actcompile.sensitivity.Probe, "_backward", changed)


def test_probes_return_after_so_many_compiled_steps(
    model: GPT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    profiles: list[Profile] = []
    found(profiles, monkeypatch, {})
    with caplog.at_level(logging.INFO, "actcompile"):
        steps(compiled(model, auto=True, bits=4), 1 + EVERY + 1 + EVERY + 1)
    assert len(profiles) == 3
    assert caplog.text.count("profiled again after 3 steps") == 1, "the next step of the last probe did not come"
    assert "the plan stays" in caplog.text


def test_other_sensitivities_move_bits_within_the_same_bytes(
    model: GPT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found([], monkeypatch, {"addmm": 1e6, "exp": 1e-6})
    call = compiled(model, auto=True, bits=4)
    steps(call, 2)
    (record,) = records.finished()
    before = record.plan
    with caplog.at_level(logging.INFO, "actcompile"):
        steps(call, EVERY + 1)
    assert "new bits" in caplog.text
    assert record.plan.decisions != before.decisions
    assert counted_nbytes(record.rows, record.plan) <= counted_nbytes(record.rows, before)


def test_noise_above_its_target_raises_bits(
    model: GPT, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = dict.fromkeys(("addmm", "exp", "mul", "permute", "permute#2", "permute#3"), 100.0)
    found([], monkeypatch, keys)
    with caplog.at_level(logging.INFO, "actcompile"):
        steps(compiled(model, noise=0.01), 1 + EVERY + 2)
    (record,) = records.finished()
    assert "the target of 0.01 is missed, bits go up" in caplog.text
    predicted = actcompile.report(model).predicted_noise
    assert predicted is not None and predicted <= 0.01
    assert record.profile is not None
