"""Pruning to the elements of largest magnitude: exactly ``keep`` of each block, at 16, 8 or 4 bits per value.

Formula, per block of ``block`` consecutive elements in storage order (the last ones are padded with zeros):

    key       = the bits of |x| as an integer, which orders magnitudes; inf is above them and nan above inf
    threshold = the largest integer that at least ``keep`` keys of the block reach, found bit by bit from the highest
    kept      = key > threshold, and of key == threshold the first in storage order until ``keep`` are kept

so that neither many zeros nor many equal magnitudes change the count. What is not kept comes back as +0. Two families:

    block 128, 256, 512, 1024    keep 1 to block    bitmap             a group is a block
    block 4 or 16 (N:M)          keep 2; 2 or 3     positions          a group is 256 elements, whole blocks

From a sparsity, ``num_kept`` rounds (1 - sparsity) * block to the nearest, ties to even, 1 at the least: 0.8 of 256
keeps 51.

Layout: all fields in storage order, from a byte's low bits up; each group starts at a whole byte. ``index`` has one bit
per element, or one position in its block (2 bits for 4, 4 bits for 16) per kept element. ``values`` holds the kept
elements in 16 bits, or uint8 with their codes, two to a byte at 4 bits, the last one padded with 0. ``scale`` and
``zero`` hold one number per group, none at 16 bits.

Values at 16 bits are x's own elements; those of float32 become bfloat16, rounded to nearest, but never from a finite
number to inf: its range is float32's, where float16 would lose all below 2**-24 and above 65504. At 8 and 4 bits a
group's kept values are quantized as in ``quantize``, with ``scale`` and ``zero`` of the kept values, rounded by the
noise of each element's index in x.

Why a zero point: beside a scale alone (symmetric codes) it takes 16 bits more per group (32 in float32), a third of a
bit per value at 51 of 256, and one bit per value is worth a factor of 4.6. Noise at 4 bits over the tensor's energy,
symmetric and with zero point: GELU 1.3e-2, 1.6e-3; softmax rows 8.3e-2, 1.6e-2; gaussian 6.3e-3, 4.6e-3, where pruning
itself costs 0.35.

Error: a pruned element's is its magnitude, which no kept one of its block is below: no other choice of as many elements
leaves a smaller sum of squares. A kept element's is 0 at 16 bits (float32: 2**-8 of it, or 2**-134), else below
``scale``, with mean 0 over seeds given what is kept. Inf and nan are kept before all else and come back alone: as what
they are at 16 bits, as nan at 8 and 4 bits.

Source: Back Razor (NeurIPS 2022), whose masks keep all of a sample that is mostly zeros; bisection after RTop-K (ICLR
2025); blocks, exact counts, layout and rounding are this project's.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._hash import mix_seed, noise_at
from ._layout import from_storage_order, to_storage_order
from ._select import kept_positions, select_largest
from ._topk_sizes import POSITION_BITS, check_format, empty_parts, group_nbytes, group_numel
from .quantize import decode_values, encode_values


def sparsify_reference(
    x: Tensor, keep: int, block: int, value_bits: int, seed: Tensor, salt: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prunes ``x``; see the module docstring for formula and layout.

    Args:
        x: Float32, bfloat16 or float16, any shape and strides; read in storage order (``_layout``).
        keep: Elements kept of each block.
        block: 128, 256, 512 or 1024; or 4 with a ``keep`` of 2, or 16 with 2 or 3.
        value_bits: 16, 8 or 4.
        seed: 0-d int64 on x's device; one value per training step. 16 bits do not depend on it.
        salt: Distinguishes the tensors of one step.

    Returns:
        index uint8 [num_groups * bytes]; values uint8 [num_groups * bytes], or [num_groups * kept] in 16 bits; scale
        bfloat16 and zero in x's dtype, [num_groups] or, at 16 bits, [0].

    Raises:
        ValueError: For blocks, counts, bits or dtypes that the format does not have.
    """
    check_format(x.dtype, keep, block, value_bits)
    return sparsify_groups(pad_groups(to_storage_order(x), block), keep, block, value_bits, seed ^ mix_seed(salt))


def pad_groups(flat: Tensor, block: int) -> Tensor:
    """[n] -> [num_groups, group_numel], the last group filled up with zeros."""
    missing = -flat.numel() % group_numel(block)
    return (pad(flat, (0, missing)) if missing else flat).view(-1, group_numel(block))


