"""Sampled rows and their weight gradient: values, errors, operators."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from actcompile.meter import measure_peak
from actcompile.triton_kernels.quantize import FLOAT_DTYPES
from actcompile.triton_kernels.rows import (
    MAX_ROWS,
    inclusion_probability,
    row_norms,
    sample_rows,
    sample_rows_reference,
    sampled_nbytes,
    sampled_weight_grad,
    sampled_weight_grad_reference,
)

SEED = torch.tensor(2024)
INF, NAN = math.inf, math.nan
ALL_DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def scaled_rows(rows: int, features: int) -> Tensor:
    """Rows whose norms differ by orders of magnitude: some are certain."""
    return randn(rows, features) * randn(rows, 1, seed=1).mul(1.2).exp()


def test_exact_values() -> None:
    """Norms 9, 1, 1, 1, 0, 1 and 3 slots: the first is certain, half of the ones follow."""
    x = torch.zeros(6, 2)
    x[:, 1] = torch.tensor([9.0, -1, 1, 1, 0, 1])
    assert inclusion_probability(row_norms(x), 3).tolist() == [1, 0.5, 0.5, 0.5, 0, 0.5]
    seen = set()
    for seed in range(80):
        rows, position, weight = sample_rows(x, None, 3, torch.tensor(seed), 0)
        assert weight.tolist() == [1, 2, 2]
        assert torch.equal(rows, x[position])
        seen.add(tuple(position.tolist()))
        grad_out = torch.tensor([[1.0], [10], [100], [1000], [10000], [100000]])
        expected = 9.0 + sum(2 * float(grad_out[m] * x[m, 1]) for m in position[1:].tolist())
        assert sampled_weight_grad(grad_out, rows, position, weight).tolist() == [[0, expected]]
    # Any two of the four, as they are shuffled.
    assert seen == {(0, a, b) for a, b in itertools.combinations((1, 2, 3, 5), 2)}


def test_tiny_rows_are_not_zeros() -> None:
    """Their squares underflow in float32."""
    x = torch.zeros(4, 3)
    x[2, 1] = -1e-40
    assert row_norms(x).tolist() == [0, 0, x[2, 1].abs().item(), 0]
    _, position, weight = sample_rows(x, None, 1, SEED, 0)
    assert (position.tolist(), weight.tolist()) == ([2], [1])


def test_what_is_not_finite_comes_out() -> None:
    x, grad_out = randn(50, 4), randn(50, 3)
    x[:20] *= 1e18
    x[30, 1], x[40, 2] = INF, NAN
    for seed in range(20):
        rows, position, weight = sample_rows(x, None, 3, torch.tensor(seed), 0)
        assert {30, 40} <= set(position.tolist())
        assert weight[torch.isin(position, torch.tensor([30, 40]))].tolist() == [1, 1]
        finite = sampled_weight_grad(grad_out, rows, position, weight).isfinite()
        assert torch.equal(finite, torch.tensor([True, False, False, True]).expand(3, 4))


def integers(*shape: int) -> Tensor:
    """Small ones, sums of whose products are exact in all dtypes but for the last rounding."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(sum(shape))).float()


@ALL_DTYPES
@pytest.mark.parametrize("num_rows", [30, 31, 100])
def test_lossless(num_rows: int, dtype: torch.dtype) -> None:
    """Equal to the plain product, exactly where no sum is rounded; else up to float32's order of sums."""
    needed = torch.zeros(100, dtype=torch.bool)
    needed[torch.randperm(100, generator=torch.Generator().manual_seed(0))[:30]] = True
    for x, grad_out in ((integers(100, 8), integers(100, 5)), (randn(100, 8), randn(100, 5))):
        x, grad_out = (x + 7 * (x == 0)).to(dtype), grad_out.to(dtype)
        zeros = torch.where(needed.unsqueeze(1), x, 0)
        padded = torch.where(needed.unsqueeze(1), grad_out, 0)
        expected = padded.t() @ x
        for sampled, gradient in (
            (sample_rows(zeros, None, num_rows, SEED, 0), grad_out),
            (sample_rows(torch.where(needed.unsqueeze(1), x, NAN), needed, num_rows, SEED, 0), padded),
        ):
            assert torch.equal(sampled[2].sort(descending=True).values, (torch.arange(num_rows) < 30).float())
            result = sampled_weight_grad(gradient, *sampled)
            if x.frac().any():
                torch.testing.assert_close(result, expected)
            else:
                assert torch.equal(result, expected)


def test_invalid_rows_are_never_kept_before_valid_ones() -> None:
    x, valid = scaled_rows(300, 4), torch.arange(300) % 3 > 0
    for seed in range(20):
        _, position, weight = sample_rows(x, valid, 60, torch.tensor(seed), 0)
        assert valid[position].all()
        assert (weight >= 1).all()


def test_seed_and_salt_decide() -> None:
    x = scaled_rows(1000, 3)
    first = sample_rows(x, None, 300, SEED, 0)
    assert all(map(torch.equal, first, sample_rows(x, None, 300, SEED, 0)))
    assert not torch.equal(first[1], sample_rows(x, None, 300, SEED, 1)[1])
    assert not torch.equal(first[1], sample_rows(x, None, 300, SEED + 1, 0)[1])


