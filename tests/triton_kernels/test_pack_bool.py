"""Bool masks at one bit: the layout by hand, memory formats, the operators."""

import pytest
import torch

from actcompile.triton_kernels.pack_bool import (
    pack_bool,
    pack_bool_reference,
    pack_bytes,
    packed_nbytes,
    unpack_bool,
    unpack_bool_reference,
    unpack_range,
)


def random_mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))) < 0.5


def test_layout_by_hand() -> None:
    mask = torch.zeros(19, dtype=torch.bool)
    # nbytes = 3: element i is bit i // 3 of byte i % 3.
    mask[[0, 4, 5, 18]] = True
    assert pack_bool_reference(mask).tolist() == [0b1000001, 0b10, 0b10]


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 255, 256, 1001])
def test_round_trip(numel: int) -> None:
    mask = random_mask(numel)
    packed = pack_bool_reference(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_nbytes(numel),)
    assert torch.equal(unpack_bool_reference(packed, mask.shape), mask)


@pytest.mark.parametrize("value", [True, False])
def test_uniform_masks(value: bool) -> None:
    mask = torch.full((3, 5), value)
    packed = pack_bool_reference(mask)
    # 15 elements: the padding bit stays 0.
    assert packed.tolist() == ([0xFF, 0x7F] if value else [0, 0])
    assert torch.equal(unpack_bool_reference(packed, mask.shape), mask)


@pytest.mark.parametrize(
    "mask",
    [
        random_mask(2, 6, 5, 7).to(memory_format=torch.channels_last),
        random_mask(4, 3, 5).permute(2, 0, 1),
        random_mask(0, 3).t(),
        random_mask(1, 8).t(),
        torch.tensor(True),
    ],
    ids=["channels_last", "permuted", "empty", "size 1", "0-d"],
)
def test_dense_strides_survive(mask: torch.Tensor) -> None:
    unpacked = unpack_bool(pack_bool(mask), mask.shape, mask.stride())
    assert torch.equal(unpacked, mask)
    assert unpacked.stride() == mask.stride()


@pytest.mark.parametrize("mask", [random_mask(6, 8)[:, ::2], random_mask(1, 8).expand(6, 8)], ids=["gaps", "expanded"])
def test_other_strides_become_contiguous(mask: torch.Tensor) -> None:
    unpacked = unpack_bool(pack_bool(mask), mask.shape, mask.stride())
    assert torch.equal(unpacked, mask)
    assert unpacked.is_contiguous()


def test_stride_is_optional() -> None:
    mask = random_mask(3, 4, 5)
    assert torch.equal(torch.ops.actcompile.unpack_bool(pack_bool(mask), [3, 4, 5]), mask)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pack_bool takes torch.bool, got torch.uint8"):
        pack_bool(torch.ones(3, dtype=torch.uint8))


@pytest.mark.parametrize("mask", [random_mask(3, 43), random_mask(2, 4, 3, 5).to(memory_format=torch.channels_last)])
def test_operators_pass_opcheck(mask: torch.Tensor) -> None:
    torch.library.opcheck(pack_bool, (mask,))
    torch.library.opcheck(pack_bytes, (mask.to(torch.uint8),))
    packed = pack_bool_reference(mask)
    torch.library.opcheck(unpack_bool, (packed, list(mask.shape)))
    torch.library.opcheck(unpack_bool, (packed, list(mask.shape), list(mask.stride())))


@pytest.mark.parametrize("numel", [1, 8, 13, 1000])
def test_a_range_is_unpacked_alone(numel: int) -> None:
    mask = torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.5
    packed = pack_bool_reference(mask)
    for start, stop in [(0, numel), (numel // 3, numel // 3 + 1), (numel // 4, numel - numel // 5)]:
        assert torch.equal(unpack_range(packed, slice(start, stop)), mask[start:stop])
