"""Copies of saved tensors in the host's memory, bit for bit: codes, scales, zeros, packed masks, exact tensors.

Formula: host = x,  x' = host

Layout: 1-D, in storage order (see ``_layout``), one copy per tensor.

Error: none.

On CUDA both directions run on a stream of their own, beside the computation (``_transfers.py``). On any other device
they are plain copies, so that the same graphs run there; the CPU's copies lie in the memory that they came from.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ._layout import to_storage_order

# CUDA graphs replay neither host memory nor a choice of what is under way.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.cudagraph_unsafe)


def offload_reference(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies tensors to the host's memory.

    Args:
        tensors: Any dtypes, shapes and strides, all on one device.

    Returns:
        For each, a CPU tensor [numel] of its dtype.
    """
    return [to_storage_order(x).to("cpu", copy=True) for x in tensors]


def reload_reference(
    hosts: Sequence[Tensor], device: torch.device, after: Tensor | None, ahead: Sequence[Tensor]
) -> list[Tensor]:
    """Copies tensors back from the host's memory.

    Args:
        hosts: What ``offload`` made.
        device: Where they came from.
        after: The last result of the ``reload`` that runs before this one in the same backward; None for the first.
        ahead: What the next ones will ask for; it is set under way where transfers run beside the computation.

    Returns:
        For each of ``hosts``, a tensor [numel] on ``device``; and an empty CPU tensor, which the next ``reload`` takes.
    """
    return [*(host.to(device, copy=True) for host in hosts), _ticket()]


def _ticket() -> Tensor:
    return torch.empty(0, dtype=torch.uint8)


@torch.library.custom_op("actcompile::offload", mutates_args=(), tags=_TAGS)
def offload(tensors: Sequence[Tensor]) -> list[Tensor]:
    """``offload_reference`` as an operator."""
    return offload_reference(tensors)


@offload.register_fake
def _(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.numel(), device="cpu") for x in tensors]


@offload.register_kernel("cuda")
def _(tensors: Sequence[Tensor]) -> list[Tensor]:
    from ._transfers import transfers

    return transfers(tensors[0].device).offload(tensors)


# The tensors that it takes are the host's: the device that it copies to decides how.
@torch.library.custom_op("actcompile::reload", mutates_args=(), tags=_TAGS)
def reload(
    hosts: Sequence[Tensor], device: torch.device, after: Tensor | None, ahead: Sequence[Tensor]
) -> list[Tensor]:
    """``reload_reference`` as an operator."""
    if device.type != "cuda":
        return reload_reference(hosts, device, after, ahead)
    from ._transfers import transfers

    return [*transfers(device).reload(hosts, ahead, is_first=after is None), _ticket()]


@reload.register_fake
def _(hosts: Sequence[Tensor], device: torch.device, after: Tensor | None, ahead: Sequence[Tensor]) -> list[Tensor]:
    return [*(host.new_empty(host.numel(), device=device) for host in hosts), _ticket()]
