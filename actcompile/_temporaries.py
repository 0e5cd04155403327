"""Bytes that operators outside of the generated kernels take while they run, beside their results.

The rules are those of the CPU, read off the meter with torch 2.13 (x86, oneDNN); operators without a rule count as
taking nothing, and so do those of other devices, whose libraries choose their workspaces by rules of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

# oneDNN reads images of so few channels as they are; others it copies into blocks of channels.
_FEW_CHANNELS = 4

# Rows of queries and keys that attention on the CPU works on at once: (at least so many queries, rows).
_QUERY_ROWS = ((768, 256), (192, 64), (0, 32))
_KEY_ROWS = 512


Arguments = Mapping[int | str, Any]


@dataclass(frozen=True)
class Operand:
    """Sizes and strides of a tensor that an operator reads."""

    size: Sequence[sympy.Expr]
    stride: Sequence[sympy.Expr]
    dtype: torch.dtype

    @property
    def numel(self) -> sympy.Expr:
        """Number of elements."""
        return sympy.Mul(*self.size)

    @property
    def nbytes(self) -> sympy.Expr:
        """Bytes of all elements."""
        return self.numel * self.dtype.itemsize


def temporary_nbytes(kernel: str, operands: Sequence[Operand], arguments: Arguments) -> sympy.Expr:
    """Bytes that one call of ``kernel`` on the CPU takes and gives back.

    Args:
        kernel: The operator's name in the generated code.
        operands: The tensors that it reads, in order.
        arguments: Its other arguments by position or name.
    """
    rule = _RULES.get(kernel)
    return sympy.S.Zero if rule is None else rule(operands, arguments)


def _gathered(operand: Operand) -> sympy.Expr:
    """A copy in storage order, where the elements do not lie side by side: 0 or all bytes."""
    last = sum((size - 1) * stride for size, stride in zip(operand.size, operand.stride, strict=True))
    return sympy.S.Zero if sympy.expand(last + 1 - operand.numel) == 0 else operand.nbytes


def _padded(operand: Operand, multiple: int) -> sympy.Expr:
    """A copy that fills the last group up, where the elements do not: 0 or all bytes."""
    return operand.nbytes * sympy.Min(1, sympy.Mod(operand.numel, multiple))


def _quantize(operands: Sequence[Operand], arguments: Arguments) -> sympy.Expr:
    return _gathered(operands[0]) + _padded(operands[0], arguments[1])


def _quantize_compiled(operands: Sequence[Operand], arguments: Arguments) -> sympy.Expr:
    return _gathered(operands[0])


def _pack_bool(operands: Sequence[Operand], arguments: Arguments) -> sympy.Expr:
    # Two partial results and the one to come, beside the one that is returned.
    return 3 * sympy.ceiling(operands[0].numel / 8) + _gathered(operands[0]) + _padded(operands[0], 8)


def _channels_last(operand: Operand) -> bool:
    return bool(operand.stride[1] == 1 and operand.size[1] != 1)


def _blocks(images: Operand) -> sympy.Expr:
    """oneDNN's copy of ``images`` in blocks of channels."""
    return sympy.S.Zero if images.size[1] <= _FEW_CHANNELS else images.nbytes


def _convolution(operands: Sequence[Operand], arguments: Arguments) -> sympy.Expr:
    images, weight = operands[:2]
    if _channels_last(images):
        return 2 * weight.nbytes
    # The result comes in blocks, too, and is copied; all images of the result have the size that one stride leaves.
    spatial = [size / step for size, step in zip(images.size[2:], arguments["stride"], strict=True)]
    result = images.size[0] * weight.size[0] * sympy.Mul(*spatial) * images.dtype.itemsize
    return sympy.Max(_blocks(images) + weight.nbytes, result)


def _convolution_backward(operands: Sequence[Operand], arguments: Arguments) -> sympy.Expr:
    gradient, images, weight = operands[:3]
    if _channels_last(images):
        return 3 * weight.nbytes
    return sympy.Max(_blocks(images) + gradient.nbytes, 2 * _blocks(images) - weight.nbytes) + weight.nbytes


def _attention_rows(queries: Operand, keys: Operand) -> tuple[sympy.Expr, sympy.Expr]:
    at_once = sympy.Piecewise(*((rows, queries.size[2] >= least) for least, rows in _QUERY_ROWS))
    return sympy.Min(at_once, queries.size[2]), sympy.Min(_KEY_ROWS, keys.size[2])


def _attention(operands: Sequence[Operand], arguments: Arguments) -> sympy.Expr:
    rows, columns = _attention_rows(*operands[:2])
    # Scores, maxima, sums and results of each thread, in float32.
    return torch.get_num_threads() * rows * (columns + 2 + operands[0].size[3]) * torch.float32.itemsize


def _attention_backward(operands: Sequence[Operand], arguments: Arguments) -> sympy.Expr:
    rows, columns = _attention_rows(*operands[1:3])
    # Scores of each thread, and their gradients.
    return torch.get_num_threads() * 2 * rows * columns * torch.float32.itemsize


_ATTENTION = "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu"

# Operator, as the generated code names it -> its rule.
_RULES: Mapping[str, Callable[[Sequence[Operand], Arguments], sympy.Expr]] = {
    "torch.ops.actcompile.quantize.default": _quantize,
    "torch.ops.actcompile.quantize_compiled.default": _quantize_compiled,
    "torch.ops.actcompile.pack_bool.default": _pack_bool,
    "torch.ops.actcompile.pack_bytes.default": _pack_bool,
    "extern_kernels.convolution": _convolution,
    "torch.ops.aten.convolution_backward.default": _convolution_backward,
    f"{_ATTENTION}.default": _attention,
    f"{_ATTENTION}_backward.default": _attention_backward,
}
