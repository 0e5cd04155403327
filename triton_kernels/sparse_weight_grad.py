"""The gradient of a weight from its layer's pruned input, a few rows of which are dense at a time.

Formula, for a layer whose input X [M, K] was stored by ``sparsify`` and whose output receives the gradient G [M, N]:

    grad_w [N, K] = G^T @ X',   X' as ``densify`` gives it, in G's dtype

Rows of more than two dimensions are flattened before, so that no product has a batch of gradients [B, N, K].

Layout: what is stored is X in row-major order; a group may span rows. The sum runs over chunks of rows that are whole
groups, each of which is decoded, multiplied and added in float32.

Error: against the exact sum of M products of the same factors:

    |error| <= M * 2**-23 * sum |g * x'|  +  half a unit in the last place of G's dtype

Source: Back Razor (NeurIPS 2022), whose layers densify all of X; the chunks are this project's.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._topk_sizes import check_format, group_nbytes, group_numel, half_dtype, num_groups
from .topk import densify, densify_reference, split_groups

# Elements of X that are dense at a time.
CHUNK_NUMEL = 2**22


def sparse_weight_grad_reference(
    grad_out: Tensor,
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    keep: int,
    block: int,
    value_bits: int,
    in_features: int,
) -> Tensor:
    """Decodes and multiplies in float32.

    Args:
        grad_out: Float32, bfloat16 or float16 [M, N], any strides.
        index: What ``sparsify`` made of X [M, K] in grad_out's dtype.
        values: The same.
        scale: The same.
        zero: The same.
        keep: Elements kept of each block.
        block: Elements of a block.
        value_bits: 16, 8 or 4.
        in_features: K.

    Returns:
        [N, K] in grad_out's dtype.

    Raises:
        ValueError: For operands that do not fit each other.
    """
    check_operands(grad_out, index, values, zero, keep, block, value_bits, in_features)
    shape = (grad_out.shape[0], in_features)
    x = densify_reference(index, values, scale, zero, keep, block, value_bits, shape, (in_features, 1), grad_out.dtype)
    return (grad_out.float().t() @ x.float()).to(grad_out.dtype)


def check_operands(
    grad_out: Tensor,
    index: Tensor,
    values: Tensor,
    zero: Tensor,
    keep: int,
    block: int,
    value_bits: int,
    in_features: int,
) -> None:
    """Raises ValueError for operands that do not fit each other."""
    check_format(grad_out.dtype, keep, block, value_bits)
    index_nbytes, _ = group_nbytes(keep, block, value_bits)
    if grad_out.dim() != 2 or index.numel() != num_groups(grad_out.shape[0] * in_features, block) * index_nbytes:
        raise ValueError(
            f"grad_out must be [M, N] with M * {in_features} stored elements, got {tuple(grad_out.shape)} "
            f"and {index.numel() // index_nbytes} groups of {group_numel(block)}: view it as two-dimensional"
        )
    expected = (half_dtype(grad_out.dtype) if value_bits == 16 else torch.uint8, grad_out.dtype)
    if (values.dtype, zero.dtype) != expected:
        raise ValueError(f"values and zero must be {expected}, got {values.dtype} and {zero.dtype}: cast grad_out")


@torch.library.custom_op("actcompile::sparse_weight_grad", mutates_args=())
def sparse_weight_grad(
    grad_out: Tensor,
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    keep: int,
    block: int,
    value_bits: int,
    in_features: int,
) -> Tensor:
    """``sparse_weight_grad_reference`` as an operator, on any device."""
    return multiply_in_chunks(densify, grad_out, (index, values, scale, zero), keep, block, value_bits, in_features)


def multiply_in_chunks(
    decode: Callable[..., Tensor],
    grad_out: Tensor,
    stored: tuple[Tensor, Tensor, Tensor, Tensor],
    keep: int,
    block: int,
    value_bits: int,
    in_features: int,
) -> Tensor:
    """The formula, with ``decode`` in the place of ``densify``."""
    check_operands(grad_out, stored[0], stored[1], stored[3], keep, block, value_bits, in_features)
    parts = split_groups(*stored, keep, block, value_bits)
    total = grad_out.new_zeros(grad_out.shape[1], in_features, dtype=torch.float32)
    # Rows that are whole groups.
    unit = group_numel(block) // math.gcd(group_numel(block), in_features)
    step = max(CHUNK_NUMEL // (unit * in_features), 1) * unit if in_features else 1
    for start in range(0, grad_out.shape[0] if in_features else 0, step):
        rows = grad_out[start : start + step]
        groups = slice(start * in_features // group_numel(block), num_groups((start + len(rows)) * in_features, block))
        chunk = [part[groups].reshape(-1) for part in parts]
        x = decode(*chunk, keep, block, value_bits, (len(rows), in_features), (in_features, 1), grad_out.dtype)
        if x.is_cuda and x.dtype != torch.float32:
            total += torch.mm(rows.t(), x, out_dtype=torch.float32)
        else:
            total.addmm_(rows.float().t(), x.float())
    return total.to(grad_out.dtype)


@sparse_weight_grad.register_fake
def sparse_weight_grad_fake(
    grad_out: Tensor,
    index: Tensor,
    values: Tensor,
    scale: Tensor,
    zero: Tensor,
    keep: int,
    block: int,
    value_bits: int,
    in_features: int,
) -> Tensor:
    """Shape and dtype of ``sparse_weight_grad``'s result."""
    check_operands(grad_out, index, values, zero, keep, block, value_bits, in_features)
    return grad_out.new_empty(grad_out.shape[1], in_features)
