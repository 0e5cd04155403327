"""The eager operators, chunk by chunk, against the references on whole tensors."""

import pytest
import torch

from actcompile.meter import measure_peak
from actcompile.triton_kernels import _chunked
from actcompile.triton_kernels.quantize import FLOAT_DTYPES, PLANES, dequantize_reference, quantize_reference

SEED = torch.tensor(2**40 + 7)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("bits", PLANES)
def test_same_bits_as_the_reference(bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_chunked, "CHUNK_NUMEL", 3 * 64)
    x = torch.randn(3, 50, 7, dtype=dtype).transpose(0, 1)
    expected = quantize_reference(x, bits, 64, SEED, 5)
    found = torch.ops.actcompile.quantize(x, bits, 64, SEED, 5)
    for part, reference in zip(found, expected, strict=True):
        assert torch.equal(part.view(torch.uint8), reference.view(torch.uint8))
    layout = (bits, 64, x.shape, x.stride(), dtype)
    decoded = torch.ops.actcompile.dequantize(*found, *layout)
    assert torch.equal(decoded, dequantize_reference(*expected, *layout))
    assert decoded.stride() == x.stride()


def test_rounding_variance_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1000)
    whole = _chunked.rounding_variance(x, (2, 4), 64)
    monkeypatch.setattr(_chunked, "CHUNK_NUMEL", 128)
    assert torch.equal(_chunked.rounding_variance(x, (2, 4), 64), whole)


def test_what_is_not_finite_has_no_variance_and_takes_a_level() -> None:
    x = torch.arange(64.0)
    x[5], x[40] = torch.nan, -torch.inf
    (variance,) = _chunked.rounding_variance(x, (2,), 64)
    fraction = (x[x.isfinite()] / (63 / 2)).frac()
    assert variance.item() == pytest.approx((fraction * (1 - fraction)).sum().item() / 64 * (63 / 2) ** 2, rel=1e-5)
    assert _chunked.rounding_variance(torch.full((64,), torch.nan), (2,), 64).item() == 0


def test_memory_is_that_of_the_results() -> None:
    x = torch.randn(2**22)
    codes = torch.ops.actcompile.quantize(x, 4, 256, SEED, 0)
    encode = measure_peak(lambda: torch.ops.actcompile.quantize(x, 4, 256, SEED, 0))
    decode = measure_peak(lambda: torch.ops.actcompile.dequantize(*codes, 4, 256, x.shape, x.stride(), x.dtype))
    variance = measure_peak(lambda: _chunked.rounding_variance(x, (1, 2, 3, 4, 6, 8), 256))
    assert max(encode.peak_nbytes, variance.peak_nbytes) < x.nbytes
    assert decode.peak_nbytes < 1.5 * x.nbytes
