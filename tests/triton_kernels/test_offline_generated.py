"""Kernels that Inductor generates around encoders and decoders: nothing spills, accesses stay wide."""

from pathlib import Path

import pytest

from .conftest import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("compiles kernels, which the interpreter replaces", allow_module_level=True)

from .offline import Case, read_row, read_table
from .offline_generated import GENERATED_VERSIONS, TABLE, cases, compile_case

TABLE_VERSIONS, ROWS = read_table(TABLE)


@pytest.mark.parametrize("case", cases(), ids=lambda case: "-".join(map(str, case)))
def test_table(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a kernel takes changes only together with the table."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    row = read_row(compile_case(case))
    assert row["spilled_nbytes"] == "0", row
    # Elements are read and written 16 bytes at a time.
    assert "x128" in row["loads"] and "x128" in row["stores"], row
    if TABLE_VERSIONS == GENERATED_VERSIONS:
        remedy = f"if that is meant, write {TABLE.name} anew: python -m tests.triton_kernels.offline_generated"
        assert row == ROWS[case], remedy


def test_table_has_every_kernel() -> None:
    assert list(ROWS) == list(cases())
