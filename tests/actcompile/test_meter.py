"""The meter counts bytes exactly, in eager and in compiled code."""

import pytest
import torch
from torch import Tensor

from actcompile.meter import Peak, measure_peak, measure_phases, measure_steps

KIB = 1024


def test_peak_and_end_are_exact() -> None:
    def allocate() -> Tensor:
        first = torch.empty(64 * KIB, dtype=torch.uint8)
        second = torch.empty(32 * KIB, dtype=torch.uint8)
        del first
        third = torch.empty(16 * KIB, dtype=torch.uint8)
        del third
        return second

    measured = measure_peak(allocate)
    assert (measured.peak_nbytes, measured.end_nbytes) == (96 * KIB, 32 * KIB)
    levels = [nbytes // KIB for _, nbytes in measured.timeline]
    assert levels == [64, 96, 32, 48, 32]
    times = [seconds for seconds, _ in measured.timeline]
    assert times[0] == 0 and times == sorted(times)


def test_phases_count_from_the_start_of_the_first() -> None:
    held: list[Tensor] = []

    def first() -> None:
        torch.empty(8 * KIB, dtype=torch.uint8)
        held.append(torch.empty(4 * KIB, dtype=torch.uint8))

    def second() -> None:
        held.append(torch.empty(2 * KIB, dtype=torch.uint8))
        held.pop(0)

    peaks = measure_phases([first, second, lambda: None])
    assert [(peak.peak_nbytes // KIB, peak.end_nbytes // KIB) for peak in peaks] == [(8, 4), (6, 2), (2, 2)]


def test_backward_releases_what_the_forward_saved() -> None:
    x = torch.rand(256, 256, requires_grad=True)
    results: list[Tensor] = []
    forward, backward = measure_phases([lambda: results.append(x.exp().exp().sum()), lambda: results.pop().backward()])
    assert forward.end_nbytes == 2 * x.nbytes + 4
    assert backward.end_nbytes == x.nbytes
    assert backward.peak_nbytes < 5 * x.nbytes


def test_function_that_allocates_nothing() -> None:
    assert measure_peak(lambda: None) == Peak(0, 0, ())


def test_saved_tensors_count_as_alive_at_the_end() -> None:
    weight = torch.ones(256, requires_grad=True)
    x = torch.rand(64, 256)
    measured = measure_peak(lambda: (x * weight).exp())
    assert measured.end_nbytes == x.nbytes
    assert measured.peak_nbytes == 2 * x.nbytes


def test_exception_passes_through() -> None:
    with pytest.raises(ZeroDivisionError):
        measure_peak(lambda: 1 / 0)
    assert measure_peak(lambda: torch.empty(KIB, dtype=torch.uint8)).end_nbytes == KIB


def test_steps_take_turns() -> None:
    calls: list[str] = []
    times_ms = measure_steps({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in times_ms.items()} == {"a": 3, "b": 3}
    assert all(value >= 0 for values in times_ms.values() for value in values)
