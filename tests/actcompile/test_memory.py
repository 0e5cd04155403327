"""The timeline of live bytes."""

import torch
from torch import Tensor

from actcompile.memory import Timeline, step_timeline

from ..passes.pairs import Traced, trace


def chain(depth: int) -> Traced:
    def function(w: Tensor, x: Tensor) -> Tensor:
        for _ in range(depth):
            x = torch.sin(x) * w
        return x.sum()

    return trace(function, torch.randn(256, requires_grad=True), torch.randn(256))


def timeline_of(traced: Traced) -> Timeline:
    return step_timeline(traced.pair.forward.graph, traced.pair.backward.graph)


def test_live_bytes_of_a_small_graph() -> None:
    def function(w: Tensor, x: Tensor) -> Tensor:
        return torch.sin(x @ w).cos().sum()

    traced = trace(function, torch.randn(16, 16, requires_grad=True), torch.randn(16, 16))
    timeline = timeline_of(traced)
    steps = list(zip(timeline.labels, timeline.live_nbytes, strict=True))
    assert traced.pair.slots[0].source.name == "mm"
    # The product stays for the backward; the sine and its cosine are freed behind their last reader.
    assert steps[: timeline.num_forward] == [
        ("mm", 1024),
        ("sin", 2048),
        ("cos", 3072),
        ("sum_1", 2052),
        ("permute", 1028),
    ]
    backward = dict(steps[timeline.num_forward :])
    assert backward["sin_1"] - backward["cos_1"] <= 1024
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
