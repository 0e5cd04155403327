"""Where the time of a cold compilation goes: the phases of torch.compile, as it counts them itself, and this package's.

Phases exclude each other; what none of them covers is "other". ``cpp`` is the time that the compilers of kernels keep
everything else waiting.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.utils import compilation_time_metrics

from actcompile import backend, passes, sensitivity

# Phase -> names of torch's own timers to add, and those inside of them to take off.
_TIMERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dynamo": (("_compile.compile_inner",), ("OutputGraph.call_user_compiler",)),
    "trace": (("aot_collect_metadata", "aot_trace_joint_graph"), ()),
    "joint_passes": (("_recursive_joint_graph_passes",), ()),
    "post_passes": (("_recursive_post_grad_passes", "additional_fake_tensor_prop"), ()),
    "lower": (("GraphLowering.run",), ()),
    "schedule": (("Scheduler.__init__",), ()),
    "codegen": (("GraphLowering.codegen",), ("Scheduler.__init__",)),
    "cpp": (("async_compile.wait",), ()),
}

# Functions of this package -> phase. What they call of each other counts where it is done.
_OWN: Mapping[tuple[object, str], str] = {
    (backend, "baseline"): "report",
    (backend, "partition"): "partition",
    (backend, "analyze"): "analyze",
    (backend, "make_plan"): "plan",
    (backend, "follow"): "plan",
    (backend, "found_plan"): "plan",
    (backend, "lower_codecs"): "own_lowering",
    (backend, "start_compiling_bodies"): "own_lowering",
    (backend.records.GraphRecord, "finish"): "report",
    (passes, "verify"): "verify",
    (torch.fx.Graph, "lint"): "verify",
    (sensitivity.Probe, "_forward"): "interpreted_forward",
    (sensitivity.Probe, "_backward"): "probe",
}


class Phases:
    """Seconds by phase, of what happens inside of ``measured``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measures; torch's timers start anew."""
        pipeline = tuple(self._timed(apply, f"pass_{apply.__name__}") for apply in passes.PIPELINE)
        originals = {(owner, name): getattr(owner, name) for owner, name in _OWN}
        run_passes = backend.run_passes
        for (owner, name), phase in _OWN.items():
            setattr(owner, name, self._timed(originals[owner, name], phase))
        backend.run_passes = lambda pair, plan: run_passes(pair, plan, pipeline)
        compilation_time_metrics.clear()
        start = time.perf_counter()
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - start
            backend.run_passes = run_passes
            for (owner, name), original in originals.items():
                setattr(owner, name, original)
        self._add_torch()
        self.seconds["other"] = elapsed_s - sum(self.seconds.values())

    def _timed(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed_s = time.perf_counter() - start
                self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed_s - self._inside.pop()
                if self._inside:
                    self._inside[-1] += elapsed_s

        return call

    def _add_torch(self) -> None:
        timers = {name: sum(seconds) for name, seconds in compilation_time_metrics.items()}
        for phase, (added, taken) in _TIMERS.items():
            total = sum(timers.get(name, 0.0) for name in added) - sum(timers.get(name, 0.0) for name in taken)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + total
        if "partition" not in self.seconds:
            self.seconds["partition"] = timers.get("min_cut_rematerialization_partition", 0.0)
