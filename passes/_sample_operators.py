"""Operators that take the arguments of torch's and store the largest elements of each sample.

``SampleOperators`` is what a graph calls in their place; the gradients are in ``_sample_gradients.py``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import _sample_gradients as gradients
from ._sample_storage import Storage


class SampleOperators:
    """Operators whose gradients read pruned tensors.

    Args:
        sparsity: Share of each sample to drop.
    """

    def __init__(self, sparsity: float) -> None:
        self.storage = Storage(sparsity)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``F.linear``."""
        return self._apply(gradients.Linear, input, weight, bias)

    def matmul_weight(self, input: Tensor, weight: Tensor) -> Tensor:
        """``input @ weight``, with a weight [in, out]: a linear layer."""
        return self.linear(input, weight.t())

    def addmm_weight(self, bias: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """``torch.addmm``, with a weight [in, out]: a linear layer."""
        return self.linear(input, weight.t(), bias)

    def matmul(self, input: Tensor, other: Tensor) -> Tensor:
        """``torch.matmul`` of two activations of two or more dimensions."""
        return self._apply(gradients.Matmul, input, other)

    def softmax(self, scores: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        """``F.softmax``."""
        return self._apply(gradients.Softmax, scores, dim, dtype, False)

    def attend(self, scores: Tensor, values: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        """``softmax(scores, dim) @ values``."""
        return self._apply(gradients.Attend, scores, values, dim, dtype, False)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``F.scaled_dot_product_attention`` in single steps, so that there is a softmax map to prune."""
        if enable_gqa:
            key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = self.matmul(query, key.transpose(-2, -1)) * factor
        for bias in _biases(scores, attn_mask, is_causal):
            scores = scores + bias
        if not dropout_p:
            return self._apply(gradients.Attend, scores, value, -1, None, True)
        probabilities = self._apply(gradients.Softmax, scores, -1, None, True)
        return self.matmul(F.dropout(probabilities, dropout_p).to(value.dtype), value)

    def multi_head_attention(
        self,
        sequences: Sequence[Tensor],
        num_heads: int,
        in_proj: tuple[Tensor, Tensor | None],
        out_proj: tuple[Tensor, Tensor | None],
        dropout_p: float,
        masks: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, None]:
        """``F.multi_head_attention_forward`` without its weights, in single steps with samples first.

        Args:
            sequences: Queries, keys and values, [T, B, width] each.
            num_heads: Attention heads.
            in_proj: Weight [3 * width, width] and bias.
            out_proj: Weight [width, width] and bias.
            dropout_p: Share of probabilities that is dropped.
            masks: Of keys [B, S] and of attention [T, S] or [B * heads, T, S], true or -inf for what is not seen.
        """
        weights = in_proj[0].chunk(3)
        biases = (None, None, None) if in_proj[1] is None else in_proj[1].chunk(3)
        q, k, v = (
            _heads(self.linear(part.transpose(0, 1), weight, bias), num_heads)
            for part, weight, bias in zip(sequences, weights, biases, strict=True)
        )
        of_keys, of_attention = masks
        bias = q.new_zeros(())
        if of_keys is not None:
            bias = bias + _additive(of_keys, q.dtype)[:, None, None]
        if of_attention is not None:
            added = _additive(of_attention, q.dtype)
            bias = bias + (added.view(-1, num_heads, *added.shape[1:]) if added.dim() == 3 else added)
        y = self.attention(q, k, v, bias, dropout_p)
        return self.linear(y.transpose(1, 2).flatten(2), *out_proj).transpose(0, 1), None

    def layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """``F.layer_norm``."""
        return self._apply(gradients.LayerNorm, input, normalized_shape, weight, bias, eps)

    def conv2d(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor:
        """``torch.conv2d``, padding by name only where both sides get the same."""
        stride, dilation = _pair(stride), _pair(dilation)
        around = named_padding(padding, weight, dilation) if isinstance(padding, str) else _pair(padding)
        assert around is not None
        return self._apply(gradients.Conv2d, input, weight, bias, stride, around, dilation, groups)

    def gelu(self, input: Tensor, approximate: str = "none") -> Tensor:
        """``F.gelu``."""
        return self._apply(gradients.Gelu, input, approximate)

    def _apply(self, function: Any, *args: Any) -> Any:
        return function.apply(self.storage, *args)


def named_padding(padding: str, weight: Tensor, dilation: int | Sequence[int]) -> list[int] | None:
    """What a name of conv2d's padding adds on each side, or None where the two sides of a dimension differ."""
    if padding == "valid":
        return [0, 0]
    totals = [step * (size - 1) for step, size in zip(_pair(dilation), weight.shape[2:], strict=True)]
    return None if any(total % 2 for total in totals) else [total // 2 for total in totals]


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, width] -> [B, heads, T, width / heads]."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


def _pair(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _biases(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> list[Tensor]:
    """What is added to the scores, -inf where a query must not see a key: adding stores nothing."""
    masks = [] if attn_mask is None else [attn_mask]
    if is_causal:
        masks.append(torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril())
    return [_additive(~mask if mask.dtype == torch.bool else mask, scores.dtype) for mask in masks]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where a bool mask is true, zero elsewhere; any other mask as it is."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
