"""Copies in the host's memory: layouts, the operators, and a CUDA device's own memory."""

import pytest
import torch
from torch import Tensor

from actcompile.triton_kernels._layout import from_storage_order
from actcompile.triton_kernels.host_copy import offload, offload_reference, reload

CPU = torch.device("cpu")


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 4, 5, generator=generator)
    return [
        images,
        images.to(memory_format=torch.channels_last),
        images.permute(2, 0, 3, 1),
        images[..., ::2],
        torch.arange(7, dtype=torch.uint8),
        torch.tensor([True, False]),
        torch.randn(9, generator=generator).to(torch.bfloat16),
        torch.tensor(3),
        torch.empty(0, 4),
    ]


@pytest.mark.parametrize("index", range(9))
def test_round_trip(index: int) -> None:
    x = tensors()[index]
    (host,) = offload([x])
    assert host.shape == (x.numel(),) and host.dtype == x.dtype
    back, ticket = reload([host], CPU, None, [])
    assert torch.equal(from_storage_order(back, x.shape, x.stride()), x)
    assert ticket.numel() == 0


def test_storage_order_by_hand() -> None:
    x = torch.arange(6).view(2, 3).t()
    assert offload_reference([x])[0].tolist() == [0, 1, 2, 3, 4, 5]


def test_several_at_once() -> None:
    hosts = offload(tensors())
    back = reload(hosts, CPU, None, [])
    assert len(back) == len(hosts) + 1
    for got, host in zip(back, hosts, strict=False):
        assert torch.equal(got, host)


def test_copies_are_copies() -> None:
    x = torch.ones(4)
    (host,) = offload([x])
    back, ticket = reload([host], CPU, None, [])
    again, _ = reload([host], CPU, ticket, [host])
    x.zero_()
    back.fill_(2)
    assert host.tolist() == again.tolist() == [1] * 4


def test_operators_pass_opcheck() -> None:
    torch.library.opcheck(offload, (tensors(),))
    hosts = offload(tensors())
    torch.library.opcheck(reload, (hosts, CPU, None, []))
    torch.library.opcheck(reload, (hosts[:1], CPU, hosts[-1], hosts[1:3]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_copies_arrive_while_memory_is_used_again() -> None:
    """Twenty rounds in which every source is overwritten, and its memory handed on, as soon as that is allowed."""
    device = torch.device("cuda", torch.cuda.current_device())
    for step in range(20):
        hosts = []
        for index in range(8):
            x = torch.full((2**20 + index,), 100.0 * step + index, device=device)
            hosts.append(offload([x])[0])
            del x
            torch.full((2**20 + index,), -1.0, device=device)
        ticket = None
        for index in reversed(range(8)):
            back, ticket = reload([hosts[index]], device, ticket, hosts[max(0, index - 2) : index])
            assert back.device == device
            assert bool((back == 100.0 * step + index).all())
            del back
            torch.full((2**20 + index,), -1.0, device=device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_host_memory_is_pinned_and_used_again() -> None:
    x = torch.randn(2**20, device="cuda")
    (first,) = offload([x])
    address = first.data_ptr()
    assert first.is_pinned() and first.device == CPU
    del first
    (second,) = offload([x])
    assert second.data_ptr() == address
    torch.cuda.synchronize()
    assert torch.equal(second, x.cpu())
