"""Triton kernels of the format in ``pack_bool``: one read and one write each way, equal to the reference."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# ruff: noqa: N803  (constants of a kernel are uppercase)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._layout import to_storage_order
from .pack_bool import check_mask, packed_nbytes, restore_mask

# Bytes of the packed mask that one program handles: 4 per thread.
BLOCK = 512


@triton.jit
def _pack_bool_kernel(
    mask_ptr,  # uint8 [n], 0 or 1
    packed_ptr,  # uint8 [nbytes]
    n: tl.int64,
    nbytes: tl.int64,
    BLOCK: tl.constexpr,
):
    """``pack_bool_reference`` on a mask in storage order."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    exists = byte < nbytes
    packed = tl.zeros([BLOCK], tl.uint8)
    for bit in tl.static_range(8):
        index = byte + bit * nbytes
        value = tl.load(mask_ptr + index, mask=exists & (index < n), other=0)
        packed |= value << bit
    tl.store(packed_ptr + byte, packed, mask=exists)


@triton.jit
def _unpack_bool_kernel(
    packed_ptr,  # uint8 [nbytes]
    mask_ptr,  # uint8 [n], 0 or 1
    n: tl.int64,
    nbytes: tl.int64,
    BLOCK: tl.constexpr,
):
    """Inverse of ``_pack_bool_kernel``."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    exists = byte < nbytes
    packed = tl.load(packed_ptr + byte, mask=exists, other=0)
    for bit in tl.static_range(8):
        index = byte + bit * nbytes
        tl.store(mask_ptr + index, (packed >> bit) & 1, mask=exists & (index < n))


def launch_pack_bool(mask: Tensor) -> Tensor:
    """``pack_bool_reference`` in one kernel."""
    check_mask(mask)
    flat = to_storage_order(mask).view(torch.uint8)
    n, nbytes = flat.numel(), packed_nbytes(flat.numel())
    packed = flat.new_empty(nbytes)
    if n:
        _pack_bool_kernel[(triton.cdiv(nbytes, BLOCK),)](flat, packed, n, nbytes, BLOCK=BLOCK)
    return packed


def launch_unpack_bool(packed: Tensor, shape: Sequence[int], stride: Sequence[int] | None = None) -> Tensor:
    """``unpack_bool_reference`` in one kernel."""
    n, nbytes = torch.Size(shape).numel(), packed.numel()
    flat = packed.new_empty(n, dtype=torch.bool)
    if n:
        grid = (triton.cdiv(nbytes, BLOCK),)
        _unpack_bool_kernel[grid](packed, flat.view(torch.uint8), n, nbytes, BLOCK=BLOCK)
    return restore_mask(flat, shape, stride)
