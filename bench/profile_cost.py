"""What a profile costs: time of the probe, and the peak of the step that is probed: ``python -m bench.profile_cost``.

Time: the first backward with ``auto``, which probes, beside the first backward of the same interpreted graphs without,
each in a fresh compilation, in turn; and beside training steps of compiled code. The difference is the probe. Peak: of
the first step, interpreted and probed, and of the compiled step that follows, by the meter, counted from before the
forward; without gradients of earlier steps.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tabulate import tabulate

import actcompile
from actcompile.meter import measure_phases, measure_steps, synchronize

from .gradients import without_dropout
from .harness import append_row, compile_act, pick_device
from .models import WORKLOADS, Workload

SIZES: Mapping[str, Mapping[str, int]] = {
    "gpt": {"layers": 4, "batch": 32},
    "bert": {"layers": 4, "batch": 32},
    "resnet18": {"batch": 32},
    "vit": {"layers": 4, "batch": 32},
    "gcn": {},
}


def first_backward_ms(workload: Workload, auto: bool) -> tuple[float, float]:
    """Milliseconds of the first backward of a fresh compilation, interpreted, and of a forward like that before it.

    The first forward is also traced: without ``auto`` the second is timed, with it none.
    """
    actcompile.reset()
    workload.model.zero_grad(set_to_none=True)
    call = compile_act(workload.model, lowering="eager", auto=auto)
    loss = workload.loss(call)
    backward = _milliseconds(loss.backward)
    return backward, 0.0 if auto else _milliseconds(lambda: workload.loss(call))


def _milliseconds(fn: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    fn()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def compiled_step(workload: Workload, call: Callable[..., Any]) -> Callable[[], None]:
    """Forward and backward, warmed up."""

    def step() -> None:
        workload.model.zero_grad(set_to_none=True)
        workload.loss(call).backward()

    step()
    step()
    return step


def make(name: str, sizes: Mapping[str, int | None]) -> Workload:
    """The model without dropout, with those of ``sizes`` that it has and that are given."""
    given = {key: value for key, value in sizes.items() if key in SIZES[name] and value is not None}
    return without_dropout(WORKLOADS[name](**{**SIZES[name], **given}, device=pick_device()))


def measure_time(name: str, workload: Workload, repeats: int) -> dict[str, object]:
    """One row: medians over the repeats."""
    first_backward_ms(workload, auto=True)
    pairs = []
    for _ in range(repeats):
        (probed, _), (plain, forward) = (first_backward_ms(workload, auto) for auto in (True, False))
        pairs.append((probed, plain, forward))
    torch._dynamo.reset()
    steps = {
        "torch.compile": compiled_step(workload, torch.compile(workload.model)),
        "act": compiled_step(workload, compile_act(workload.model, bits=4)),
    }
    times = {variant: statistics.median(values) for variant, values in measure_steps(steps, 2 * repeats).items()}
    plain_ms = statistics.median(plain for _, plain, _ in pairs)
    probe_ms = statistics.median(probed - plain for probed, plain, _ in pairs)
    forward_ms = statistics.median(forward for *_, forward in pairs)
    return {
        "model": name,
        "batch": len(workload.batch[0]),
        "repeats": repeats,
        "interpreted_forward_ms": round(forward_ms, 1),
        "interpreted_backward_ms": round(plain_ms, 1),
        "probe_ms": round(probe_ms, 1),
        "torch_compile_step_ms": round(times["torch.compile"], 1),
        "act_step_ms": round(times["act"], 1),
        "probe_in_backwards": statistics.median((probed - plain) / plain for probed, plain, _ in pairs),
        "probe_in_act_steps": probe_ms / times["act"],
        "first_step_in_act_steps": (forward_ms + plain_ms + probe_ms) / times["act"],
    }


def measure_peaks(name: str, workload: Workload) -> dict[str, object]:
    """One row: peaks of the probed step and of compiled ones."""
    actcompile.reset()
    torch._dynamo.reset()
    call = compile_act(workload.model, bits=4, auto=True)
    probed = _step_peak(workload, call)
    _step_peak(workload, call)
    compiled = _step_peak(workload, call)
    torch._dynamo.reset()
    plain = torch.compile(workload.model)
    _step_peak(workload, plain)
    baseline = _step_peak(workload, plain)
    return {
        "model": name,
        "batch": len(workload.batch[0]),
        "probed_peak_nbytes": probed,
        "act_peak_nbytes": compiled,
        "torch_compile_peak_nbytes": baseline,
        "probed_of_act": probed / compiled,
        "probed_of_torch_compile": probed / baseline,
    }


def _step_peak(workload: Workload, call: Callable[..., Any]) -> int:
    workload.model.zero_grad(set_to_none=True)
    losses: list[torch.Tensor] = []
    phases = measure_phases([lambda: losses.append(workload.loss(call)), lambda: losses.pop().backward()])
    return max(phase.peak_nbytes for phase in phases)


def main() -> None:
    """Measures, appends rows and prints both tables."""
    parser = argparse.ArgumentParser("python -m bench.profile_cost", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--what", nargs="+", choices=("time", "peak"), default=["time", "peak"])
    parser.add_argument("--repeats", type=int, default=7, help="of each timed backward")
    parser.add_argument("--layers", type=int, help="blocks, where the model has any")
    parser.add_argument("--batch", type=int, help="instead of the model's own batch")
    arguments = parser.parse_args()
    sizes = {"layers": arguments.layers, "batch": arguments.batch}
    tables: dict[str, list[dict[str, object]]] = {what: [] for what in arguments.what}
    for name in arguments.models:
        for what, table in tables.items():
            workload = make(name, sizes)
            row = measure_time(name, workload, arguments.repeats) if what == "time" else measure_peaks(name, workload)
            append_row(f"profile_{what}", row)
            table.append(row)
            print(tabulate([row], headers="keys", floatfmt=".3g"), flush=True)
    for table in tables.values():
        print(tabulate(table, headers="keys", floatfmt=".3g"))


if __name__ == "__main__":
    main()
