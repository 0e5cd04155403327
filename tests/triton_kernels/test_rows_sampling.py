"""Which rows are sampled: counts, probabilities, means, variances."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from actcompile.triton_kernels.rows import (
    MAX_ROWS,
    ONE_BITS,
    inclusion_probability,
    inclusion_shares,
    row_norms,
    sample_rows,
    sampled_weight_grad,
    sampling_variance,
)

SEED = torch.tensor(2024)
ONE = 2**ONE_BITS
INF, NAN = math.inf, math.nan


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def scaled_rows(rows: int, features: int) -> Tensor:
    """Rows whose norms differ by orders of magnitude: some are certain."""
    return randn(rows, features) * randn(rows, 1, seed=1).mul(1.2).exp()


def spread(rows: int) -> Tensor:
    """All exponents of float32, denormals included."""
    return torch.linspace(-149, 127, rows, dtype=torch.float64).exp2().float()


def with_values(rows: int, *values: float) -> Tensor:
    """Ones, but for the first."""
    return torch.cat([torch.tensor(values), torch.ones(rows)])[:rows]


# Norms of M rows.
NORMS: dict[str, Callable[[int], Tensor]] = {
    "equal": torch.ones,
    "equal, not a binary fraction": lambda rows: torch.full((rows,), 0.1),
    "uniform": lambda rows: randn(rows).abs(),
    "nearly equal": lambda rows: 1 + randn(rows).mul(2**-23),
    "heavy tail": lambda rows: randn(rows).mul(4).exp(),
    "all exponents": spread,
    "all exponents, descending": lambda rows: spread(rows).flip(0),
    "one huge": lambda rows: with_values(rows, 3e38),
    "one tiny": lambda rows: with_values(rows, 1e-45),
    "denormals": lambda rows: torch.full((rows,), 1e-45),
    "denormals that differ": lambda rows: torch.arange(1, rows + 1) * 2.0**-149,
    "largest numbers": lambda rows: torch.full((rows,), torch.finfo(torch.float32).max),
    "inf and nan": lambda rows: with_values(rows, INF, NAN),
    "inf throughout": lambda rows: torch.full((rows,), INF),
    "zeros": torch.zeros,
    "mostly zeros": lambda rows: torch.where(torch.arange(rows) % 7 == 3, randn(rows).abs(), 0.0),
    "half zeros, half denormals": lambda rows: (torch.arange(rows) % 2) * 1e-45,
}


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 1000, 20000])
@pytest.mark.parametrize("name", NORMS)
def test_counts_and_shares(name: str, rows: int) -> None:
    """num_rows different rows, whatever the norms; every row above zero has a chance."""
    norm = NORMS[name](rows)
    for num_rows in {1, 2, math.ceil(0.3 * rows), rows // 7, rows // 7 + 1, rows - 1, rows} & set(range(1, rows + 1)):
        shares = inclusion_shares(norm, num_rows)
        assert int(shares.sum()) == num_rows * ONE
        assert int(shares.min()) >= 0 and int(shares.max()) <= ONE
        num_positive = int((norm != 0).sum())
        if num_positive <= num_rows:
            assert (shares[norm != 0] == ONE).all()
        else:
            assert torch.equal(shares > 0, norm != 0)
        for seed in range(3):
            kept, position, weight = sample_rows(norm.view(-1, 1), None, num_rows, torch.tensor(seed), 5)
            assert len(position) == num_rows
            assert (position.diff() > 0).all()
            assert int(position[0]) >= 0 and int(position[-1]) < rows
            assert torch.equal(kept.view(-1).nan_to_num(), norm[position].nan_to_num())
            expected = torch.where(norm[position] != 0, ONE / shares[position].double(), 0).float()
            assert torch.equal(weight, expected)


@pytest.mark.parametrize("name", ["equal", "denormals", "largest numbers", "inf throughout"])
def test_equal_norms_have_equal_chances(name: str) -> None:
    p = inclusion_probability(NORMS[name](1000), 70)
    torch.testing.assert_close(p, torch.full_like(p, 0.07), rtol=0, atol=2.0 ** (22 - ONE_BITS))


@pytest.mark.parametrize("name", ["equal, not a binary fraction", "heavy tail", "all exponents", "one huge"])
def test_most_rows(name: str) -> None:
    norm = NORMS[name](MAX_ROWS)
    for num_rows in (1, 2, MAX_ROWS // 3, MAX_ROWS - 1):
        shares = inclusion_shares(norm, num_rows)
        assert int(shares.sum()) == num_rows * ONE
        assert int(shares.min()) >= 1 and int(shares.max()) <= ONE
        _, position, _ = sample_rows(norm.view(-1, 1), None, num_rows, SEED, 0)
        assert (position.diff() > 0).all()
        assert int(position[0]) >= 0 and int(position[-1]) < MAX_ROWS


@pytest.mark.parametrize("num_rows", [1, 40, 150, 499])
def test_probabilities_fill_up(num_rows: int) -> None:
    """min(1, t * norm), with the t that bisection finds."""
    norm = randn(500).mul(1.5).exp()
    low, high = 0.0, 1e6
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if float((t * norm.double()).clamp(max=1).sum()) < num_rows else (low, t)
    p = inclusion_probability(norm, num_rows)
    torch.testing.assert_close(p, (low * norm.double()).clamp(max=1), rtol=1e-6, atol=2.0**-ONE_BITS)


def samples(x: Tensor, grad_out: Tensor, num_rows: int, num_seeds: int) -> Tensor:
    """Weight gradients of many seeds, float64 [num_seeds, N, K]."""
    results = []
    for seed in range(num_seeds):
        sampled = sample_rows(x, None, num_rows, torch.tensor(seed * 7919), 11)
        results.append(sampled_weight_grad(grad_out, *sampled).double())
    return torch.stack(results)


@pytest.mark.parametrize("equal", [False, True])
def test_mean(equal: bool) -> None:
    """z-scores of the mean error, which thereby shrinks with the square root of the number of seeds."""
    x = scaled_rows(120, 6)
    if equal:
        x = x / x.norm(dim=1, keepdim=True)
    grad_out = randn(120, 5)
    exact = grad_out.double().t() @ x.double()
    for num_seeds in (300, 4800):
        results = samples(x, grad_out, 36, num_seeds)
        z = (results.mean(0) - exact) / (results.std(0) / math.sqrt(num_seeds))
        assert z.abs().max() < 4
        assert z.square().mean().sqrt() < 1.5


def test_frequencies() -> None:
    """Rows are kept as often as their probabilities say: binomial z-scores, with low and high halves of the seed."""
    x, num_seeds = scaled_rows(80, 4), 3000
    p = inclusion_probability(row_norms(x), 24)
    assert 2 <= int((p == 1).sum()) < 20
    for step in (1, 2**32, 0x9E3779B97F4A):
        counts = torch.zeros(80, dtype=torch.float64)
        for seed in range(num_seeds):
            counts[sample_rows(x, None, 24, torch.tensor(seed * step), 3)[1]] += 1
        assert (counts[p == 1] == num_seeds).all()
        z = (counts - num_seeds * p)[p < 1] / (num_seeds * p * (1 - p))[p < 1].sqrt()
        assert z.abs().max() < 4.5


@pytest.mark.parametrize("num_rows", [26, 77, 180])
def test_variance(num_rows: int) -> None:
    x, grad_out = scaled_rows(256, 16), randn(256, 12)
    p = inclusion_probability(row_norms(x), num_rows)
    predicted = sampling_variance(row_norms(x) * row_norms(grad_out), p)
    exact = grad_out.double().t() @ x.double()
    measured = (samples(x, grad_out, num_rows, 500) - exact).square().sum((1, 2)).mean()
    assert 0.7 < float(measured / predicted) < 1.3


def test_variance_of_rows_that_are_never_kept() -> None:
    p = torch.tensor([1.0, 0.5, 0.0, 0.25])
    assert sampling_variance(torch.tensor([7.0, 3.0, 0.0, 2.0]), p).item() == 9 + 12