@ALL_DTYPES
def test_product(dtype: torch.dtype) -> None:
    """Against float64: the scaled gradient is rounded once, then products are added in float32."""
    x, grad_out = scaled_rows(600, 40).t().contiguous().t().to(dtype), randn(7, 600).t().to(dtype)
    rows, position, weight = sample_rows(x, None, 180, SEED, 0)
    assert rows.dtype == dtype and rows.is_contiguous()
    assert torch.equal(rows, x[position])
    scaled = (grad_out[position].float() * weight.unsqueeze(1)).to(dtype).double()
    exact, magnitudes = scaled.t() @ rows.double(), scaled.abs().t() @ rows.double().abs()
    result = sampled_weight_grad(grad_out, rows, position, weight)
    assert (result.dtype, result.shape) == (dtype, (7, 40))
    bound = 180 * 2**-23 * magnitudes + torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((result.double() - exact).abs() <= bound * 1.01).all()


@pytest.mark.parametrize(("rows", "features", "num_rows"), [(0, 8, 0), (3, 0, 2)])
def test_empty(rows: int, features: int, num_rows: int) -> None:
    sampled = sample_rows(torch.zeros(rows, features), None, num_rows, SEED, 0)
    assert [tuple(part.shape) for part in sampled] == [(num_rows, features), (num_rows,), (num_rows,)]
    result = sampled_weight_grad(torch.ones(rows, 5), *sampled)
    assert torch.equal(result, torch.zeros(5, features))


@ALL_DTYPES
def test_nbytes(dtype: torch.dtype) -> None:
    sampled = sample_rows(randn(50, 12).to(dtype), None, 15, SEED, 0)
    assert sampled_nbytes(15, 12, dtype) == sum(part.nbytes for part in sampled)


def test_little_beside_the_rows_is_in_memory() -> None:
    x = randn(2**15, 512).bfloat16()
    peak = measure_peak(lambda: sample_rows(x, None, 2**13, SEED, 0))
    assert peak.peak_nbytes < x.nbytes * 0.6


@ALL_DTYPES
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool, dtype: torch.dtype) -> None:
    x, grad_out = randn(20, 8).to(dtype), randn(5, 20).to(dtype).t()
    valid = torch.arange(20) < 12 if masked else None
    torch.library.opcheck(torch.ops.actcompile.sample_rows, (x, valid, 6, SEED, 3))
    torch.library.opcheck(torch.ops.actcompile.sampled_weight_grad, (grad_out, *sample_rows(x, valid, 6, SEED, 3)))


def gradient(x: Tensor, valid: Tensor, grad_out: Tensor, seed: Tensor) -> Tensor:
    """Of a share of 0.3, as operators."""
    sampled = torch.ops.actcompile.sample_rows(x, valid, (x.shape[0] * 3 + 9) // 10, seed, 3)
    return torch.ops.actcompile.sampled_weight_grad(grad_out, *sampled)


def test_compiled_with_dynamic_rows() -> None:
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (40, 77, 130):
            arguments = (scaled_rows(rows, 8), torch.arange(rows) % 5 > 0, randn(rows, 6), SEED)
            for argument in arguments[:3]:
                torch._dynamo.mark_dynamic(argument, 0)
            assert torch.equal(compiled(*arguments), gradient(*arguments))


def test_nothing_waits_for_the_device() -> None:
    """What the operators run, traced without data and with a dynamic number of rows, reads no value on the host."""

    def reference(x: Tensor, valid: Tensor, grad_out: Tensor, seed: Tensor) -> Tensor:
        sampled = sample_rows_reference(x, valid, (x.shape[0] * 3 + 9) // 10, seed, 3)
        return sampled_weight_grad_reference(grad_out, *sampled)

    with FakeTensorMode():
        arguments = (torch.empty(100, 8), torch.empty(100, dtype=torch.bool), torch.empty(100, 6), torch.tensor(0))
        assert reference(*arguments).shape == (6, 8)
    real = (scaled_rows(100, 8), torch.arange(100) % 5 > 0, randn(100, 6), SEED)
    graph = make_fx(reference, tracing_mode="symbolic")(*real).graph
    operators = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert "aten.searchsorted.Tensor" in operators
    waiting = (
        "aten._local_scalar_dense",
        "aten.item",
        "aten.nonzero",
        "aten.masked_select",
        "aten.is_nonzero",
        "aten.equal",
    )
    assert not [name for name in operators if name.startswith(waiting)]


def test_errors() -> None:
    x, grad_out = randn(20, 8), randn(20, 5)
    rows, position, weight = sample_rows(x, None, 6, SEED, 0)
    for arguments, rule in (
        ((x.double(), None, 6), "got torch.float64: cast the tensor"),
        ((x.view(2, 10, 8), None, 6), r"x must be \[M, K\] .*, got \(2, 10, 8\): flatten"),
        ((x[:1, :0].expand(MAX_ROWS + 1, 0), None, 6), r"with M up to 1048576, got \(1048577, 0\)"),
        ((x, None, 0), "num_rows must be from 1 to 20, got 0: keep a row"),
        ((x, None, 21), "num_rows must be from 1 to 20, got 21"),
        ((x, torch.ones(20), 6), r"valid must be torch.bool \[20\], got torch.float32 \(20,\): one element"),
        ((x, torch.ones(19, dtype=torch.bool), 6), r"got torch.bool \(19,\)"),
    ):
        with pytest.raises(ValueError, match=rule):
            sample_rows(*arguments, SEED, 0)
    for operands, rule in (
        ((grad_out.view(2, 10, 5), rows, position, weight), r"grad_out must be \[M, N\], got \(2, 10, 5\): view"),
        ((grad_out, rows[:5], position, weight), r"\[R\], got \(5, 8\), \(6,\) and \(6,\): pass what one call"),
        ((grad_out, rows, position.long(), weight), "got torch.int64 and torch.float32: pass what"),
        ((grad_out.bfloat16(), rows, position, weight), "dtype of rows torch.float32, got torch.bfloat16: cast it"),
    ):
        with pytest.raises(ValueError, match=rule):
            sampled_weight_grad(*operands)
