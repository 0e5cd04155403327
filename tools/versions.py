"""Runs the tests, or a part of them, under every version of torch that is supported, each in an environment of its own.

    python -m tools.versions                                  all versions, tests that do not compile
    python -m tools.versions 2.11 2.15 --tests tests/passes   two of them, one folder
    python -m tools.versions 2.15 -- -m slow -k attention     what stands behind -- goes to pytest

Environments are made once, below ``--environments``, with the packages of constraints.txt beside that torch, and kept:
a build of torch takes 1 to 6 GB. Each version is a row of the table that is printed, and of bench/results/versions.csv
with ``--record``; "names" counts torch's private names that are gone there, or changed (tools.private_names).
"""

import argparse
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from tabulate import tabulate

from .private_names import FOLDERS, ROOT, differences, installed, uses
from .torch_sources import TorchSources

# Of each minor version the release that is tested, with the Triton that it comes with.
PINS: Mapping[str, tuple[str, str]] = {
    "2.11": ("2.11.0", "3.6.0"),
    "2.12": ("2.12.1", "3.7.1"),
    "2.13": ("2.13.0", "3.7.1"),
    "2.14": ("2.14.1", "3.8.0"),
    "2.15": ("2.15.0", "3.9.0"),
}
DEFAULT_TESTS = ("tests/passes", "tests/actcompile")
# What constraints.txt says of these is replaced.
_REPLACED = ("torch", "triton")


@dataclass(frozen=True)
class Row:
    """What came out under one version; "status" is pytest's, or says that there is no environment."""

    version: str
    triton: str
    passed: int
    failed: int
    skipped: int
    minutes: float
    names: int
    status: str


def constraints_for(version: str, text: str) -> str:
    """``text`` of constraints.txt with the torch and the Triton of ``version``."""
    torch, triton = PINS[version]
    names = re.compile(rf"({'|'.join(_REPLACED)})==")
    kept = [line for line in text.splitlines() if not names.match(line)]
    return "\n".join([*kept, f"torch=={torch}", f"triton=={triton}", ""])


def prepare(version: str, folder: Path) -> Path:
    """The interpreter of the environment for ``version`` below ``folder``, which is made where it is missing.

    Raises:
        subprocess.CalledProcessError: When pip does not find the packages.
    """
    home = folder / version
    python, stamp = home / "bin" / "python", home / "installed"
    if stamp.exists():
        return python
    if not python.exists():
        venv.create(home, with_pip=True)
    pins = home / "constraints.txt"
    pins.write_text(constraints_for(version, (ROOT / "constraints.txt").read_text()))
    # First torch: what else needs it is content with what is there.
    for wanted in (["torch"], ["--editable", f"{ROOT}[test]"]):
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--constraint", pins, *wanted], check=True)
    stamp.touch()
    return python


def run_tests(python: Path, arguments: Sequence[str], report: Path) -> int:
    """Runs pytest, which writes ``report``; its exit status."""
    command = [str(python), "-m", "pytest", "--quiet", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    # Generated code of other versions is none for this one.
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(report.parent / "inductor")}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **cache}, check=False).returncode


def counts(report: Path) -> tuple[int, int, int]:
    """Tests that passed, failed and were skipped, by pytest's report in XML; none where there is no report."""
    if not report.exists():
        return 0, 0, 0
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    totals = [{key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} for suite in suites]
    tests, failures, errors, skipped = (
        sum(total[key] for total in totals) for key in ("tests", "failures", "errors", "skipped")
    )
    return tests - failures - errors - skipped, failures + errors, skipped


def check(version: str, folder: Path, arguments: Sequence[str]) -> Row:
    """Makes the environment for ``version`` and runs pytest in it."""
    try:
        python = prepare(version, folder)
    except subprocess.CalledProcessError as error:
        return Row(PINS[version][0], "", 0, 0, 0, 0.0, 0, f"pip ended with {error.returncode}")
    (site_packages,) = (folder / version).glob("lib/python*/site-packages")
    sources = TorchSources(site_packages)
    used = uses([ROOT / name for name in FOLDERS])
    changed = [d for d in differences(used, TorchSources(installed()), sources) if not d.is_harmless]
    report, start = folder / version / "report.xml", time.monotonic()
    report.unlink(missing_ok=True)
    status = run_tests(python, arguments, report)
    minutes = (time.monotonic() - start) / 60
    return Row(sources.version, _triton(site_packages), *counts(report), round(minutes, 1), len(changed), str(status))


def _triton(site_packages: Path) -> str:
    found = [path.stem.removeprefix("triton-") for path in site_packages.glob("triton-*.dist-info")]
    return found[0] if found else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 when anything failed."""
    assert __doc__ is not None
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours, rest = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(
        "python -m tools.versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="*", help=f"of {', '.join(PINS)}; default: all")
    parser.add_argument("--tests", nargs="+", default=list(DEFAULT_TESTS), help="files and folders")
    parser.add_argument("--environments", type=Path, default=ROOT / ".versions", help="where they are kept")
    parser.add_argument("--record", action="store_true", help="append to bench/results/versions.csv")
    options = parser.parse_args(ours)
    unknown = [version for version in options.versions if version not in PINS]
    if unknown:
        parser.error(f"versions must be of {', '.join(PINS)}, got {unknown[0]!r}")
    selected = [*options.tests, *(rest or ["-m", "not slow"])]
    rows = []
    for version in options.versions or PINS:
        rows.append(check(version, options.environments.resolve(), selected))
        print(tabulate([asdict(row) for row in rows], headers="keys"), flush=True)
        if options.record:
            _record(rows[-1], selected)
    return int(any(row.status != "0" for row in rows))


def _record(row: Row, selected: Sequence[str]) -> None:
    # Names the machine, by way of torch.
    from bench.harness import append_row

    append_row("versions", {**asdict(row), "tests": " ".join(selected)})


if __name__ == "__main__":
    sys.exit(main())
