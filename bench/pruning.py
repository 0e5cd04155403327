"""Pruning against few bits at the same bytes, and both mixed: ``python -m bench.pruning``.

Models of bench/cases.py. Formats are compared in pairs that take about the same bytes, each for every tensor that can
be rounded; "auto" is what the planner chooses within the bytes of the smaller of the two, "auto, codes" what it chooses
when it may not prune. The noise of each is predicted from one probe and measured by bench/replay.py.
"""

import argparse
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

from tabulate import tabulate

from actcompile import Config, config
from actcompile.choices import AUTO_PRUNINGS
from actcompile.plan import Pruning
from actcompile.planner import ProbedGraph, counted_nbytes, make_plan, solve

from .cases import SIZES, Case, mean_noise, predicted, prepare, ways_nbytes, ways_of
from .harness import append_row, read_rows
from .replay import Way

MODELS = ("gpt", "bert_plain", "vit", "resnet18")

# Name -> how every tensor is stored; the pairs take about the same bytes.
FORMATS: Mapping[str, Way] = {
    "4 bits": 4,
    "80%, 16-bit values": Pruning(51, 256, 16),
    "2 bits": 2,
    "90%, 8-bit values": Pruning(26, 256, 8),
    "1 bit": 1,
    "2:16, 4-bit values": Pruning(2, 16, 4),
}
PAIRS = (("4 bits", "80%, 16-bit values"), ("2 bits", "90%, 8-bit values"), ("1 bit", "2:16, 4-bit values"))
METHODS = ("auto", "auto, codes")


def measure(case: Case, draws: int) -> None:
    """Appends a row per format and per pair and method."""
    everything = tuple(dict.fromkeys((*AUTO_PRUNINGS, *(way for way in FORMATS.values() if isinstance(way, Pruning)))))
    # All of them, for every tensor.
    with mock.patch.multiple(config, AUTO_PRUNINGS=everything, _MANY_BITS=math.inf):
        rows, profile = case.profile()
    replay = case.replay()
    keys = [row.key for row in replay.rows]
    lossless = make_plan(rows, Config(bits=32))
    others = counted_nbytes([row for row in rows if row.key not in keys], lossless)
    for pair in PAIRS:
        plans: dict[str, Mapping[str, Way]] = {name: dict.fromkeys(keys, FORMATS[name]) for name in pair}
        budget = min(ways_nbytes(replay.rows, plans[name]) for name in pair)
        for method, prunings in zip(METHODS, (AUTO_PRUNINGS, ()), strict=True):
            with mock.patch.object(config, "AUTO_PRUNINGS", prunings):
                (plan,) = solve([ProbedGraph(rows, profile)], Config(memory=budget + others), budget + others)
            plans[method] = {key: way for key, way in ways_of(plan).items() if key in keys}
        for name, ways in plans.items():
            mean, error, drawn = mean_noise(functools.partial(replay.noise, ways), draws)
            row = {
                "model": case.name,
                "pair": " / ".join(pair),
                "method": name,
                "nbytes": ways_nbytes(replay.rows, ways),
                "pruned": sum(isinstance(way, Pruning) for way in ways.values()),
                "tensors": len(keys),
                "draws": drawn,
                "relative_noise": mean / case.square,
                "standard_error": error / case.square,
                "predicted": predicted(ways, profile) / case.square,
            }
            append_row("pruning", row)
            print(f"{case.name:11}{name:20}{row['nbytes']:11}{row['relative_noise']:12.3e}", flush=True)


def summarize(rows: Sequence[Mapping[str, str]]) -> list[list[object]]:
    """Measured noise of each format and method, predicted noise behind it, and how much of the best format auto has."""
    table: list[list[object]] = []
    for model, pair in dict.fromkeys((row["model"], row["pair"]) for row in rows):
        mine = {row["method"]: row for row in rows if (row["model"], row["pair"]) == (model, pair)}
        formats = pair.split(" / ")
        cells = [f"{float(mine[m]['relative_noise']):.2e} ({float(mine[m]['predicted']):.1e})" for m in mine]
        best = min(float(mine[name]["relative_noise"]) for name in formats)
        share = float(mine["auto"]["relative_noise"]) / best
        bytes_share = int(mine["auto"]["nbytes"]) / min(int(mine[name]["nbytes"]) for name in formats)
        table.append([model, pair, *cells, mine["auto"]["pruned"], f"{share:.3f}", f"{bytes_share:.3f}"])
    return table


def main() -> None:
    """Measures, appends rows and prints a table of all rows that there are."""
    parser = argparse.ArgumentParser("python -m bench.pruning", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="*", choices=SIZES, default=list(MODELS), help="none: only the table")
    parser.add_argument("--draws", type=int, default=8, help="of the rounding noise, at the least")
    parser.add_argument("--steps", type=int, default=20, help="training steps before")
    parser.add_argument("--data", type=Path, default=Path("data"), help="see bench/data.py")
    arguments = parser.parse_args()
    for name in arguments.models:
        measure(prepare(name, arguments.steps, arguments.data), arguments.draws)
    headers = ("model", "formats", "first", "second", *METHODS, "pruned", "noise / best", "bytes / smaller")
    print(tabulate(summarize(read_rows("pruning", ("model", "pair", "method"))), headers, disable_numparse=True))


if __name__ == "__main__":
    main()
