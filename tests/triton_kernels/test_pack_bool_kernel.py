"""The Triton kernels of ``pack_bool`` against the eager reference."""

import pytest
import torch

from actcompile.triton_kernels.pack_bool import pack_bool_reference, unpack_bool_reference

pytest.importorskip("triton")
kernel = pytest.importorskip("actcompile.triton_kernels._pack_bool_kernel")


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 4096, 4099, 10_000])
def test_kernels_equal_reference(numel: int, device: torch.device) -> None:
    mask = (torch.rand(numel, generator=torch.Generator().manual_seed(numel)) < 0.4).to(device)
    packed = kernel.launch_pack_bool(mask)
    assert torch.equal(packed, pack_bool_reference(mask))
    assert torch.equal(kernel.launch_unpack_bool(packed, mask.shape), mask)


def test_layouts(device: torch.device) -> None:
    x = (torch.rand(2, 6, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.5).to(device)
    for mask in (x.to(memory_format=torch.channels_last), x.permute(3, 0, 2, 1), x[:, ::2], x[:1].expand(3, 6, 5, 7)):
        packed = kernel.launch_pack_bool(mask)
        assert torch.equal(packed, pack_bool_reference(mask))
        unpacked = kernel.launch_unpack_bool(packed, mask.shape, mask.stride())
        assert torch.equal(unpacked, mask)
        assert unpacked.stride() == unpack_bool_reference(packed, mask.shape, mask.stride()).stride()


def test_nothing_is_written_beyond_the_end(device: torch.device) -> None:
    n, nbytes, poison = 4099, 513, 7
    packed = torch.full((nbytes,), 0xFF, dtype=torch.uint8, device=device)
    out = torch.full((8 * nbytes + 64,), poison, dtype=torch.uint8, device=device)
    kernel._unpack_bool_kernel[(2,)](packed, out, n, nbytes, BLOCK=kernel.BLOCK)
    assert out[:n].eq(1).all()
    assert out[n:].eq(poison).all()
    kernel._pack_bool_kernel[(2,)](out, packed, n, nbytes - 1, BLOCK=kernel.BLOCK)
    assert packed[-1] == 0xFF
