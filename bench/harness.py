"""What all benchmarks share: rows in a CSV file that say where they come from, and the ways to compile."""

import csv
import datetime
import functools
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).resolve().parent / "results"
MIB = 2**20


def compile_act(model: nn.Module, **options: Any) -> Callable[..., Tensor]:
    """``model`` compiled by this package."""
    return torch.compile(model, backend="act", options=options)


def pick_device() -> torch.device:
    """A CUDA device if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def append_row(bench: str, row: Mapping[str, object]) -> None:
    """Appends one row to the results of ``bench`` at once, so that a run that is cut short leaves what it has.

    Raises:
        ValueError: When the file has other columns.
    """
    full = {**row, **environment()}
    path = RESULTS / f"{bench}.csv"
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
        if columns != list(full):
            raise ValueError(f"rows of {path.name} must have the columns {columns}, got {list(full)}: move it away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, full)
        if is_new:
            writer.writeheader()
        writer.writerow(full)


def read_rows(bench: str, keys: Sequence[str]) -> list[dict[str, str]]:
    """The rows of ``bench``; of those that agree in the columns ``keys``, the last."""
    path = RESULTS / f"{bench}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list({tuple(row[key] for key in keys): row for row in csv.DictReader(file)}.values())


def is_of_this_commit(row: Mapping[str, str]) -> bool:
    """Whether ``row`` was measured with the commit that is checked out, with or without changes."""
    return row["commit"].rstrip("+") == environment()["commit"].rstrip("+")


@functools.cache
def environment() -> dict[str, str]:
    """Where a row was measured."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _commit() -> str:
    """The commit of the checkout, "+" appended when tracked files differ from it; empty without git."""
    try:
        command = ["git", "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
        done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
