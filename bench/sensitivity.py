"""Predicted against measured noise, and bits by sensitivity against uniform ones: ``python -m bench.sensitivity``.

On real data (bench/data.py), dropout off, after some training steps, everything interpreted. The noise of a plan is the
mean of |g' - g|^2 over draws of the rounding noise, g the gradient of all parameters in eager. One row per saved tensor
that is rounded, one for all of them together, and one per average of bits for both ways to spend the same bytes.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import actcompile
from actcompile import Config, Plan, records
from actcompile.plan import Action, Decision, Profile, SavedTensor
from actcompile.planner import ProbedGraph, make_plan, solve, stored_nbytes

from .data import real_batches
from .gradients import flat, gradients, train, without_dropout
from .harness import append_row
from .models import WORKLOADS, Batch, Workload

AVERAGES = (2, 3, 4, 6, 8)
WORKLOAD_SIZES: Mapping[str, Mapping[str, int]] = {
    "gpt": {"layers": 2, "batch": 4},
    "bert": {"layers": 2, "batch": 8},
    "resnet": {"batch": 16},
}


class Case:
    """A workload in some state, one batch, and the exact gradient."""

    def __init__(self, workload: Workload, batch: Batch, draws: int) -> None:
        self.workload = workload
        self.batch = batch
        self.draws = draws
        self.exact = flat(self._gradients(workload.model))

    def profile(self) -> tuple[Sequence[SavedTensor], Profile]:
        """Rows and sensitivities, from the first step with ``auto``."""
        call = self._compiled(auto=True)
        for _ in range(2):
            self._gradients(call)
        (record,) = records.finished()
        assert record.profile is not None
        return record.rows, record.profile

    def noise(self, plan: Plan) -> float:
        """The mean of |g' - g|^2."""
        call = self._compiled(plan=plan)
        squares = [float((flat(self._gradients(call)) - self.exact).square().sum()) for _ in range(self.draws)]
        return sum(squares) / self.draws

    def _compiled(self, **options: Any) -> Callable[..., Any]:
        actcompile.reset()
        return torch.compile(self.workload.model, backend="act", options={"lowering": "eager", **options})

    def _gradients(self, call: Callable[..., Any]) -> dict[str, Tensor]:
        return gradients(self.workload.model, self.workload.loss(call, self.batch))


def predicted(plan: Plan, profile: Profile) -> float:
    """The noise of all tensors that a plan rounds."""
    known = profile.sensitivities
    return sum(known[key].variance[decision.bits] for key, decision in plan.items() if decision.bits and key in known)


def compare_tensors(name: str, case: Case, rows: Sequence[SavedTensor], profile: Profile, bits: int) -> None:
    """Each tensor by itself, then all together."""
    lossless = make_plan(rows, Config(bits=32))
    codec = Decision(Action.QUANTIZE, "measured", bits=bits, group_size=256)
    plans = {key: Plan({**lossless, key: codec}) for key in profile.sensitivities}
    plans["all"] = Plan({key: codec if key in profile.sensitivities else lossless[key] for key in lossless})
    nbytes = {row.key: row.nbytes for row in rows}
    table, good_nbytes, good = [], 0, 0
    for key, plan in plans.items():
        found, guess = case.noise(plan), predicted(plan, profile)
        ratio = guess / found if found else 1.0
        row = {"model": name, "tensor": key, "bits": bits, "predicted": guess, "measured": found, "ratio": ratio}
        append_row("sensitivity", row)
        table.append(row)
        if key != "all" and 0.7 <= ratio <= 1.4:
            good, good_nbytes = good + 1, good_nbytes + nbytes[key]
    print(tabulate(table, headers="keys"))
    count, total = len(plans) - 1, sum(nbytes[key] for key in profile.sensitivities)
    print(
        f"{name}: within [0.7, 1.4] {good} of {count} tensors, {good_nbytes / total:.1%} of their bytes\n", flush=True
    )


def compare_plans(name: str, case: Case, rows: Sequence[SavedTensor], profile: Profile) -> None:
    """Bits by sensitivity against uniform ones, at equal bytes."""
    table = []
    for average in AVERAGES:
        uniform = make_plan(rows, Config(bits=average, auto=True))
        (automatic,) = solve([ProbedGraph(rows, profile)], Config(bits=average, auto=True))
        noises = [case.noise(plan) for plan in (uniform, automatic)]
        nbytes = [sum(stored_nbytes(row, plan[row.key]) for row in rows) for plan in (uniform, automatic)]
        row = {
            "model": name,
            "average bits": average,
            "uniform noise": noises[0],
            "auto noise": noises[1],
            "auto predicted": predicted(automatic, profile),
            "gain": noises[0] / noises[1],
            "bytes": nbytes[1] / nbytes[0],
        }
        append_row("allocation", row)
        table.append(row)
    print(tabulate(table, headers="keys"), flush=True)


def main() -> None:
    """Measures, appends rows and prints the tables."""
    parser = argparse.ArgumentParser("python -m bench.sensitivity", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--steps", type=int, default=20, help="training steps before")
    parser.add_argument("--draws", type=int, default=32, help="draws of the rounding noise")
    parser.add_argument("--bits", type=int, default=4, help="of the comparison tensor by tensor")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with glue/SST-2 and cifar10")
    arguments = parser.parse_args()
    for name in arguments.models:
        workload = without_dropout(WORKLOADS[name](**WORKLOAD_SIZES[name]))
        batches = real_batches(name, workload.batch, arguments.data)
        train(name, workload, batches, arguments.steps, workload.model)
        case = Case(workload, next(batches), arguments.draws)
        rows, profile = case.profile()
        compare_tensors(name, case, rows, profile, arguments.bits)
        compare_plans(name, case, rows, profile)


if __name__ == "__main__":
    main()
