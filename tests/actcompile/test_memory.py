"""The timeline of live bytes."""

import pytest
import sympy
import torch
from torch import Tensor
from torch.nn import functional as F

import actcompile
from actcompile import Config
from actcompile._gpt import GPT
from actcompile.memory import CompiledStep, SymbolicTimeline, Timeline, step_peak, step_timeline
from actcompile.meter import measure_phases

from ..passes.pairs import Traced, trace


def chain(depth: int) -> Traced:
    def function(v: Tensor, w: Tensor, x: Tensor) -> Tensor:
        for _ in range(depth):
            x = F.silu(x @ w) * v
        return x.sum()

    weights = [torch.randn(16, 16, requires_grad=True) for _ in range(2)]
    return trace(function, *weights, torch.randn(16, 16))


def timeline_of(traced: Traced) -> Timeline:
    return step_timeline(traced.pair.forward.graph, traced.pair.backward.graph)


def test_live_bytes_of_a_small_graph() -> None:
    def function(w: Tensor, x: Tensor) -> Tensor:
        return F.silu(x @ w).mul(3).sum()

    traced = trace(function, torch.randn(16, 16, requires_grad=True), torch.randn(16, 16))
    timeline = timeline_of(traced)
    steps = list(zip(timeline.labels, timeline.live_nbytes, strict=True))
    assert traced.pair.slots[0].source.name == "mm"
    # The product stays for the backward; what is made of it is freed behind its last reader.
    assert steps[: timeline.num_forward] == [
        ("mm", 1024),
        ("neg", 2048),
        ("exp", 3072),
        ("add", 3072),
        ("div", 3072),
        ("mul", 3072),
        ("sum_1", 2052),
        ("permute", 1028),
    ]
    backward = dict(steps[timeline.num_forward :])
    assert backward["sub"] - backward["sigmoid"] <= 1024
    assert timeline.live_nbytes[-1] < 3 * 1024
    assert timeline.peak_nbytes == max(timeline.live_nbytes)


def test_views_take_no_bytes() -> None:
    plain = timeline_of(
        trace(lambda w, x: torch.sin(x * w).sum(), torch.randn(16, 16).requires_grad_(), torch.ones(16, 16))
    )
    viewed = timeline_of(
        trace(lambda w, x: torch.sin((x * w).t()).sum(), torch.randn(16, 16).requires_grad_(), torch.ones(16, 16))
    )
    assert viewed.peak_nbytes == plain.peak_nbytes


def test_saved_tensors_accumulate() -> None:
    peaks = [timeline_of(chain(depth)).peak_nbytes for depth in (2, 4, 8)]
    # Two saved tensors of 1 KiB at most per layer, one at least.
    assert 4 * 1024 <= peaks[2] - peaks[1] <= 8 * 1024
    assert 2 * 1024 <= peaks[1] - peaks[0] <= 4 * 1024


def test_nothing() -> None:
    assert Timeline((), (), 0).peak_nbytes == 0


def test_symbols_take_the_sizes_given_and_else_those_traced() -> None:
    batch, tokens = sympy.symbols("batch tokens", integer=True, positive=True)
    live = (4 * batch * tokens, sympy.Integer(64), sympy.Max(100 * batch, tokens))
    timeline = SymbolicTimeline(("a", "b", "c"), live, 2, {batch: 2, tokens: 8})
    assert timeline.at() == Timeline(("a", "b", "c"), (64, 64, 200), 2)
    assert timeline.at({batch: 5}).live_nbytes == (160, 64, 500)
    assert timeline.at({tokens: 300, batch: 1}).peak_nbytes == 1200


def test_stored_bytes_are_what_the_forward_leaves() -> None:
    assert Timeline(("a", "b", "c"), (8, 5, 9), 2).stored_nbytes == 5
    assert Timeline(("a",), (9,), 0).stored_nbytes == 0


def test_the_peak_of_several_graphs() -> None:
    first, second = Timeline(("a", "b", "c", "d"), (10, 6, 20, 3), 2), Timeline(("a", "b", "c"), (5, 4, 7), 2)
    assert step_peak([first]) == 20
    # 6 left by the first while the second works; then 7 returned by the second while the first's backward works.
    assert step_peak([second, first]) == max(5, 4 + 10, 4 + 20, 3 + 7)
    assert step_peak([first, second]) == max(10, 6 + 5, 6 + 7, 7 + 20)
    assert step_peak([]) == 0


def test_fused_operators_allocate_nothing_between_them() -> None:
    def function(w: Tensor, x: Tensor) -> Tensor:
        return F.silu(F.gelu(F.silu(x @ w))).sum()

    traced = trace(function, torch.randn(64, 64, requires_grad=True), torch.randn(64, 64))
    interpreted = timeline_of(traced)
    timeline = CompiledStep(traced.pair, {}).timeline.at()
    # The product stays for the backward beside the sum; what lies between them is one kernel.
    assert timeline.live_nbytes[: timeline.num_forward] == (16384, 16388)
    # The gradient of the product, then that of the weights in place of what was stored.
    assert max(timeline.live_nbytes[timeline.num_forward :]) == 2 * 16384 + 4
    assert timeline.live_nbytes[-1] == 16384 + 4
    assert timeline.peak_nbytes < interpreted.peak_nbytes


def test_graphs_are_left_as_they_are() -> None:
    traced = chain(4)
    before = [str(module.graph) for module in (traced.pair.forward, traced.pair.backward)]
    assert CompiledStep(traced.pair, {}).timeline.at().peak_nbytes > 0
    assert [str(module.graph) for module in (traced.pair.forward, traced.pair.backward)] == before


def test_what_the_caller_holds_is_not_freed() -> None:
    def function(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.sin(x @ w)
        z = y.exp()
        return z.sum(), z

    traced = trace(function, torch.randn(64, 64, requires_grad=True), torch.randn(64, 64))
    timeline = CompiledStep(traced.pair, {}).timeline.at()
    # The second output and the gradient, and two numbers.
    assert timeline.live_nbytes[-1] == 2 * 64 * 64 * 4 + 4


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"bits": 4}, {"level": "L0", "recompute": "none"}], ids=str)
def test_the_predicted_peak_is_the_measured_one(settings: dict[str, object]) -> None:
    model = GPT(layers=2, width=64, heads=2, vocabulary=128, tokens=64)
    ids = torch.randint(128, (2, 16, 64))
    config = Config(**settings)  # type: ignore[arg-type]
    expected = actcompile.explain(model, *ids, config=config).predicted_peak_nbytes
    compiled = torch.compile(model, backend="act", options={"config": config})
    compiled(*ids).backward()
    assert actcompile.report(model).predicted_peak_nbytes == expected
    model.zero_grad(set_to_none=True)
    losses: list[Tensor] = []
    phases = measure_phases([lambda: losses.append(compiled(*ids)), lambda: losses.pop().backward()])
    # Inductor fuses the first graph of a process with an operator new to it otherwise than those that follow.
    assert max(phase.peak_nbytes for phase in phases) == pytest.approx(expected, rel=0.03)
