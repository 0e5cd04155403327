"""What pruning drops: which elements, and what is noted of them."""

import pytest
import torch
from torch import Tensor

from actcompile._dropped import GROUP, Dropped, dropped_moments, lost_share, shapes_of
from actcompile._slices import Groups, Layout, Part, cut
from actcompile.plan import Pruning

SHAPES = [(51, 256), (2, 16), (2, 4)]


def smallest(flat: Tensor, keep: int, block: int) -> Tensor:
    """What is dropped of a run of elements that are all different; the last block is filled up with zeros."""
    rest = []
    for part in flat.float().split(block):
        num_dropped = max(0, len(part) - keep)
        rest.append(part[part.abs().argsort()[:num_dropped]])
    return torch.cat(rest)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_block_loses_the_smallest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Of random bfloat16 numbers some are equal."""
    keep, block = shape
    x = torch.randn(64, 256).to(dtype)
    share, magnitudes = lost_share(x, shape).view(-1, block), x.float().abs().view(-1, block)
    torch.testing.assert_close(share.sum(1), torch.full((len(share),), float(block - keep)))
    assert share.dtype == torch.float32 and share.min() == 0 and share.max() == 1
    largest_lost = torch.where(share == 1, magnitudes, 0).amax(1)
    smallest_kept = torch.where(share == 0, magnitudes, torch.inf).amin(1)
    assert (largest_lost < smallest_kept).all()
    is_tie = (share > 0) & (share < 1)
    assert is_tie.any() == (dtype == torch.bfloat16)
    least = magnitudes.topk(keep, 1).values[:, -1:]
    assert (magnitudes == least)[is_tie].all()


def test_ties_share_what_is_lost() -> None:
    """Of seven twos five are kept beside the three; the ones are lost."""
    block = torch.tensor([3.0, 1, -2, 2, 2, -2, 2, 2, 1, -2, 1, 0, 0, 1, 1, 1])
    expected = torch.where(block.abs() == 3, 0.0, torch.where(block.abs() == 2, 6 / 7, 1.0))
    torch.testing.assert_close(lost_share(block, (2, 16)), expected)
    torch.testing.assert_close(lost_share(torch.ones(4), (2, 4)), torch.full((4,), 0.5))


@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_lose_on_average_what_they_lose_together(shape: tuple[int, int]) -> None:
    keep, block = shape
    x = torch.zeros(block)
    torch.testing.assert_close(lost_share(x, shape), torch.full((block,), (block - keep) / block))
    x[1] = -1
    share = lost_share(x, shape)
    assert share[1] == 0
    torch.testing.assert_close(share[2:], torch.full((block - 2,), (block - keep) / (block - 1)))
    assert not lost_share(torch.randn(block), (block, block)).any()


def test_blocks_follow_the_order_in_memory() -> None:
    layouts = {
        "permuted": torch.randn(6, 16, 8).permute(2, 0, 1),
        "channels_last": torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last),
        "not dense": torch.randn(8, 32)[:, ::2],
    }
    for name, x in layouts.items():
        share = lost_share(x, (2, 16))
        assert share.shape == x.shape, name
        # Where the elements lie: channels_last keeps its channels together, others are read row by row.
        flat = {"permuted": (1, 2, 0), "channels_last": (0, 2, 3, 1), "not dense": (0, 1)}[name]
        in_memory = x.permute(flat).reshape(-1)
        torch.testing.assert_close(share.permute(flat).reshape(-1), lost_share(in_memory, (2, 16)), rtol=0, atol=0)
        if name != "not dense":
            assert share.stride() == x.stride(), name


def test_the_rest_of_a_block_is_zeros_and_lost_first() -> None:
    x = torch.arange(1.0, 12.0)
    assert lost_share(x, (2, 16)).tolist() == [1.0] * 9 + [0.0] * 2
    assert lost_share(x[:2], (2, 16)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("numel", [512, 257, 356, 1, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_those_of_what_is_dropped(numel: int, dtype: torch.dtype) -> None:
    x = (torch.randn(numel) + 0.3).to(dtype)
    moments = dropped_moments(x, SHAPES)
    assert moments.shape == (-(-numel // GROUP), len(SHAPES), 2) and moments.dtype == torch.bfloat16
    for group, part in enumerate(x.split(GROUP)):
        for column, (keep, block) in enumerate(SHAPES):
            lost = smallest(part, keep, block)
            expected = torch.stack([lost.mean(), lost.square().mean()]) if len(lost) else torch.zeros(2)
            # bfloat16 has 8 bits; equal magnitudes of different signs share what is lost.
            torch.testing.assert_close(moments[group, column].float(), expected, rtol=2**-7, atol=0.02)


def test_moments_of_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 3, 100)
    expected = dropped_moments(x, SHAPES)
    monkeypatch.setattr("actcompile._dropped._CPU_NUMEL", 2 * GROUP)
    torch.testing.assert_close(dropped_moments(x, SHAPES), expected, rtol=0, atol=0)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_spread_over_a_part_of_the_batch(order: tuple[int, ...]) -> None:
    """A part reads the noted numbers of the groups that its own elements lie in, whatever the order in memory."""
    x = torch.randn(6, 40, 16) * torch.linspace(1, 9, 6)[:, None, None] + 1
    x = x.permute(order).contiguous().permute(*(order.index(dim) for dim in range(3)))
    moments, layout = dropped_moments(x, SHAPES), Layout(tuple(x.shape), x.stride())
    whole = Dropped(moments, SHAPES, Groups(layout, GROUP))
    part = Part(2, 2, 6)
    some = Dropped(moments, SHAPES, Groups(layout, GROUP, 0, part))
    for column, shape in enumerate(SHAPES):
        torch.testing.assert_close(some.mean(shape), cut(whole.mean(shape), 0, part), rtol=0, atol=0)
        torch.testing.assert_close(some.variance(shape), cut(whole.variance(shape), 0, part), rtol=0, atol=0)
        first = x.permute(order).reshape(-1)[:GROUP]
        noted = whole.mean(shape).permute(order).reshape(-1)[:GROUP]
        assert (noted == moments[0, column, 0].float()).all()
        assert noted[0] == pytest.approx(float(smallest(first, *shape).mean()), rel=0.02)


def test_variance_is_around_the_mean() -> None:
    constant = torch.full((GROUP,), 3.0)
    varied = torch.randn(GROUP)
    moments = dropped_moments(torch.cat([constant, varied]), [(2, 16)])
    dropped = Dropped(moments, [(2, 16)], Groups(Layout((2 * GROUP,), (1,)), GROUP))
    assert (dropped.mean((2, 16))[:GROUP] == 3).all() and (dropped.variance((2, 16))[:GROUP] == 0).all()
    lost = smallest(varied, 2, 16)
    assert dropped.variance((2, 16))[-1] == pytest.approx(float(lost.var(unbiased=False)), rel=0.02)


def test_prunings_of_one_shape_share_it() -> None:
    assert shapes_of([Pruning(2, 16, 4), Pruning(2, 16, 8), Pruning(51, 256, 4)]) == [(2, 16), (51, 256)]
