"""The gradient of a weight from its layer's quantized input, decoded inside of the product.

Formula, for a layer whose input X [M, K] was stored by ``quantize`` and whose output receives the gradient G [M, N]:

    grad_w [N, K] = G^T @ X',   X' = (zero + scale * code) rounded to G's dtype, as ``dequantize`` gives it

X' never lies in memory: a tile of bytes is loaded, and the fields of its codes become columns of the right operand.

Layout: the codes are those of X in row-major order, and a group lies within a row: K is a multiple of the group size.
G may have any strides. The result is contiguous, [N, K] or, ``transposed``, [K, N].

Error: factors are never rounded to TF32; products and sums are in float32. Against the exact sum of M products of the
same factors:

    |error| <= M * 2**-23 * sum |g * x'|  +  half a unit in the last place of the result's dtype

which is what "decode, then multiply" gives; the order of the sums differs, so the last bits do. Which order is taken
follows from measurements of the device (tile sizes), so that two machines may differ by that much.

Source: this project's; the kernel after the tiled matrix product of Triton's tutorials.
"""

import torch
from torch import Tensor

from .quantize import check_arguments, dequantize_reference

# The narrowest tile of the kernel lies within a group.
MIN_GROUP_SIZE = 64


def quantized_weight_grad_reference(
    grad_out: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    transposed: bool,
) -> Tensor:
    """Decodes and multiplies in float32.

    Args:
        grad_out: Float32, bfloat16 or float16 [M, N], any strides.
        codes: What ``quantize`` made of X [M, K], uint8.
        scale: The same, bfloat16 [M * K / group_size].
        zero: The same, in grad_out's dtype.
        bits: 1, 2, 3, 4, 6 or 8.
        group_size: A power of two from 64 up.
        in_features: K, a multiple of ``group_size``.
        transposed: Whether the result is [K, N].

    Returns:
        [N, K], or [K, N], in grad_out's dtype.

    Raises:
        ValueError: For operands that do not fit each other.
    """
    check_operands(grad_out, scale, zero, bits, group_size, in_features)
    shape = (grad_out.shape[0], in_features)
    x = dequantize_reference(codes, scale, zero, bits, group_size, shape, (in_features, 1), grad_out.dtype).float()
    g = grad_out.float()
    return (x.t() @ g if transposed else g.t() @ x).to(grad_out.dtype)


def check_operands(grad_out: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, in_features: int) -> None:
    """Raises ValueError for operands that do not fit each other."""
    check_arguments(grad_out.dtype, bits, group_size)
    if group_size < MIN_GROUP_SIZE:
        raise ValueError(f"group_size must be at least {MIN_GROUP_SIZE}, got {group_size!r}: decode before the product")
    if in_features % group_size:
        raise ValueError(
            f"in_features must be a multiple of {group_size}, got {in_features!r}: decode before the product"
        )
    if grad_out.dim() != 2 or scale.numel() * group_size != grad_out.shape[0] * in_features:
        raise ValueError(
            f"grad_out must be [M, N] with M * {in_features} stored elements, got {tuple(grad_out.shape)} "
            f"and {scale.numel()} groups of {group_size}: view it as two-dimensional"
        )
    if zero.dtype != grad_out.dtype:
        raise ValueError(f"grad_out must have the stored tensor's dtype {zero.dtype}, got {grad_out.dtype}: cast it")


@torch.library.custom_op("actcompile::quantized_weight_grad", mutates_args=(), device_types="cpu")
def quantized_weight_grad(
    grad_out: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    transposed: bool,
) -> Tensor:
    """``quantized_weight_grad_reference`` as an operator; graphs on the CPU never get it."""
    return quantized_weight_grad_reference(grad_out, codes, scale, zero, bits, group_size, in_features, transposed)


@quantized_weight_grad.register_fake
def _(
    grad_out: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    transposed: bool,
) -> Tensor:
    check_operands(grad_out, scale, zero, bits, group_size, in_features)
    shape = (grad_out.shape[1], in_features)
    return grad_out.new_empty(shape[::-1] if transposed else shape)


@quantized_weight_grad.register_kernel("cuda")
def _(
    grad_out: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    transposed: bool,
) -> Tensor:
    from ._weight_grad_kernel import launch_weight_grad

    with torch.cuda.device(grad_out.device):
        return launch_weight_grad(grad_out, codes, scale, zero, bits, group_size, in_features, transposed)
