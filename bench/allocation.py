"""Bits by sensitivity against uniform bits and against GACT's rule, at equal bytes: ``python -m bench.allocation``.

Models of bench/cases.py. For each mean of bits, the bytes are those of uniform codes of that many bits. "auto" solves
for the least noise within them. "uniform" takes as many bits as they allow, which is fewer than the mean at 1.5. "gact"
(bench/gact_rule.py) goes down until it stores no more bytes, scales and zero points counted, which its own budget does
not know. The noise of each is measured by bench/replay.py; "steps" are the training steps that its sensitivities took.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from actcompile import Config
from actcompile.choices import EXACT_BITS
from actcompile.planner import ProbedGraph, make_plan, solve

from . import gact_rule
from .cases import SIZES, Case, mean_noise, predicted, prepare, ways_nbytes, ways_of
from .harness import RESULTS, append_row, read_rows

AVERAGES = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
METHODS = ("uniform", "auto", "gact")


def measure_plans(case: Case, averages: Sequence[float], methods: Sequence[str], draws: int) -> None:
    """Appends a row per mean of bits and per method."""
    rows, profile = case.profile()
    replay = case.replay()
    rounded = replay.rows
    sensitivity = gact_rule.sensitivities(replay) if "gact" in methods else {}
    numels = {row.key: row.numel for row in rounded}
    for average in averages:
        config = Config(bits=average, auto=True)
        (automatic,) = solve([ProbedGraph(rows, profile)], config)
        chosen = {"auto": ways_of(automatic), "uniform": ways_of(make_plan(rows, config))}
        budget = ways_nbytes(rounded, chosen["auto"])
        if "gact" in methods:
            chosen["gact"] = gact_rule.allocate(
                sensitivity, numels, lambda bits, budget=budget: ways_nbytes(rounded, bits) <= budget
            )
        for method in methods:
            ways = {key: way for key, way in chosen[method].items() if way != EXACT_BITS}
            mean, error, drawn = mean_noise(functools.partial(replay.noise, ways), draws)
            row = {
                "model": case.name,
                "average_bits": average,
                "method": method,
                "nbytes": ways_nbytes(rounded, ways),
                "draws": drawn,
                "noise": mean,
                "standard_error": error,
                "relative_noise": mean / case.square,
                "predicted": predicted(ways, profile),
                "steps": {"uniform": 0, "auto": 1, "gact": gact_rule.STEPS_PER_TENSOR * len(rounded)}[method],
            }
            append_row("allocation", row)
            print(f"{case.name:9}{average:4} {method:8}{row['nbytes']:11}{row['relative_noise']:12.3e}", flush=True)


def summarize(rows: Sequence[Mapping[str, str]]) -> list[list[object]]:
    """Per model and mean of bits: relative noise of each method, and how many times that of "auto" the others have."""
    table = []
    for model, average in dict.fromkeys((row["model"], row["average_bits"]) for row in rows):
        mine = {row["method"]: row for row in rows if (row["model"], row["average_bits"]) == (model, average)}
        noises = [float(mine[method]["relative_noise"]) if method in mine else None for method in METHODS]
        known = dict(zip(METHODS, noises, strict=True))
        auto = known["auto"]
        gains = [known[method] / auto if known[method] and auto else None for method in ("uniform", "gact")]  # type: ignore[operator]
        shares = [
            int(mine[method]["nbytes"]) / int(mine["auto"]["nbytes"]) if method in mine and "auto" in mine else None
            for method in ("uniform", "gact")
        ]
        table.append([model, average, *(f"{noise:.2e}" if noise else "" for noise in noises), *gains, *shares])
    return table


def plot(rows: Sequence[Mapping[str, str]]) -> Path:
    """Noise over bytes, one panel per model."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, len(models), figsize=(4 * len(models), 4), squeeze=False)
    for axis, model in zip(axes.flat, models, strict=True):
        for method in METHODS:
            mine = [row for row in rows if (row["model"], row["method"]) == (model, method)]
            points = sorted((int(row["nbytes"]) / 2**20, float(row["relative_noise"])) for row in mine)
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method)
        axis.set(xscale="log", yscale="log", xlabel="stored MiB", title=model)
    axes[0, 0].set_ylabel("measured $E|g' - g|^2 / |g|^2$")
    axes[0, 0].legend()
    figure.tight_layout()
    path = RESULTS / "allocation.png"
    figure.savefig(path, dpi=150)
    return path


def main() -> None:
    """Measures, appends rows, prints a table and draws all rows that there are."""
    parser = argparse.ArgumentParser("python -m bench.allocation", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="*", choices=SIZES, default=list(SIZES), help="none: only draw")
    parser.add_argument("--averages", nargs="+", type=float, default=list(AVERAGES), help="means of bits")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--draws", type=int, default=16, help="of the rounding noise, at the least")
    parser.add_argument("--steps", type=int, default=20, help="training steps before")
    parser.add_argument("--data", type=Path, default=Path("data"), help="see bench/data.py")
    arguments = parser.parse_args()
    for name in arguments.models:
        case = prepare(name, arguments.steps, arguments.data)
        measure_plans(case, arguments.averages, arguments.methods, arguments.draws)
    rows = read_rows("allocation", ("model", "average_bits", "method"))
    others = ("uniform / auto", "gact / auto", "bytes uniform / auto", "bytes gact / auto")
    print(tabulate(summarize(rows), ("model", "bits", *METHODS, *others), floatfmt=".3g"))
    print(f"Drawn: {plot(rows)}")


if __name__ == "__main__":
    main()
