"""Measured memory and time of a step.

On the CPU the profiler's allocator events, summed up in the order of their times, give a peak that is exact and the
same on every machine, for compiled graphs too. On a CUDA device the caching allocator keeps the peak itself.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

# Seen in torch 2.11 to 2.13.
from torch._C._profiler import _ExtraFields_Allocation, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile

_LOG_LEVEL = "KINETO_LOG_LEVEL"
_SILENT = "99"


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
    without torch's allocator is not seen.

    Args:
        fn: Called without arguments.
        device: Whose memory; the CUDA device if this process uses one, else the CPU.
    """
    if device is None:
        device = "cuda" if _uses_cuda() else "cpu"
    device = torch.device(device)
    # Cycles that wait for the collector would be released in the middle of the measurement.
    gc.collect()
    if device.type == "cuda":
        return _measure_cuda(fn, device)
    _, timeline = _run_profiled(fn, device)
    levels = [nbytes for _, nbytes in timeline]
    return Peak(max([0, *levels]), levels[-1] if levels else 0, timeline)


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


def _measure_cuda(fn: Callable[[], object], device: torch.device) -> Peak:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result, timeline = _run_profiled(fn, device)
    peak = torch.cuda.max_memory_allocated(device) - before
    end = torch.cuda.memory_allocated(device) - before
    del result
    return Peak(peak, end, timeline)


def _run_profiled(fn: Callable[[], object], device: torch.device) -> tuple[object, tuple[tuple[float, int], ...]]:
    """The result of ``fn`` and the timeline of its allocations on ``device``."""
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        # The result lives until the profiler has stopped: what it holds counts as alive at the end.
        result = fn()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    roots = profiler.profiler.kineto_results.experimental_event_tree()
    events = [(event.start_time_ns, event.extra_fields) for event in _walk(roots)]
    # Releases are allocations of a negative size.
    changes = sorted(
        (time_ns, fields.alloc_size)
        for time_ns, fields in events
        if isinstance(fields, _ExtraFields_Allocation) and fields.device.type == device.type
    )
    timeline, live = [], 0
    for time_ns, nbytes in changes:
        live += nbytes
        timeline.append(((time_ns - changes[0][0]) / 1e9, live))
    return result, tuple(timeline)


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
