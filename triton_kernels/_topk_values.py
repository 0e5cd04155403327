"""What the kernels of ``topk`` with a bitmap and with positions share: single elements and values."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import torch
import triton
import triton.language as tl

_LARGEST_BFLOAT16 = tl.constexpr(torch.finfo(torch.bfloat16).max)


@triton.jit
def magnitude_key(x):
    """The bits of |x| as int32, in the order of magnitudes."""
    if x.dtype == tl.float32:
        key = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        key = x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    return key


@triton.jit
def in_16_bits(x):
    """``to_16_bits``."""
    if x.dtype == tl.float32:
        limited = tl.minimum(tl.maximum(x, -_LARGEST_BFLOAT16), _LARGEST_BFLOAT16)
        x = tl.where(tl.abs(x) < float("inf"), limited, x).to(tl.bfloat16)
    return x


@triton.jit
def load_steps(scale_ptr, zero_ptr, group, exists):
    """Scale and zero of ``group`` [GROUPS], as float32 [GROUPS, 1]."""
    # In one dimension: a load of [GROUPS, 1] is repeated for each element that a thread holds.
    scale = tl.load(scale_ptr + group, mask=exists, other=0.0).to(tl.float32)
    zero = tl.load(zero_ptr + group, mask=exists, other=0.0).to(tl.float32)
    return scale[:, None], zero[:, None]
