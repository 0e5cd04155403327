"""Fixtures and helpers of the format tests."""

import os

import pytest
import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["interpreter"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton kernels run: the CPU in a process of test_interpreter.py, a CUDA device in any other."""
    if request.param == "interpreter":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal everywhere, nan included. The two zeros are one value, and so are all nans: hardware chooses among them."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
