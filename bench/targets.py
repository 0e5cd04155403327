"""Whether the targets ``memory=`` and ``noise=`` are met: ``python -m bench.targets``.

Models of bench/cases.py. Memory: for a sweep of budgets, as shares of what torch.compile saves and in bytes, the bytes
that a forward with the solved plan leaves alive, by the meter, its output (the loss) among them. Noise: the mean of
|g' - g|^2 / |g|^2 over training steps with the solved plan, each with rounding noise of its own.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

import actcompile
from actcompile import ConfigError, records
from actcompile.meter import measure_peak

from .cases import SIZES, Case, mean_noise, prepare
from .gradients import gradients
from .harness import append_row

SHARES = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
NOISES = (0.05, 0.01, 0.001)
LEFT_OVER = "no plan takes so little"


def measure_memory(case: Case, memory: float | int, baseline_nbytes: int, lowering: str) -> dict[str, object]:
    """One row: what is stored within a budget."""
    budget = memory if isinstance(memory, int) else memory * baseline_nbytes
    row: dict[str, object] = {
        "model": case.name,
        "lowering": lowering,
        "memory": memory,
        "budget_nbytes": int(budget),
        "stored_nbytes": "",
        "reported_nbytes": "",
        "of_budget": "",
    }
    try:
        call = solved(case, memory=memory, lowering=lowering)
    except ConfigError:
        return {**row, "met": LEFT_OVER}
    stored = measure_peak(lambda: case.workload.loss(call, case.batch)).end_nbytes
    reported = actcompile.report(case.workload.model).saved_nbytes
    found = {"stored_nbytes": stored, "reported_nbytes": reported, "of_budget": stored / budget}
    return {**row, **found, "met": stored <= budget}


def measure_noise(case: Case, noise: float, draws: int) -> dict[str, object]:
    """One row: the noise measured for a target."""
    call = solved(case, noise=noise)
    report = actcompile.report(case.workload.model)
    mean, error, drawn = mean_noise(functools.partial(case.noise, call), draws)
    return {
        "model": case.name,
        "noise": noise,
        "draws": drawn,
        "predicted": report.predicted_noise,
        "measured": mean / case.square,
        "standard_error": error / case.square,
        "of_target": mean / case.square / noise,
        "stored_nbytes": report.saved_nbytes,
        "baseline_nbytes": report.baseline_nbytes,
    }


def solved(case: Case, **options: Any) -> Callable[..., Any]:
    """The model after the step that is probed, and one with the plan solved."""
    call = case.compiled(**options)
    for _ in range(2):
        gradients(case.workload.model, case.workload.loss(call, case.batch))
    return call


def baseline_nbytes(case: Case) -> int:
    """What torch.compile saves."""
    solved(case, bits=8)
    (record,) = records.finished()
    return record.baseline_nbytes


def measure_sweep(case: Case, shares: Sequence[float], lowering: str) -> list[dict[str, object]]:
    """Rows for all budgets, each once as a share and once in bytes."""
    baseline, table = baseline_nbytes(case), []
    for share in shares:
        for memory in (share, int(share * baseline)):
            table.append(measure_memory(case, memory, baseline, lowering))
            append_row("target_memory", table[-1])
            print(*table[-1].values(), flush=True)
    return table


def main() -> None:
    """Measures, appends rows and prints both tables."""
    parser = argparse.ArgumentParser("python -m bench.targets", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES), help="none: no memory targets")
    parser.add_argument("--noises", nargs="*", type=float, default=list(NOISES), help="none: no noise targets")
    parser.add_argument("--lowering", choices=("eager", "inductor"), default="eager", help="of the memory sweep")
    parser.add_argument("--draws", type=int, default=16, help="of the rounding noise, at the least")
    parser.add_argument("--steps", type=int, default=20, help="training steps before")
    parser.add_argument("--data", type=Path, default=Path("data"), help="see bench/data.py")
    arguments = parser.parse_args()
    memory: list[dict[str, object]] = []
    noise: list[dict[str, object]] = []
    for name in arguments.models:
        case = prepare(name, arguments.steps, arguments.data)
        memory += measure_sweep(case, arguments.shares, arguments.lowering) if arguments.shares else []
        for target in arguments.noises:
            noise.append(measure_noise(case, target, arguments.draws))
            append_row("target_noise", noise[-1])
            print(*noise[-1].values(), flush=True)
    for table in (memory, noise):
        print(tabulate(table, headers="keys", floatfmt=".3g"))


if __name__ == "__main__":
    main()
