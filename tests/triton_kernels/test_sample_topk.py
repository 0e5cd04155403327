"""Back Razor's storage format: how many elements are kept, which, and in how many bytes."""

import pytest
import torch

from actcompile.triton_kernels.sample_topk import (
    keep_largest_of_samples,
    prune_samples,
    pruned_nbytes,
    restore_samples,
    sample_rank,
)


@pytest.mark.parametrize(
    ("numel", "sparsity", "expected"),
    [
        (100, 0.8, 80),
        (100, 0.0, 1),
        (3, 0.2, 1),
        (5, 0.99, 4),
        (1, 0.9, 1),
        # 100 * 0.57 is 56.99999999999999, and 10 * 0.7 is 7 all the same.
        (100, 0.57, 56),
        (10, 0.7, 7),
    ],
)
def test_rank(numel: int, sparsity: float, expected: int) -> None:
    assert sample_rank(numel, sparsity) == expected


@pytest.mark.parametrize("shape", [(4, 50), (3, 2, 5, 5), (2, 7), (6,)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.97])
def test_without_ties_each_sample_keeps_one_more_than_the_rest(shape: tuple[int, ...], sparsity: float) -> None:
    """N - k + 1 elements, of every sample, and they are the largest."""
    numel = torch.Size(shape[1:]).numel()
    x = torch.stack([(torch.randperm(numel) + 1.0) * torch.randn(numel).sign() for _ in range(shape[0])]).view(shape)
    kept = keep_largest_of_samples(x, sparsity).view(shape[0], -1)
    rank = max(int(numel * sparsity), 1)
    assert kept.sum(1).tolist() == [numel - rank + 1] * shape[0]
    assert torch.equal(kept, x.view(shape[0], -1).abs() >= rank)


def test_ties_with_the_threshold_are_all_kept() -> None:
    x = torch.tensor([[1.0, -2.0, 2.0, 2.0, 3.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    assert keep_largest_of_samples(x, 0.6).tolist() == [
        [False, True, True, True, True],
        [True, True, True, False, False],
    ]


def test_a_sample_that_is_mostly_zero_is_kept_whole() -> None:
    """Where k elements are zero, so is the threshold, and every zero is stored: 17 bits per element instead of 4.2."""
    x = torch.zeros(2, 1000)
    x[0, :200] = 1.0  # 800 zeros at a rank of 800
    x[1, :201] = 1.0  # 799
    assert keep_largest_of_samples(x, 0.8).sum(1).tolist() == [1000, 201]
    bits, values = prune_samples(x[:1], 0.8, torch.float16)
    assert 8 * (bits.nbytes + values.nbytes) == 17 * 1000


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.float32])
def test_round_trip_and_bytes(value_dtype: torch.dtype) -> None:
    """Also of a permuted tensor, in the order of its dimensions."""
    x = torch.randn(3, 7, 11).transpose(1, 2)
    bits, values = prune_samples(x, 0.8, value_dtype)
    num_kept = 3 * (77 - 61 + 1)
    assert (bits.dtype, values.dtype, len(values)) == (torch.uint8, value_dtype, num_kept)
    assert (
        bits.nbytes + values.nbytes
        == pruned_nbytes(x.numel(), num_kept, value_dtype)
        == 29 + num_kept * values.itemsize
    )
    expected = torch.where(keep_largest_of_samples(x, 0.8), x, torch.zeros(())).to(value_dtype).float()
    restored = restore_samples((bits, values), x.shape, x.dtype)
    assert torch.equal(restored, expected)
    assert restored.is_contiguous()


def test_bits_are_those_of_pack_bool() -> None:
    """Byte j holds elements j and j + 2 of the sixteen, and so on."""
    x = torch.zeros(1, 16)
    x[0, 0], x[0, 3] = 1.0, -2.0
    bits, values = prune_samples(x, 0.9375, torch.float32)
    assert (bits.tolist(), values.tolist()) == ([1, 2], [1.0, -2.0])


def test_values_beyond_float16_become_infinite() -> None:
    pruned = prune_samples(torch.tensor([[1e5, -1e5, 1.0]]), 0.4, torch.float16)
    assert restore_samples(pruned, (1, 3), torch.float32).tolist() == [[torch.inf, -torch.inf, 1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    x = torch.randn(2, 50).to(dtype)
    restored = restore_samples(prune_samples(x, 0.8, dtype), x.shape, dtype)
    assert restored.dtype == dtype
    assert torch.equal(restored, torch.where(keep_largest_of_samples(x, 0.8), x, torch.zeros((), dtype=dtype)))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing_of_nothing(shape: tuple[int, ...]) -> None:
    pruned = prune_samples(torch.ones(shape), 0.8, torch.float16)
    assert restore_samples(pruned, shape, torch.float32).shape == shape
