"""Training with exact and with compressed activations: ``python -m bench.training``.

Three tasks (bench/tasks.py), every variant with the same seeds: the seed decides initial weights, dropout and the order
of the data. After each run one row is appended to bench/results/training.csv; a run that this commit has a row of is
left out, and the tables are made from the last row of each run, so that runs may be spread over several calls.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

import actcompile

from .harness import append_row, compile_act, is_of_this_commit, read_rows
from .tasks import TASKS

# torch's own random numbers in compiled code too, so that dropout is the same in all variants.
_RANDOM = {"fallback_random": True}

VARIANTS: Mapping[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "exact": lambda model: torch.compile(model, options=_RANDOM),
    "auto 4 bits": lambda model: compile_act(model, bits=4, auto=True, inductor=_RANDOM),
    "uniform 4 bits": lambda model: compile_act(model, bits=4, inductor=_RANDOM),
    "auto 2 bits": lambda model: compile_act(model, bits=2, auto=True, inductor=_RANDOM),
    "uniform 2 bits": lambda model: compile_act(model, bits=2, inductor=_RANDOM),
    **{
        f"sparsity {share}": lambda model, share=share: compile_act(
            model, sparsity=share, sparse_value_bits=8, inductor=_RANDOM
        )
        for share in (0.8, 0.9)
    },
    # Every linear layer's input is stored, and so pruned, instead of being computed again.
    **{
        f"sparsity {share}, none": lambda model, share=share: compile_act(
            model, sparsity=share, sparse_value_bits=8, recompute="none", inductor=_RANDOM
        )
        for share in (0.8, 0.9)
    },
    **{
        f"Back Razor {share}": lambda model, share=share: compile_act(model, pruning="samples", sparsity=share)
        for share in (0.8, 0.9)
    },
}
BASELINE = "exact"
# Of the training steps, those that compile.
_COMPILING = 3


def run(task: str, variant: str, seed: int, data: Path, most_steps: int | None = None) -> dict[str, object]:
    """Trains once; the row of the result."""
    torch._dynamo.reset()
    actcompile.reset()
    training = TASKS[task](seed, data)
    torch.manual_seed(seed)
    call = VARIANTS[variant](training.model)
    steps = min(training.steps, most_steps or training.steps)
    times_s, start = [], time.perf_counter()
    for step, batch in enumerate(itertools.islice(training.batches, steps)):
        before = time.perf_counter()
        training.optimizer.zero_grad(set_to_none=True)
        loss = training.loss(call, batch)
        loss.backward()
        training.optimizer.step()
        training.schedule.step()
        times_s.append(time.perf_counter() - before)
        if step % 25 == 0:
            print(f"{task}, {variant}, seed {seed}: step {step} of {steps}, loss {loss:.4f}", flush=True)
    total_s = time.perf_counter() - start
    training.model.eval()
    with torch.no_grad():
        metric, held_out = training.evaluate()
    return {
        "task": task,
        "variant": variant,
        "seed": seed,
        "metric": metric,
        "held_out_loss": held_out,
        "steps": steps,
        "step_ms": round(statistics.median(times_s[_COMPILING:]) * 1e3, 1),
        "total_s": round(total_s, 1),
    }


def summarize(rows: Sequence[Mapping[str, str]], task: str) -> list[list[object]]:
    """Per variant: mean and spread of metric and loss over seeds, their differences from exact at the same seed."""
    runs = {(row["variant"], int(row["seed"])): row for row in rows if row["task"] == task}
    table = []
    for variant in VARIANTS:
        seeds = sorted(seed for known, seed in runs if known == variant)
        cells: list[object] = [task, variant, len(seeds)]
        for name in ("metric", "held_out_loss"):
            values = {seed: float(runs[variant, seed][name]) for seed in seeds}
            pairs = [values[seed] - float(runs[BASELINE, seed][name]) for seed in seeds if (BASELINE, seed) in runs]
            cells += [_mean_and_spread(list(values.values())), _mean_and_spread(pairs)]
        times = [float(runs[variant, seed]["step_ms"]) for seed in seeds]
        table.append([*cells, f"{statistics.fmean(times):.0f}" if times else ""])
    return [row for row in table if row[2]]


def _mean_and_spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.4f}" for value in values)
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def known_rows() -> list[dict[str, str]]:
    """The last row of each run."""
    return read_rows("training", ("task", "variant", "seed"))


def main() -> None:
    """Trains, appends rows and prints the table."""
    parser = argparse.ArgumentParser("python -m bench.training", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with glue/MRPC and glue/RTE")
    parser.add_argument("--steps", type=int, help="no more than so many, to try it out; appends nothing")
    parser.add_argument("--again", action="store_true", help="also what this commit has measured already")
    arguments = parser.parse_args()
    for task in arguments.tasks:
        for seed in arguments.seeds:
            for variant in arguments.variants:
                done = {
                    (row["task"], row["variant"], int(row["seed"])) for row in known_rows() if is_of_this_commit(row)
                }
                if arguments.steps:
                    print(run(task, variant, seed, arguments.data, arguments.steps), flush=True)
                elif arguments.again or (task, variant, seed) not in done:
                    append_row("training", run(task, variant, seed, arguments.data))
    headers = ("task", "variant", "seeds", "metric", "- exact", "held-out loss", "- exact", "step ms")
    for task in arguments.tasks:
        print(tabulate(summarize(known_rows(), task), headers, disable_numparse=True), flush=True)


if __name__ == "__main__":
    main()
