"""The weight gradient of a pruned input: reference and operator."""

import pytest
import torch
from torch import Tensor

from actcompile.meter import measure_peak
from actcompile.triton_kernels import sparse_weight_grad as module
from actcompile.triton_kernels.quantize import FLOAT_DTYPES
from actcompile.triton_kernels.sparse_weight_grad import sparse_weight_grad, sparse_weight_grad_reference
from actcompile.triton_kernels.topk import densify_reference, sparsify_reference

SEED = torch.tensor(2024)
FORMATS = [(51, 256, 16), (51, 256, 8), (26, 128, 4), (3, 16, 4), (2, 4, 16)]
ALL_FORMATS = pytest.mark.parametrize(("keep", "block", "value_bits"), FORMATS)
ALL_DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@ALL_DTYPES
@ALL_FORMATS
@pytest.mark.parametrize("in_features", [48, 256, 1000])
def test_error(
    in_features: int, keep: int, block: int, value_bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole sums and of sums over chunks, groups within rows and across them."""
    x, grad_out = randn(70, in_features).to(dtype), randn(7, 70).to(dtype).t()
    parts = sparsify_reference(x, keep, block, value_bits, SEED, 0)
    dense = densify_reference(*parts, keep, block, value_bits, x.shape, x.stride(), dtype).double()
    exact, magnitudes = grad_out.double().t() @ dense, grad_out.double().abs().t() @ dense.abs()
    bound = len(x) * 2**-23 * magnitudes + torch.finfo(dtype).eps / 2 * exact.abs()
    arguments = (grad_out, *parts, keep, block, value_bits, in_features)
    results = [sparse_weight_grad_reference(*arguments), sparse_weight_grad(*arguments)]
    monkeypatch.setattr(module, "CHUNK_NUMEL", 20 * in_features)
    for result in [*results, sparse_weight_grad(*arguments)]:
        assert (result.dtype, result.shape) == (dtype, (7, in_features))
        assert ((result.double() - exact).abs() <= bound * 1.01).all()


def test_exact_values() -> None:
    x = torch.zeros(2, 128)
    x[0, [3, 5]], x[1, [3, 9]] = torch.tensor([2.0, -4.0]), torch.tensor([8.0, 1.0])
    parts = sparsify_reference(x, 2, 128, 16, SEED, 0)
    expected = torch.zeros(1, 128)
    expected[0, [3, 5, 9]] = torch.tensor([82.0, -4.0, 10.0])
    assert torch.equal(sparse_weight_grad(torch.tensor([[1.0], [10.0]]), *parts, 2, 128, 16, 128), expected)


@pytest.mark.parametrize(("rows", "in_features"), [(0, 256), (3, 0)])
def test_empty(rows: int, in_features: int) -> None:
    parts = sparsify_reference(torch.zeros(rows, in_features), 51, 256, 4, SEED, 0)
    result = sparse_weight_grad(torch.ones(rows, 5), *parts, 51, 256, 4, in_features)
    assert torch.equal(result, torch.zeros(5, in_features))


def test_no_more_than_a_chunk_is_dense() -> None:
    x, grad_out = torch.randn(2**15, 512), torch.randn(2**15, 8)
    parts = sparsify_reference(x[:1024], 51, 256, 8, SEED, 0)
    parts = tuple(part.repeat(32) for part in parts)
    peak = measure_peak(lambda: sparse_weight_grad(grad_out, *parts, 51, 256, 8, 512))
    assert peak.peak_nbytes < x.nbytes * 3 / 4


@ALL_DTYPES
def test_opcheck(dtype: torch.dtype) -> None:
    x, grad_out = randn(6, 200).to(dtype), randn(5, 6).to(dtype).t()
    arguments = (grad_out, *sparsify_reference(x, 3, 16, 4, SEED, 0), 3, 16, 4, 200)
    torch.library.opcheck(torch.ops.actcompile.sparse_weight_grad, arguments)


def test_errors() -> None:
    parts, grad_out = sparsify_reference(torch.randn(6, 256), 51, 256, 4, SEED, 0), torch.randn(6, 5)
    for arguments, rule in (
        ((grad_out[:5], *parts, 51, 256, 4, 256), r"got \(5, 5\) and 6 groups of 256"),
        ((grad_out.view(2, 3, 5), *parts, 51, 256, 4, 256), r"must be \[M, N\]"),
        ((grad_out.bfloat16(), *parts, 51, 256, 4, 256), "got torch.uint8 and torch.float32: cast grad_out"),
        ((grad_out, *parts, 51, 100, 4, 256), "block must be one of"),
    ):
        with pytest.raises(ValueError, match=rule):
            sparse_weight_grad(*arguments)
