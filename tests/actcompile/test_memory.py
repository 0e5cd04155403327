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
        y = x * w  # 1 KiB, saved for the sine
        return torch.sin(y).sum()

    timeline = timeline_of(trace(function, torch.randn(256, requires_grad=True), torch.randn(256)))
    assert timeline.labels[: timeline.num_forward] == ("mul", "sin", "sum_1")
    # y stays; its sine is freed behind the sum.
    assert timeline.live_nbytes[: timeline.num_forward] == (1024, 2048, 2052)
    # y is freed as soon as its cosine is there.
    backward = dict(
        zip(timeline.labels[timeline.num_forward :], timeline.live_nbytes[timeline.num_forward :], strict=True)
    )
    assert backward["cos"] == 2052
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
