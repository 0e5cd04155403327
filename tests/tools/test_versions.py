"""What is tested under several versions of torch, and what comes out of it."""

import re
import sys
from pathlib import Path

import pytest

from tools.private_names import ROOT
from tools.versions import PINS, check, constraints_for, counts, main, run_tests


def test_every_supported_version_is_pinned() -> None:
    found = re.search(r"torch>=2\.(\d+),<2\.(\d+)", (ROOT / "setup.cfg").read_text())
    assert found is not None
    assert list(PINS) == [f"2.{minor}" for minor in range(int(found[1]), int(found[2]))]
    assert all(torch.startswith(f"{version}.") for version, (torch, _) in PINS.items())


def test_the_pinned_version_is_that_of_the_constraints() -> None:
    text = (ROOT / "constraints.txt").read_text()
    (torch,) = re.findall(r"^torch==(\S+)$", text, re.M)
    version = ".".join(torch.split(".")[:2])
    assert sorted(constraints_for(version, text).split()) == sorted(text.split())


def test_only_torch_and_triton_differ() -> None:
    text = "numpy==1.0\ntorch-geometric==2.8.1\ntorch==2.13.0\ntriton==3.7.1\n"
    expected = "numpy==1.0\ntorch-geometric==2.8.1\ntorch==2.15.0\ntriton==3.9.0\n"
    assert constraints_for("2.15", text) == expected


def test_counts_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_a(): pass\n"
        "def test_b(): pass\n"
        "def test_c(): assert False\n"
        "def test_d(nothing): pass\n"
        "@pytest.mark.skip\n"
        "def test_e(): pass\n"
    )
    report = tmp_path / "report.xml"
    assert run_tests(Path(sys.executable), [str(tmp_path), "-c", "/dev/null", "--rootdir", str(tmp_path)], report) == 1
    assert counts(report) == (2, 2, 1)
    assert counts(tmp_path / "none.xml") == (0, 0, 0)


def test_without_its_packages_a_version_is_a_row_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pip finds nothing, without asking any index.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    row = check("2.15", tmp_path, [])
    assert (row.version, row.status, row.passed) == ("2.15.0", "pip ended with 1", 0)


def test_unknown_versions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["2.1"])
    assert "versions must be of 2.11, 2.12" in capsys.readouterr().err
