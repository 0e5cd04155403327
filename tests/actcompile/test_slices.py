"""Parts of saved tensors against the whole of them."""

import pytest
import torch

from actcompile._slices import Groups, Layout, Part, cut, decode

# Shape in memory, the permutation to it, and the dimension that holds the batch: outermost in memory, or not.
LAYOUTS = [
    ((6, 64), (0, 1), 0),
    ((6, 5, 7), (0, 1, 2), 0),
    ((12, 9), (0, 1), 0),
    ((6, 4, 4, 3), (0, 3, 1, 2), 0),
    ((5, 6, 7), (0, 1, 2), 1),
    ((1, 6, 50), (0, 1, 2), 1),
    ((5, 6, 8), (1, 0, 2), 0),
]


@pytest.mark.parametrize("part", [Part(0, 2, 6), Part(2, 1, 6), Part(3, 3, 6), Part(0, 6, 6)], ids=str)
@pytest.mark.parametrize(("shape", "order", "dim"), LAYOUTS, ids=str)
def test_part_is_cut_from_the_whole(shape: tuple[int, ...], order: tuple[int, ...], dim: int, part: Part) -> None:
    x = torch.randn(shape).permute(order)
    for bits in (3, 8):
        codes = torch.ops.actcompile.quantize(x, bits, 32, torch.tensor(3), 1)
        args = (*codes, bits, 32, x.shape, x.stride(), x.dtype)
        whole = torch.ops.actcompile.dequantize(*args)
        found = decode(torch.ops.actcompile.dequantize.default, args, dim, part)
        assert torch.equal(found, cut(whole, dim, part))
    mask = x > 0
    packed = (torch.ops.actcompile.pack_bool(mask), x.shape, x.stride())
    assert torch.equal(decode(torch.ops.actcompile.unpack_bool.default, packed, dim, part), cut(mask, dim, part))
    layout = Layout(tuple(x.shape), x.stride())
    whole_ids, groups = Groups(layout, 32).ids(), Groups(layout, 32, dim, part)
    assert torch.equal(groups.ids(), cut(whole_ids, dim, part))
    # Every element of a group, and nothing else, has its number.
    flat = torch.zeros(x.numel(), dtype=torch.int64)
    flat.as_strided(x.shape, x.stride()).copy_(whole_ids)
    assert torch.equal(flat, torch.arange(x.numel()) // 32)
    values = torch.randn(cut(x, dim, part).shape)
    expected = torch.zeros(-(-x.numel() // 32)).index_add_(0, groups.ids().flatten(), values.flatten())
    torch.testing.assert_close(groups.sums(values), expected)
    of_groups = torch.randn(len(expected))
    spread = groups.spread(of_groups)
    assert torch.equal(spread, of_groups[groups.ids()])


def test_part_of_overlapping_elements_has_the_order_of_the_whole() -> None:
    """Two of its six samples alone overlap no longer."""
    x, part = torch.randn(14).as_strided((6, 5), (1, 2)), Part(0, 2, 6)
    codes = torch.ops.actcompile.quantize(x, 8, 32, torch.tensor(3), 1)
    args = (*codes, 8, 32, x.shape, x.stride(), x.dtype)
    found = decode(torch.ops.actcompile.dequantize.default, args, 0, part)
    assert torch.equal(found, cut(torch.ops.actcompile.dequantize(*args), 0, part))
