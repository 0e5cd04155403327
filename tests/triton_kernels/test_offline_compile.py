"""Every kernel compiled for GPUs that need not be there: nothing spills, accesses stay wide, arithmetic stays IEEE."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from .conftest import INTERPRETED

triton = pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("compiles kernels, which the interpreter replaces", allow_module_level=True)

from .offline import (  # noqa: E402
    CODECS,
    MASKS,
    SPARSE,
    TABLE,
    TARGETS,
    VERSIONS,
    WEIGHT_GRADS,
    Case,
    cases,
    compile_case,
    read_row,
    read_table,
)

TABLE_VERSIONS, ROWS = read_table()
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]


@pytest.fixture(autouse=True)
def _fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


# Per thread: a codec leaves room for other programs, a matrix product fills a processor.
MAX_REGISTERS, MAX_PRODUCT_REGISTERS = 128, 256
# Bytes of a thread; with Triton 3.8 and 3.9 a few of weight_grad's and sparsify's hundred shapes spill up to 32.
MAX_SPILLED = 0 if TABLE_VERSIONS == VERSIONS else 32


def assert_in_registers(compiled: Any, max_registers: int = MAX_REGISTERS) -> None:
    """Nothing spilled, by the Triton that the table is of."""
    row = read_row(compiled)
    assert int(row["spilled_nbytes"]) <= MAX_SPILLED, row
    assert 0 < int(row["registers"]) <= max_registers, row


@pytest.mark.parametrize("case", cases(), ids=lambda case: "-".join(map(str, case)))
def test_table(case: Case) -> None:
    """What a kernel takes changes only together with the table."""
    compiled = compile_case(case)
    assert_in_registers(compiled, MAX_PRODUCT_REGISTERS if case.kernel in WEIGHT_GRADS else MAX_REGISTERS)
    if case.kernel in {*CODECS, *SPARSE} and case.target in NVIDIA:
        assert_ieee(compiled, encodes=case.kernel.startswith(("quantize", "sparsify")) and case.bits < 16)
    if TABLE_VERSIONS == VERSIONS:
        remedy = f"if that is meant, write {TABLE.name} anew: python -m tests.triton_kernels.offline"
        assert read_row(compiled) == ROWS[case], remedy


def assert_ieee(compiled: Any, encodes: bool) -> None:
    """What bit-exactness rests on."""
    ptx = compiled.asm["ptx"]
    assert "fma." not in ptx
    assert ".ftz" not in ptx
    assert ".approx" not in ptx
    assert ("div.rn.f32" in ptx) == encodes
    # The interpreter, whose minima and maxima all pass nan on, cannot tell these.
    assert ("max.NaN.f32" in ptx) == encodes
    assert "min.NaN.f32" not in ptx


def test_table_has_every_kernel() -> None:
    assert list(ROWS) == list(cases())


@pytest.mark.parametrize("target", NVIDIA)
def test_accesses_are_wide_and_not_repeated(target: str) -> None:
    """A thread's runs of elements in 16 bytes each; on top seed and last element, or scale and zero point, once."""
    encode, decode = (ROWS[Case(kernel, 4, "bf16", target)] for kernel in CODECS)
    assert encode["loads"] == "4x128 1x64 1x16"
    assert decode["loads"] == "1x64 2x16"
    assert decode["stores"] == "2x128"


@pytest.mark.parametrize("group_size", [32, 64, 1024, 16384])
def test_group_sizes(group_size: int) -> None:
    for kernel, bits in product(CODECS, (1, 8)):
        assert_in_registers(compile_case(Case(kernel, bits, "bf16", "sm_90"), group_size))


@pytest.mark.parametrize("target", NVIDIA)
def test_pruning_reads_and_writes_dense_tensors_in_wide_accesses(target: str) -> None:
    """What is kept is stored one element at a time: where it lands depends on the data."""
    # The seed is one more load of 64 bits.
    for kernel, loads, stores in (("51:256", "1x128 1x64", "1x128"), ("2:16", "3x64", "2x64")):
        assert ROWS[Case(f"sparsify {kernel}", 4, "bf16", target)]["loads"] == loads
        assert ROWS[Case(f"densify {kernel}", 4, "bf16", target)]["stores"] == stores


@pytest.mark.parametrize("block", [128, 512, 1024])
def test_pruned_block_sizes(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel in ("sparsify", "densify"):
        monkeypatch.setitem(SPARSE, f"{kernel} 100:{block}", SPARSE[f"{kernel} 51:256"])
        for target in NVIDIA:
            assert_in_registers(compile_case(Case(f"{kernel} 100:{block}", 4, "fp32", target), aligned=False))


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("kernel", [*CODECS, *MASKS])
def test_sizes_that_are_no_multiple_of_16(kernel: str, target: str) -> None:
    case = Case(kernel, 4, "fp32", target) if kernel in CODECS else Case(kernel, 1, "u8", target)
    assert_in_registers(compile_case(case, aligned=False))


@pytest.mark.parametrize("target", NVIDIA)
@pytest.mark.parametrize("kernel", WEIGHT_GRADS)
def test_weight_grads_of_any_size(kernel: str, target: str) -> None:
    """Sizes that are no multiple of 16, small and large groups, parts of a sum."""
    dtype = "fp32" if Case(kernel, 4, "fp32", target) in ROWS else "bf16"
    columns = int(kernel.rpartition("x")[2])
    for group_size in (columns, 1024):
        compiled = compile_case(Case(kernel, 4, dtype, target), group_size, aligned=False, parts=group_size == columns)
        assert_in_registers(compiled, MAX_PRODUCT_REGISTERS)


@pytest.mark.parametrize(("target", "instruction"), [("sm_80", "mma.sync"), ("sm_90", "wgmma.mma_async")])
def test_products_run_on_matrix_units(target: str, instruction: str) -> None:
    """What they read is copied ahead to shared memory, 8 or 16 bytes at a time, but for scales and zero points."""
    for kernel in WEIGHT_GRADS:
        case = Case(kernel, 4, "bf16", target)
        if case in ROWS:
            assert instruction in compile_case(case).asm["ptx"]
            widths = [access.split("x") for access in ROWS[case]["loads"].split()]
            assert {bits for _, bits in widths} <= {"128", "64", "16"}, ROWS[case]
