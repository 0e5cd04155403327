"""Runs the kernel tests under Triton's interpreter, in a process of its own: Triton reads the variable on import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL_TESTS = sorted(Path(__file__).parent.glob("test_*_kernel.py"))


@pytest.mark.parametrize("path", KERNEL_TESTS, ids=lambda path: path.stem)
def test_kernels_equal_their_references(path: Path) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", str(path)]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout, result.stdout
