"""The rounding noise: its arithmetic word for word, and its quality."""

import math

import pytest
import torch

from actcompile.triton_kernels._hash import FRACTION_BITS, mix_seed, noise

SAMPLES = 2**20
WORD = 2**32 - 1


def hashed(key: int, index: int) -> int:
    """The module docstring's formula on Python integers."""
    low, high = index & WORD, index >> 32 & WORD
    h = (low ^ (key & WORD) ^ (high * 0x27D4EB2F & WORD)) * 0x9E3779B1 & WORD
    h = (h ^ (h >> 15) ^ (key >> 32 & WORD)) * 0x85EBCA77 & WORD
    return (h ^ (h >> 13)) >> 10


def uniform(*words: int) -> torch.Tensor:
    """SAMPLES numbers of one seed, as float64 in [0, 1)."""
    values = noise(torch.tensor(mix_seed(*words)), (SAMPLES // 256, 256), slice(0, 256))
    return values.flatten().double() / 2**FRACTION_BITS


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), mix_seed(7)])
def test_equals_the_formula_at_every_half(key: int) -> None:
    # Element (g, r) has the index g * 2**31 + r: rows 2 and up lie beyond 32 bits.
    rows, group_size, columns = 9, 2**31, slice(5, 12)
    actual = noise(torch.tensor(key), (rows, group_size), columns)
    expected = [[hashed(key, g * group_size + r) for r in range(5, 12)] for g in range(rows)]
    assert actual.tolist() == expected
    assert actual.dtype == torch.int32


def test_columns_are_windows_of_the_same_noise() -> None:
    key = torch.tensor(mix_seed(1))
    whole = noise(key, (4, 64), slice(0, 64))
    assert torch.equal(noise(key, (4, 64), slice(16, 32)), whole[:, 16:32])


def test_mix_seed_fills_64_signed_bits() -> None:
    words = [mix_seed(i) for i in range(4096)]
    assert all(-(2**63) <= word < 2**63 for word in words)
    assert len(set(words)) == len(words)
    for bit in range(64):
        ones = sum(word >> bit & 1 for word in words)
        assert abs(ones - 2048) < 5 * math.sqrt(1024), bit
    assert mix_seed(1, 2) != mix_seed(2, 1)


@pytest.mark.parametrize("seed", range(4))
def test_uniform(seed: int) -> None:
    u = uniform(seed)
    # Standard errors of a uniform variable's mean, variance and bin counts, times 4.5.
    assert abs(float(u.mean()) - 1 / 2) < 4.5 * math.sqrt(1 / 12 / SAMPLES)
    assert abs(float(u.var()) - 1 / 12) < 4.5 * math.sqrt(1 / 180 / SAMPLES)
    counts = torch.histc(u, 256, 0, 1)
    chi_square = float(((counts - SAMPLES / 256) ** 2).sum() / (SAMPLES / 256))
    assert abs(chi_square - 255) < 4.5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 32, 128, 256, 4096])
def test_indices_are_uncorrelated(lag: int) -> None:
    u = uniform(3)
    assert abs(correlation(u[:-lag], u[lag:])) < 4.5 / math.sqrt(SAMPLES)


@pytest.mark.parametrize("salt", [0, 5])
@pytest.mark.parametrize("seed", [0, 1, 1000])
def test_neighbouring_seeds_and_salts_are_uncorrelated(seed: int, salt: int) -> None:
    u = uniform(seed, salt)
    for other in (uniform(seed + 1, salt), uniform(seed, salt + 1)):
        assert abs(correlation(u, other)) < 4.5 / math.sqrt(SAMPLES)


def test_unmixed_neighbouring_seeds_are_uncorrelated_at_an_element() -> None:
    first, second = (noise(torch.tensor(key), (SAMPLES // 256, 256), slice(0, 256)) for key in (6, 7))
    assert abs(correlation(first.flatten().double(), second.flatten().double())) < 4.5 / math.sqrt(SAMPLES)
