"""Training steps of six models beside all that torch has to save memory: ``python -m bench.step``.

A step is forward and backward, without an optimizer: weights in bfloat16 on a GPU, in float32 on the CPU (``--dtype``),
no autocast. Peak and stored bytes are counted from before the forward, with no gradients there yet; the peak includes
the gradients of the parameters, for which the rows have a column. Steps alternate with those of torch.compile in one
process, and the ratio is the median of those of neighbours; compilation and the probe of ``auto`` come before that
(``bench.compile_time``, ``bench.profile_cost``). Each variant has a process of its own, so that one that fails or takes
too long leaves a row that says so.

Rows that this commit has already measured on this device are left out. The plot shows, for each model, the rows of the
largest step that torch.compile could run.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch._dynamo.utils import counters

from actcompile.meter import measure_phases, measure_steps

from .harness import MIB, append_row, environment, is_of_this_commit, pick_device, read_rows
from .large_models import SIZES, make_large
from .models import Workload
from .pareto import plot
from .variants import BASELINE, VARIANTS, Variant

KEYS = ("model", "size", "batch", "dtype", "variant", "device")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """What one row is about."""

    model: str
    size: str
    batch: int
    dtype: str
    variant: str


class Steps:
    """Training steps of one variant, compiled and warmed up.

    Args:
        workload: What is trained.
        variant: How.
        warm_up: Steps that are run at once.
    """

    def __init__(self, workload: Workload, variant: Variant, warm_up: int = _WARM_UP) -> None:
        self._variant, self._workload = variant, workload
        self._call = variant.compile(workload.model)
        for _ in range(warm_up):
            self.run()
        if variant.counter and not counters["inductor"][variant.counter]:
            raise RuntimeError(f"the pass of the variant found nothing to do: {variant.counter} is 0")

    def run(self) -> None:
        """One step."""
        self._workload.model.zero_grad(set_to_none=True)
        self._forward().backward()

    def measure(self) -> dict[str, int]:
        """Bytes of one step."""
        self._workload.model.zero_grad(set_to_none=True)
        losses: list[Tensor] = []
        forward, backward = measure_phases(
            [lambda: losses.append(self._forward()), lambda: losses.pop().backward()], pick_device()
        )
        return {
            "peak_nbytes": max(forward.peak_nbytes, backward.peak_nbytes),
            "stored_nbytes": forward.end_nbytes,
            "parameter_nbytes": self._workload.parameter_nbytes(),
        }

    def _forward(self) -> Tensor:
        with self._variant.context():
            return self._workload.loss(self._call)


def make_steps(case: Case, variant: str) -> Steps:
    """Steps of ``variant`` on the model of ``case``."""
    known = VARIANTS[variant]
    workload = make_large(
        case.model,
        case.size,
        case.batch,
        checkpointed=known.checkpointed,
        device=pick_device(),
        dtype=DTYPES[case.dtype],
    )
    return Steps(workload, known)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Bytes and times of one case, in this process."""
    mine = make_steps(case, case.variant)
    row: dict[str, Any] = mine.measure()
    steps = {"mine": mine.run}
    # A variant may fit where the baseline does not.
    try:
        steps["base"] = mine.run if case.variant == BASELINE else make_steps(case, BASELINE).run
    except torch.OutOfMemoryError as error:
        print(f"{BASELINE}: {error}", file=sys.stderr)
    times_ms = measure_steps(steps, rounds)
    row["step_ms"] = round(statistics.median(times_ms["mine"]), 2)
    if "base" in times_ms:
        pairs = zip(times_ms["mine"], times_ms["base"], strict=True)
        row["baseline_step_ms"] = round(statistics.median(times_ms["base"]), 2)
        row["time_ratio"] = round(statistics.median(mine / base for mine, base in pairs), 3)
    return row


def measure_in_process(case: Case, rounds: int, limit_s: int) -> dict[str, Any]:
    """``measure`` in a process of its own: the row, with an error in the place of what could not be measured."""
    row: dict[str, Any] = {
        **vars(case),
        **dict.fromkeys(("peak_nbytes", "stored_nbytes", "parameter_nbytes"), ""),
        **dict.fromkeys(("step_ms", "baseline_step_ms", "time_ratio"), ""),
        "rounds": rounds,
        "error": "",
    }
    return {**row, **run_module("bench.step", ["--rounds", str(rounds), "--case", json.dumps(vars(case))], limit_s)}


