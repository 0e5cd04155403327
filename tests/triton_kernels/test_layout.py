"""Storage order: which of a tensor's dimensions runs slowest."""

import pytest
import torch
from torch import Tensor

from actcompile.triton_kernels._layout import from_storage_order, storage_permutation, to_storage_order

X = torch.arange(4 * 6 * 8.0).view(4, 6, 8)
# Queries, keys and values of a product: [batch, heads, tokens, features] out of [batch, tokens, 3 * heads * features].
HEADS = [part.view(4, 2, 3, 2).transpose(1, 2) for part in torch.arange(4 * 2 * 18.0).view(4, 2, 18).split(6, -1)]


@pytest.mark.parametrize(
    ("x", "order"),
    [
        (X, [0, 1, 2]),
        (X.permute(2, 0, 1), [1, 2, 0]),
        (X[:, ::2], [0, 1, 2]),
        (X.permute(2, 0, 1)[1:5], [1, 2, 0]),
        (X.permute(2, 1, 0)[::3], [2, 1, 0]),
        (X[:, :1].transpose(0, 1), [1, 0, 2]),
        (HEADS[1], [0, 2, 1, 3]),
        (torch.zeros(2, 3, 8, 8).to(memory_format=torch.channels_last)[:, :2], [0, 2, 3, 1]),
    ],
)
def test_elements_are_read_as_they_lie_in_memory(x: Tensor, order: list[int]) -> None:
    assert storage_permutation(x.shape, x.stride()) == order
    flat = to_storage_order(x)
    assert torch.equal(flat, torch.sort(flat).values)
    again = from_storage_order(flat, x.shape, x.stride())
    assert torch.equal(again, x)
    assert torch.equal(to_storage_order(again), flat)


@pytest.mark.parametrize(
    "x", [X[:1].expand(3, 6, 8), X.flatten().as_strided((4, 5), (1, 2)), X.flatten().unfold(0, 4, 2)]
)
def test_overlapping_elements_are_read_in_row_major_order(x: Tensor) -> None:
    assert torch.equal(to_storage_order(x), x.flatten())
    assert from_storage_order(x.flatten(), x.shape, x.stride()).is_contiguous()
