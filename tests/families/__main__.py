"""Table of model families with compressed activations: ``python -m tests.families``."""

import argparse
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from tabulate import tabulate

from bench.harness import MIB, append_row
from tests.families.goals import RATIOS, cases, complaints, is_installed
from tests.families.measuring import Row, measure

_HEADERS = (
    *("family", "precision", "bits", "cosine", "error", "projection", "loss error", "compile error"),
    *("torch.compile MiB", "stored MiB", "less"),
)


def cells(row: Row) -> list[object]:
    """Of the table that is printed."""
    numbers = (f"{row.cosine:.4f}", f"{row.error:.3g}", f"{row.projection:.3f}", f"{row.loss_error:.1g}")
    stored = (f"{row.plain_nbytes / MIB:.2f}", f"{row.stored_nbytes / MIB:.2f}", f"{row.ratio:.2f}x")
    return [row.family, row.precision, row.bits, *numbers, f"{row.compile_error:.1g}", *stored]


def record(row: Row, missed: list[str]) -> Mapping[str, Any]:
    """A row of bench/results/families.csv."""
    return {
        "family": row.family,
        "precision": row.precision,
        "bits": row.bits,
        "cosine": f"{row.cosine:.6f}",
        "error": f"{row.error:.4g}",
        "projection": f"{row.projection:.5f}",
        "finite": row.finite,
        "loss_error": f"{row.loss_error:.3g}",
        "compile_error": f"{row.compile_error:.3g}",
        "plain_nbytes": row.plain_nbytes,
        "stored_nbytes": row.stored_nbytes,
        "reported_nbytes": row.reported_nbytes,
        "missed": "; ".join(missed),
    }


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.families", description=__doc__)
    parser.add_argument("names", nargs="*", help="families; all when left out")
    parser.add_argument("--precisions", nargs="+", choices=RATIOS, default=list(RATIOS))
    parser.add_argument("--shard", default="0/1", help="part and number of parts, to run several processes")
    parser.add_argument("--write", action="store_true", help="append the rows to bench/results/families.csv")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    start = time.perf_counter()
    part, parts = map(int, arguments.shard.split("/"))
    chosen = [
        (family, precision)
        for family, precision in cases()
        if precision in arguments.precisions and (not arguments.names or family.name in arguments.names)
    ][part::parts]
    table, missed = [], []
    for family, precision in chosen:
        if not is_installed(family):
            missed.append([family.name, precision, "", f"{family.needs} is not installed"])
            continue
        try:
            rows = measure(family, precision)
        except Exception as error:  # noqa: BLE001 the table says what was raised
            traceback.print_exc()
            missed.append([family.name, precision, "", f"{type(error).__name__}: {str(error)[:160]}"])
            continue
        for row in rows:
            found = complaints(row)
            missed += [[row.family, row.precision, row.bits, complaint] for complaint in found]
            table.append(cells(row))
            print("  ".join(map(str, table[-1])), *found, sep="  ", flush=True)
            if arguments.write:
                append_row("families", record(row, found))
    print(tabulate(table, _HEADERS, disable_numparse=True))
    print(tabulate(missed, ("family", "precision", "bits", "goal that is missed"), disable_numparse=True))
    print(f"{len(chosen)} cases, {time.perf_counter() - start:.0f} s")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
