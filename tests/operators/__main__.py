"""Tally of PyTorch's operators and modules with compressed activations: ``python -m tests.operators``."""

import argparse
import csv
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

import torch
from tabulate import tabulate

from tests.operators.cases import module_cases, module_names, operator_cases, operator_names
from tests.operators.exempt import EXEMPT
from tests.operators.measuring import LEVELS, RIGHT, SKIPPED, Outcome, measure


def run(only: list[str], samples: int, seconds: float, shard: tuple[int, int], out: Path | None) -> list[Outcome]:
    """Measures, prints what is not right at once, and writes every outcome into ``out``."""
    entries = [("op", name) for name in operator_names()] + [("module", name) for name in module_names()]
    chosen = [entry for entry in entries if not only or entry[1] in only][shard[0] :: shard[1]]
    outcomes: list[Outcome] = []
    for kind, name in chosen:
        cases = operator_cases(name, samples) if kind == "op" else module_cases(name, samples)
        for case in cases:
            found = measure(case, seconds)
            outcomes += found
            for outcome in found:
                if outcome.status not in (RIGHT, SKIPPED):
                    line = f"{outcome.case:50s} {outcome.level:2s} {outcome.status:14s} {outcome.error:9.3g}"
                    print(line, outcome.note, EXEMPT.get(name, ""), flush=True)
            if out is not None:
                _write(out, found)
    return outcomes


def tally(outcomes: list[Outcome]) -> str:
    """Number of cases by level and status."""
    counts = Counter((outcome.level, outcome.status) for outcome in outcomes)
    statuses = sorted({status for _, status in counts})
    rows = [[level or "none", *(counts[level, status] for status in statuses)] for level in ("", *LEVELS)]
    with_codes = sum(outcome.codes > 0 for outcome in outcomes if outcome.level == "4")
    return tabulate(rows, ["level", *statuses]) + f"\ncases that store codes at 4 bits: {with_codes}"


def is_wrong(outcome: Outcome) -> bool:
    """Whether ``outcome`` is neither right nor for a stated reason."""
    name = outcome.case.rpartition(" #")[0]
    return outcome.status not in (RIGHT, SKIPPED) and name not in EXEMPT


def _write(path: Path, outcomes: list[Outcome]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Outcome)])
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(outcome) for outcome in outcomes)


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.operators", description=__doc__)
    parser.add_argument("names", nargs="*", help="operators and modules; all when left out")
    parser.add_argument("--samples", type=int, default=2, help="samples of inputs of each")
    parser.add_argument("--seconds", type=float, default=20, help="time limit of a case at one level")
    parser.add_argument("--shard", default="0/1", help="part and number of parts, to run several processes")
    parser.add_argument("--out", type=Path, help="CSV file that every outcome is appended to")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    start = time.perf_counter()
    part, parts = map(int, arguments.shard.split("/"))
    outcomes = run(arguments.names, arguments.samples, arguments.seconds, (part, parts), arguments.out)
    print(tally(outcomes))
    wrong = sorted({outcome.case for outcome in outcomes if is_wrong(outcome)})
    print(f"{len(wrong)} cases are wrong without a stated reason", *wrong, sep="\n    ")
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
