"""Fused attention's backward with a derivative: what the sensitivity probe runs in its place.

torch's kernels cannot be differentiated twice. The surrogate calls them as they are, and answers vector-Jacobian
products in plain math on a few sequences at a time, so that all scores are never there at once:

    p = softmax(scale * q @ k^T + mask)
    dv = p^T @ dy;  dp = dy @ v^T;  ds = p * (dp - sum(p * dp));  dq = scale * ds @ k;  dk = scale * ds^T @ q

Dropout is left out, and with it the saved output that the kernels then read.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .passes.rerun_attention import FORWARD

ATTENTION_BACKWARD = frozenset(FORWARD)
ATTENTION_FORWARD = frozenset(FORWARD.values())

# Bytes that the scores of the sequences taken at a time may have.
_CHUNK_NBYTES = 2**21


def attention_backward(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of ``target``, a backward of fused attention, differentiable by its gradient, q, k and v."""
    names = [argument.name for argument in target._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = given.get("attn_mask", given.get("attn_bias"))
    settings = (mask if isinstance(mask, Tensor) and mask.numel() else None, given["is_causal"], given.get("scale"))

    def run(*operands: Tensor) -> Any:
        # The gradient of the output and the operands come first in all of them.
        return target(*operands, *args[4:], **kwargs)

    return _Surrogate.apply(run, settings, *args[:4])  # type: ignore[no-untyped-call]


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, settings: Any, *operands: Tensor) -> Any:  # type: ignore[override]
        ctx.settings = settings
        ctx.save_for_backward(*operands)
        return run(*operands)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:  # type: ignore[override]
        operands = ctx.saved_tensors
        mask, is_causal, scale = ctx.settings
        results = [torch.zeros_like(operand) for operand in operands]
        batch, heads, num_queries = operands[1].shape[:3]
        scores_nbytes = heads * num_queries * operands[2].shape[2] * 4
        step = max(1, _CHUNK_NBYTES // scores_nbytes)
        for start in range(0, batch, step):
            part = slice(start, start + step)
            pieces = [operand[part].float().requires_grad_() for operand in operands]
            piece_mask = mask[part] if mask is not None and mask.dim() == 4 and mask.shape[0] == batch else mask
            with torch.enable_grad():
                found = attention_gradients(*pieces, mask=piece_mask, is_causal=is_causal, scale=scale)
            # torch's backwards may have more results than these three.
            pairs = [(f, c[part].float()) for f, c in zip(found, cotangents, strict=False) if c is not None]
            if pairs:
                ends, directions = zip(*pairs, strict=True)
                for result, piece in zip(results, torch.autograd.grad(ends, pieces, directions), strict=True):
                    result[part] = piece
        return (None, None, *results)


def attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of attention by q, k and v ``[B, H, T, D]``; k and v may have fewer heads, each for several of q."""
    repeats = q.shape[1] // k.shape[1]
    keys, values = (part.repeat_interleave(repeats, 1) if repeats > 1 else part for part in (k, v))
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = factor * (q @ keys.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    p = scores.softmax(-1)
    dp = grad @ values.transpose(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    dq, dk, dv = factor * ds @ keys, factor * ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad
    if repeats > 1:
        dk, dv = (part.view(part.shape[0], -1, repeats, *part.shape[2:]).sum(2) for part in (dk, dv))
    return dq, dk, dv