def run_module(module: str, arguments: Sequence[str], limit_s: int) -> dict[str, Any]:
    """What a module prints last, as JSON, run in a process of its own; or its error, under that name."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    # What the variants set is not all part of that cache's keys.
    env = {**os.environ, "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {limit_s} s"}
    if done.returncode:
        return {"error": last_error(done.stderr) or f"exit status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def last_error(stderr: str) -> str:
    """The line of the last exception in a traceback, shortened; empty if there is none."""
    errors = re.findall(r"^[\w.]*(?:Error|Exception|Failed|Unsupported|Interrupt)\b.*$", stderr, re.MULTILINE)
    return errors[-1][:200] if errors else ""


def print_table(rows: list[dict[str, str]]) -> None:
    """Bytes and times, shares of torch.compile's where it ran."""
    peaks = {_step(row): int(row["peak_nbytes"]) for row in rows if row["variant"] == BASELINE and row["peak_nbytes"]}
    table = []
    for row in rows:
        cells = [row[key] for key in ("model", "size", "batch", "variant")]
        if row["error"]:
            table.append([*cells, "", "", "", "", "", row["error"][:60]])
            continue
        share = f"{int(row['peak_nbytes']) / peaks[_step(row)]:.3f}" if _step(row) in peaks else ""
        nbytes = (f"{int(row[name]) / MIB:.2f}" for name in ("peak_nbytes", "stored_nbytes"))
        table.append([*cells, *nbytes, share, row["step_ms"], row["time_ratio"], ""])
    headers = ("model", "size", "batch", "variant", "peak MiB", "stored MiB", "peak share", "step ms", "time", "error")
    print(tabulate(table, headers, disable_numparse=True))


def _step(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[key] for key in KEYS if key != "variant")


def list_cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases that the arguments ask for, those that a model has no such size for left out."""
    return [
        Case(model, size, batch, arguments.dtype, variant)
        for model in arguments.models
        for size in arguments.sizes
        if size in SIZES[model]
        for batch in arguments.batches or SIZES[model][size].batches
        for variant in arguments.variants
    ]


def main() -> None:
    """Measures what is missing, appends rows, prints a table and draws all rows that there are."""
    parser = argparse.ArgumentParser("python -m bench.step", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    sizes = list(dict.fromkeys(size for known in SIZES.values() for size in known))
    dtype, size = ("bfloat16", "full") if torch.cuda.is_available() else ("float32", "tiny")
    parser.add_argument("--models", nargs="*", choices=SIZES, default=list(SIZES), help="none: only draw")
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=[size], help="see bench/large_models.py")
    parser.add_argument("--batches", nargs="+", type=int, help="in the place of those of the size")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what to measure")
    parser.add_argument("--dtype", choices=DTYPES, default=dtype, help="of weights and activations")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each variant")
    parser.add_argument(
        "--limit-s", type=int, default=500, help="seconds that one variant may take, compilation included"
    )
    parser.add_argument("--within-s", type=float, default=math.inf, help="seconds after which no other one is begun")
    parser.add_argument("--again", action="store_true", help="also what this commit has measured already")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(**arguments.case), arguments.rounds)))
        return
    end = time.monotonic() + arguments.within_s
    for case in list_cases(arguments):
        key = (*(str(value) for value in vars(case).values()), environment()["device"])
        done = {tuple(row[name] for name in KEYS) for row in read_rows("step", KEYS) if is_of_this_commit(row)}
        if key in done and not arguments.again:
            continue
        if time.monotonic() > end:
            print("Not begun for lack of time:", *key, flush=True)
            continue
        row = measure_in_process(case, arguments.rounds, arguments.limit_s)
        append_row("step", row)
        print(*key, row["error"] or f"{row['peak_nbytes'] / MIB:.2f} MiB, {row['step_ms']} ms", flush=True)
    rows = read_rows("step", KEYS)
    print_table([row for row in rows if row["model"] in arguments.models and row["size"] in arguments.sizes])
    print(f"Drawn: {plot(rows)}")


if __name__ == "__main__":
    main()
