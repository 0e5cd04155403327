"""The weight gradient of a quantized input: reference and operator."""

import pytest
import torch
from torch import Tensor

from actcompile.triton_kernels.quantize import FLOAT_DTYPES, PLANES, dequantize_reference, quantize_reference
from actcompile.triton_kernels.weight_grad import quantized_weight_grad_reference

SEED = torch.tensor(2024)


def encoded(x: Tensor, bits: int, group_size: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_reference(x, bits, group_size, SEED, 0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("bits", PLANES)
def test_reference_decodes_and_multiplies(bits: int, dtype: torch.dtype) -> None:
    x, grad_out = torch.randn(20, 128).to(dtype), torch.randn(20, 7).to(dtype)
    parts = encoded(x, bits)
    decoded = dequantize_reference(*parts, bits, 64, x.shape, x.stride(), dtype)
    expected = (grad_out.double().t() @ decoded.double()).to(dtype)
    for transposed, wanted in ((False, expected), (True, expected.t())):
        actual = quantized_weight_grad_reference(grad_out, *parts, bits, 64, 128, transposed)
        torch.testing.assert_close(actual, wanted)


def test_exact_values() -> None:
    """Two rows of a group each: zero + scale * code, codes 0 .. 15 in a group's first half and 0 in its second."""
    codes = torch.tensor([*range(16), *[0] * 16] * 2, dtype=torch.uint8)
    scale, zero = torch.tensor([2.0, 1.0], dtype=torch.bfloat16), torch.tensor([1.0, -3.0])
    grad_out = torch.tensor([[1.0], [10.0]])
    result = torch.ops.actcompile.quantized_weight_grad(grad_out, codes, scale, zero, 4, 64, 64, False)
    code = torch.tensor([*range(16), *[0.0] * 48])
    assert torch.equal(result, (1 + 2 * code + 10 * (code - 3)).view(1, 64))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype, transposed: bool) -> None:
    x, grad_out = torch.randn(6, 128).to(dtype), torch.randn(5, 6).to(dtype).t()
    arguments = (grad_out, *encoded(x, 4), 4, 64, 128, transposed)
    torch.library.opcheck(torch.ops.actcompile.quantized_weight_grad, arguments)


def test_errors() -> None:
    parts = encoded(torch.randn(6, 128), 4)
    grad_out = torch.randn(6, 5)
    operator = torch.ops.actcompile.quantized_weight_grad
    for arguments, rule in (
        ((grad_out, *parts, 4, 64, 96, False), "in_features must be a multiple of 64, got 96"),
        ((grad_out, *parts, 4, 32, 128, False), "group_size must be at least 64, got 32"),
        ((grad_out[:5], *parts, 4, 64, 128, False), r"got \(5, 5\) and 12 groups of 64"),
        ((grad_out.view(2, 3, 5), *parts, 4, 64, 128, False), r"must be \[M, N\]"),
        ((grad_out.bfloat16(), *parts, 4, 64, 128, False), "stored tensor's dtype torch.float32, got torch.bfloat16"),
        ((grad_out, *parts, 5, 64, 128, False), "bits must be one of"),
    ):
        with pytest.raises(ValueError, match=rule):
            operator(*arguments)
