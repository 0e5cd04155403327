"""Bool tensors at one bit per element: dropout masks, the sign that a ReLU's backward reads, attention masks.

Formula: packed[j] = sum over b in 0..7 of mask[j + b * nbytes] << b,  nbytes = ceil(numel / 8)

Layout: ``mask`` in storage order, padded with False to a multiple of 8. Byte j holds the elements j, j + nbytes,
j + 2 * nbytes, ... from its low bit up, so that both directions are pointwise over runs of bytes.

Error: none; every mask comes back exactly.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._layout import from_storage_order, to_storage_order


def packed_nbytes(numel: int) -> int:
    """Bytes that ``numel`` bits fill; works on symbolic sizes too."""
    return (numel + 7) // 8


def pack_bool_reference(mask: Tensor) -> Tensor:
    """Packs a mask; see the module docstring for the layout.

    Args:
        mask: Bool, any shape and strides; read in storage order (``_layout``).

    Returns:
        uint8 [packed_nbytes(numel)].

    Raises:
        ValueError: For any other dtype.
    """
    check_mask(mask)
    flat = to_storage_order(mask).view(torch.uint8)
    missing = -flat.numel() % 8
    if missing:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    rows = flat.view(8, packed_nbytes(mask.numel()))
    return functools.reduce(torch.bitwise_or, (rows[bit] << bit for bit in range(8)))


def unpack_bool_reference(packed: Tensor, shape: Sequence[int], stride: Sequence[int] | None = None) -> Tensor:
    """Inverse of ``pack_bool_reference``: a bool tensor of ``shape``, contiguous unless ``stride`` says otherwise."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device).unsqueeze(1)
    flat = ((packed.unsqueeze(0) >> shifts) & 1).to(torch.bool).view(-1)[: math.prod(shape)]
    return restore_mask(flat, shape, stride)


def unpack_range(packed: Tensor, elements: slice) -> Tensor:
    """The elements from ``elements.start`` to ``elements.stop``, in storage order: bool [stop - start]."""
    nbytes, start, stop = len(packed), elements.start, elements.stop
    pieces = []
    for bit in range(start // nbytes, (stop - 1) // nbytes + 1):
        first = bit * nbytes
        pieces.append((packed[max(start - first, 0) : stop - first] >> bit) & 1)
    return torch.cat(pieces).to(torch.bool)


def restore_mask(flat: Tensor, shape: Sequence[int], stride: Sequence[int] | None) -> Tensor:
    """[numel] in storage order -> a view with ``shape`` and ``stride``; contiguous without a stride."""
    return flat.view(shape) if stride is None else from_storage_order(flat, shape, stride)


def check_mask(mask: Tensor) -> None:
    """Raises ValueError for what the format does not have."""
    if mask.dtype != torch.bool:
        raise ValueError(f"pack_bool takes torch.bool, got {mask.dtype}: compare the tensor, or quantize it")


@torch.library.custom_op(
    "actcompile::pack_bool", mutates_args=(), device_types="cpu", tags=(torch.Tag.needs_exact_strides,)
)
def pack_bool(mask: Tensor) -> Tensor:
    """``pack_bool_reference`` as an operator."""
    return pack_bool_reference(mask)


@pack_bool.register_fake
def _(mask: Tensor) -> Tensor:
    check_mask(mask)
    return mask.new_empty(packed_nbytes(mask.numel()), dtype=torch.uint8)


@pack_bool.register_kernel("cuda")
def _(mask: Tensor) -> Tensor:
    from ._pack_bool_kernel import launch_pack_bool

    with torch.cuda.device(mask.device):
        return launch_pack_bool(mask)


@torch.library.custom_op(
    "actcompile::pack_bytes", mutates_args=(), device_types="cpu", tags=(torch.Tag.needs_exact_strides,)
)
def pack_bytes(mask: Tensor) -> Tensor:
    """``pack_bool`` of a mask of uint8, 0 or 1, which is what bools are in memory: compilers may write these faster."""
    return pack_bool_reference(mask.view(torch.bool))


@pack_bytes.register_fake
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(packed_nbytes(mask.numel()))


@torch.library.custom_op("actcompile::unpack_bool", mutates_args=(), device_types="cpu")
def unpack_bool(packed: Tensor, shape: Sequence[int], stride: Sequence[int] | None = None) -> Tensor:
    """``unpack_bool_reference`` as an operator."""
    return unpack_bool_reference(packed, shape, stride)


@unpack_bool.register_fake
def _(packed: Tensor, shape: Sequence[int], stride: Sequence[int] | None = None) -> Tensor:
    return restore_mask(packed.new_empty(math.prod(shape), dtype=torch.bool), shape, stride)


@unpack_bool.register_kernel("cuda")
def _(packed: Tensor, shape: Sequence[int], stride: Sequence[int] | None = None) -> Tensor:
    from ._pack_bool_kernel import launch_unpack_bool

    with torch.cuda.device(packed.device):
        return launch_unpack_bool(packed, shape, stride)