def sparsify_groups(
    groups: Tensor, keep: int, block: int, value_bits: int, key: Tensor, first_group: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The formula for [num_groups, group_numel], the first of them the ``first_group``-th of its tensor."""
    blocks = groups.view(-1, block)
    kept = select_largest(blocks, keep)
    position = kept_positions(kept, keep)
    values = blocks.gather(1, position).view(-1, groups.shape[1] // block * keep)
    if block in POSITION_BITS:
        index = pack_fields(position.reshape(values.shape), POSITION_BITS[block])
    else:
        index = pack_fields(kept, 1)
    if value_bits == 16:
        return index, to_16_bits(values).view(-1), groups.new_empty(0, dtype=torch.bfloat16), groups.new_empty(0)
    first_block = first_group * (group_numel(block) // block)
    start = torch.arange(first_block, first_block + len(blocks), device=key.device).unsqueeze(1) * block
    draws = noise_at(key, start, position.to(torch.int32)).view(values.shape)
    codes, scale, zero = encode_values(values, value_bits, draws)
    return index, pack_fields(codes, value_bits), scale, zero


def to_16_bits(values: Tensor) -> Tensor:
    """Values as they are stored in 16 bits."""
    if values.dtype != torch.float32:
        return values
    limit = torch.finfo(torch.bfloat16).max
    return torch.where(values.isfinite(), values.clamp(-limit, limit), values).to(torch.bfloat16)


def pack_fields(fields: Tensor, width: int) -> Tensor:
    """Fields of ``width`` bits, [rows, n] -> uint8 [rows * bytes], each row padded to whole bytes."""
    per_byte = 8 // width
    fields = pad(fields.to(torch.uint8), (0, -fields.shape[1] % per_byte))
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=fields.device)
    # Fields of a byte have no bit in common: their sum is their union.
    return (fields.view(-1, fields.shape[1] // per_byte, per_byte) << shifts).sum(2, dtype=torch.uint8).view(-1)


def unpack_fields(packed: Tensor, width: int) -> Tensor:
    """Inverse of ``pack_fields``: uint8 [rows, bytes] -> uint8 [rows, bytes * 8 / width]."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(2) >> shifts) & (2**width - 1)).flatten(1)


def densify_reference(
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    keep: int,
    block: int,
    value_bits: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Inverse of ``sparsify_reference``: a tensor of ``shape``, ``stride`` and ``dtype``."""
    check_format(dtype, keep, block, value_bits)
    parts = split_groups(index, values, scale, zero, keep, block, value_bits)
    flat = densify_groups(parts, keep, block, value_bits, dtype)
    return from_storage_order(flat.view(-1)[: math.prod(shape)], shape, stride)


def split_groups(
    index: Tensor, values: Tensor, scale: Tensor, zero: Tensor, keep: int, block: int, value_bits: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is stored with one row per group, views; scale and zero have none at 16 bits."""
    index_nbytes, value_nbytes = group_nbytes(keep, block, value_bits)
    rows = index.view(-1, index_nbytes)
    return rows, values.view(len(rows), value_nbytes // values.itemsize), scale.unsqueeze(1), zero.unsqueeze(1)


def densify_groups(parts: Sequence[Tensor], keep: int, block: int, value_bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of the formula: rows of ``split_groups`` to [num_groups, group_numel]."""
    index, values, scale, zero = parts
    if value_bits < 16:
        codes = unpack_fields(values, value_bits)[:, : group_numel(block) // block * keep]
        values = decode_values(codes, scale, zero, value_bits)
    kept_values = values.to(dtype).reshape(-1, keep)
    if block in POSITION_BITS:
        position = unpack_fields(index, POSITION_BITS[block]).view(-1, keep).long()
        dense = kept_values.new_zeros(len(kept_values), block).scatter_(1, position, kept_values)
        return dense.view(-1, group_numel(block))
    kept = unpack_fields(index, 1).bool()
    return torch.where(kept, kept_values.gather(1, (kept.cumsum(1) - 1).clamp(0, keep - 1)), 0)


# Exact strides: the layout that was traced decides the order in which the backward's decode writes.
@torch.library.custom_op(
    "actcompile::sparsify", mutates_args=(), device_types="cpu", tags=(torch.Tag.needs_exact_strides,)
)
def sparsify(
    x: Tensor, keep: int, block: int, value_bits: int, seed: Tensor, salt: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sparsify_reference`` as an operator."""
    from ._chunked import sparsify_in_chunks

    return sparsify_in_chunks(x, keep, block, value_bits, seed, salt)


@sparsify.register_fake
def sparsify_fake(
    x: Tensor, keep: int, block: int, value_bits: int, seed: Tensor, salt: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of ``sparsify``'s results."""
    return empty_parts(x, x.numel(), keep, block, value_bits)


@sparsify.register_kernel("cuda")
def _(
    x: Tensor, keep: int, block: int, value_bits: int, seed: Tensor, salt: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from ._topk_kernel import launch_sparsify

    with torch.cuda.device(x.device):
        return launch_sparsify(x, keep, block, value_bits, seed, salt)


@torch.library.custom_op("actcompile::densify", mutates_args=(), device_types="cpu")
def densify(
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    keep: int,
    block: int,
    value_bits: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """``densify_reference`` as an operator."""
    from ._chunked import densify_in_chunks

    return densify_in_chunks(index, values, scale, zero, keep, block, value_bits, shape, stride, dtype)


@densify.register_fake
def densify_fake(
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    keep: int,
    block: int,
    value_bits: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Shape, strides and dtype of ``densify``'s result."""
    check_format(dtype, keep, block, value_bits)
    return from_storage_order(index.new_empty(math.prod(shape), dtype=dtype), shape, stride)


@densify.register_kernel("cuda")
def _(
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    keep: int,
    block: int,
    value_bits: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    from ._topk_kernel import launch_densify

    with torch.cuda.device(index.device):
        return launch_densify(index, values, scale, zero, keep, block, value_bits, shape, stride, dtype)
