"""PyTorch's own databases of operators and modules: gradients at every level.

In processes of their own: importing the databases changes what torch allows in this one.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = ("mm", "sin", "softmax", "nn.functional.silu", "linalg.inv", "var", "nn.Linear", "nn.ELU")
PARTS = 16

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("expecttest") is None, reason="PyTorch's databases need expecttest"
)


def check(*arguments: str) -> None:
    """Raises where a gradient is wrong without a stated reason."""
    command = [sys.executable, "-m", "tests.operators", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.families
@pytest.mark.parametrize("part", range(PARTS))
def test_operators(part: int) -> None:
    check("--samples", "2", "--seconds", "60", "--shard", f"{part}/{PARTS}")


def test_quick_operators() -> None:
    check("--samples", "1", "--seconds", "60", *QUICK)
