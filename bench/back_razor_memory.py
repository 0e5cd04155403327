"""Peak, stored bytes and step time of Back Razor's models under its rule, this package and torch's ways.

As in ``bench.step``: forward and backward without an optimizer, bytes counted from before the forward, with no
gradients there yet; the peak includes the gradients of the parameters, for which rows have a column, and neither
parameters nor inputs nor optimizer state. Each variant has a process of its own, where its steps alternate with those
of torch.compile: ratios are the median of those of neighbours, and that of the best steps. Back Razor's rule is
interpreted, operator by operator: its time is that of this package's interpreter, not of Back Razor's kernels.
"""

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from actcompile.meter import measure_steps

from .back_razor_models import MODELS
from .harness import MIB, append_row, compile_act, environment, is_of_this_commit, read_rows
from .step import Steps, run_module
from .variants import BASELINE, Variant

SPARSITIES = (0.7, 0.8, 0.9, 0.97)
_KEYS = ("model", "batch", "variant", "device")
_MEASURED = ("peak_nbytes", "stored_nbytes", "parameter_nbytes", "step_ms", "best_ms", "time_ratio", "best_ratio")
_WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """What one row is about; ``data`` is a folder."""

    model: str
    batch: int
    variant: str
    data: str


def _act(**options: Any) -> Variant:
    return Variant(lambda model: compile_act(model, **options))


def variants(model: str) -> Mapping[str, Variant]:
    """Name -> how ``model`` is trained; act stores pruned values in 8 bits."""
    spec = MODELS[model]
    return {
        BASELINE: Variant(),
        "eager": Variant(lambda model: model),
        "act 4 bits": _act(bits=4),
        **{f"act {sparsity:.0%}": _act(sparsity=sparsity, sparse_value_bits=8) for sparsity in SPARSITIES},
        "act 80%, recompute none": _act(sparsity=0.8, sparse_value_bits=8, recompute="none"),
        **{
            f"Back Razor {sparsity:.0%}": _act(pruning="samples", sparsity=sparsity, skip=spec.dense)
            for sparsity in SPARSITIES
        },
    }


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Bytes of one case, and its times where there are rounds, in this process."""
    known = variants(case.model)

    def make(variant: str) -> Steps:
        workload = MODELS[case.model].make(case.batch, Path(case.data))
        return Steps(workload, known[variant], _WARM_UP if rounds else 1)

    mine = make(case.variant)
    row: dict[str, Any] = mine.measure()
    if not rounds:
        return row
    base = mine if case.variant == BASELINE else make(BASELINE)
    times_ms = measure_steps({"mine": mine.run, "base": base.run}, rounds)
    pairs = zip(times_ms["mine"], times_ms["base"], strict=True)
    return row | {
        "step_ms": round(statistics.median(times_ms["mine"]), 1),
        "best_ms": round(min(times_ms["mine"]), 1),
        "time_ratio": round(statistics.median(mine / base for mine, base in pairs), 3),
        "best_ratio": round(min(times_ms["mine"]) / min(times_ms["base"]), 3),
    }


def run(cases: Iterable[Case], rounds: int, limit_s: int) -> None:
    """Appends a row per case that this commit has not measured yet, and prints all of its models."""
    cases = list(cases)
    for case in cases:
        key = (case.model, str(case.batch), case.variant, environment()["device"])
        done = {tuple(row[name] for name in _KEYS) for row in _read() if is_of_this_commit(row) and not row["error"]}
        if key in done:
            continue
        arguments = ["--rounds", str(rounds), "--case", json.dumps(vars(case))]
        row = {
            **{name: vars(case)[name] for name in _KEYS[:3]},
            "runs": "interpreted" if case.variant.startswith("Back Razor") else "",
            **dict.fromkeys(_MEASURED, ""),
            "rounds": rounds,
            "error": "",
            **run_module("bench.back_razor", arguments, limit_s),
        }
        append_row("back_razor_memory", row)
        print(*key[:3], row["error"] or f"{row['peak_nbytes'] / MIB:.1f} MiB, {row['step_ms']} ms", flush=True)
    print_table({case.model for case in cases})


def _read() -> list[dict[str, str]]:
    return read_rows("back_razor_memory", _KEYS)


def print_table(models: Iterable[str]) -> None:
    """Bytes and times, beside those of torch.compile."""
    rows = [row for row in _read() if row["model"] in models]
    base = {(row["model"], row["batch"]): row for row in rows if row["variant"] == BASELINE and not row["error"]}
    table = []
    for row in sorted(rows, key=lambda row: (row["model"], int(row["batch"]))):
        cells = [row["model"], row["batch"], row["variant"]]
        if row["error"]:
            table.append([*cells, *[""] * 6, row["error"][:60]])
            continue
        other = base.get((row["model"], row["batch"]))
        for name in ("stored_nbytes", "peak_nbytes"):
            less = f"{int(other[name]) / int(row[name]):.2f}x" if other else ""
            cells += [f"{int(row[name]) / MIB:.1f}", less]
        table.append([*cells, row["time_ratio"], row["best_ratio"], row["runs"]])
    headers = ("model", "batch", "variant", "stored MiB", "less", "peak MiB", "less", "time", "best time", "")
    print(tabulate(table, headers, disable_numparse=True))
