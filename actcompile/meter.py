"""Measured memory and time of a step.

On the CPU the profiler's allocator events, summed up in the order of their times, give a peak that is exact and the
same on every machine, for compiled graphs too. On a CUDA device the caching allocator keeps the peak itself.
"""

import bisect
import functools
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Seen in torch 2.11 to 2.15.
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile, record_function

_LOG_LEVEL = "KINETO_LOG_LEVEL"
_SILENT = "99"
_PHASE = "actcompile.meter"


@dataclass(frozen=True)
class Peak:
    """Bytes allocated while a function ran, all counted from what was there before.

    Args:
        peak_nbytes: The most bytes alive at once.
        end_nbytes: Bytes still alive at the end, the function's result among them.
        timeline: After each allocation and release: seconds since the start, and the bytes then alive.
    """

    peak_nbytes: int
    end_nbytes: int
    timeline: tuple[tuple[float, int], ...]


def measure_peak(fn: Callable[[], object], device: torch.device | str | None = None) -> Peak:
    """Runs ``fn`` once and measures the memory that it takes.

    Whatever should be left out has to exist before: call ``fn`` once to compile and warm up. Memory that libraries take
    without torch's allocator is not seen, nor, on the CPU, the release of what was allocated before.

    Args:
        fn: Called without arguments.
        device: Whose memory; the CUDA device if this process uses one, else the CPU.
    """
    (peak,) = measure_phases([fn], device)
    return peak


def measure_phases(fns: Sequence[Callable[[], object]], device: torch.device | str | None = None) -> tuple[Peak, ...]:
    """Runs functions one after the other, as ``measure_peak`` does, and measures each on its own.

    All bytes are counted from before the first: a backward's peak includes what its forward left behind, and what it
    releases of that is seen. The results of all functions live until the end.
    """
    if device is None:
        device = "cuda" if _uses_cuda() else "cpu"
    device = torch.device(device)
    # Cycles that wait for the collector would be released in the middle of the measurement.
    gc.collect()
    return _measure_cuda(fns, device) if device.type == "cuda" else _measure_cpu(fns)


def measure_steps(fns: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times several functions in turn, so that a machine that slows down does so for all of them.

    Args:
        fns: Name -> function, called without arguments; warmed up by the caller.
        rounds: How often each one runs.

    Returns:
        Name -> milliseconds of each run.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            synchronize()
            start = time.perf_counter()
            fn()
            synchronize()
            times_ms[name].append((time.perf_counter() - start) * 1e3)
    return times_ms


def synchronize() -> None:
    """Waits until the CUDA device, if this process uses one, has finished."""
    if _uses_cuda():
        torch.cuda.synchronize()


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _measure_cuda(fns: Sequence[Callable[[], object]], device: torch.device) -> tuple[Peak, ...]:
    """Peaks by the caching allocator, timelines by the profiler."""
    found: list[tuple[int, int]] = []

    def counted(fn: Callable[[], object]) -> object:
        torch.cuda.reset_peak_memory_stats(device)
        result = fn()
        torch.cuda.synchronize(device)
        found.append((torch.cuda.max_memory_allocated(device) - before, torch.cuda.memory_allocated(device) - before))
        return result

    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    timelines = _timelines([functools.partial(counted, fn) for fn in fns], device)
    return tuple(Peak(*levels, timeline) for levels, timeline in zip(found, timelines, strict=True))


def _measure_cpu(fns: Sequence[Callable[[], object]]) -> tuple[Peak, ...]:
    peaks, start = [], 0
    for timeline in _timelines(fns, torch.device("cpu")):
        levels = [start, *(nbytes for _, nbytes in timeline)]
        start = levels[-1]
        peaks.append(Peak(max(levels), start, timeline))
    return tuple(peaks)


def _timelines(fns: Sequence[Callable[[], object]], device: torch.device) -> list[tuple[tuple[float, int], ...]]:
    """Runs ``fns``; for each, what its allocations on ``device`` made of the bytes alive."""
    results = []
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        # Results live until the profiler has stopped: what they hold counts as alive at the end.
        for fn in fns:
            with record_function(_PHASE):
                results.append(fn())
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = list(_walk(profiler.profiler.kineto_results.experimental_event_tree()))
    starts = sorted(event.start_time_ns for event in events if event.name == _PHASE)
    # Releases are allocations of a negative size.
    changes = sorted(
        (event.start_time_ns, event.extra_fields.alloc_size)
        for event in events
        if isinstance(event.extra_fields, _ExtraFields_Allocation) and event.extra_fields.device.type == device.type
    )
    timelines: list[list[tuple[float, int]]] = [[] for _ in fns]
    live = 0
    for time_ns, nbytes in changes:
        live += nbytes
        phase = max(0, bisect.bisect_right(starts, time_ns) - 1)
        timelines[phase].append(((time_ns - changes[0][0]) / 1e9, live))
    return [tuple(timeline) for timeline in timelines]


def _walk(events: list[_ProfilerEvent]) -> Iterator[_ProfilerEvent]:
    for event in events:
        yield event
        yield from _walk(event.children)


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keeps the profiler from writing to stderr, unless the user asked for it; it reads this at its first start."""
    if _LOG_LEVEL in os.environ:
        yield
        return
    os.environ[_LOG_LEVEL] = _SILENT
    try:
        yield
    finally:
        del os.environ[_LOG_LEVEL]
