"""Fixtures and helpers of the format tests."""

import os

import numpy as np
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


@pytest.fixture
def interpreter_handles_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's interpreter gets wrong.

    It truncates where the hardware rounds to the nearest bfloat16, which torch's rounding stands in for, reads
    subnormal ones as 0, and multiplies the bit patterns of bfloat16 matrices.
    """
    if not INTERPRETED:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounding(data, source, target, mode):  # type: ignore[no-untyped-def]
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy())
        return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)

    def widened(operand):  # type: ignore[no-untyped-def]
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        values = convert(operand.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    def multiplying(self, a, b, *args):  # type: ignore[no-untyped-def]
        return dot(self, widened(a), widened(b), *args)

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiplying)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal everywhere, nan included. The two zeros are one value, and so are all nans: hardware chooses among them."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
