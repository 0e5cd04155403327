"""Triton kernel of ``weight_grad``: a matrix product that decodes its right operand in registers.

A program makes a tile [BLOCK_N, BLOCK_K] of the result from all rows of a split. BLOCK_K columns lie in one group: a
tile of bytes serves all of its fields. Their order in the tile is that of the bytes, fields of a byte side by side;
columns return to their own order once, in the epilogue.

Where the result has too few tiles for the device, the rows are split, and a second step adds the parts up. The number
of splits follows from the shape and the device alone, and nothing is added atomically: the same launch gives the same
bits.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="assignment,misc"
# ruff: noqa: N803, N806, RUF005  (sizes of a product and constants of a kernel are uppercase)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._quantize_kernel import decode, load_plane
from .quantize import PLANES
from .weight_grad import check_operands

# Fewer rows than this are not worth a split, whose part of the result is written and read once more.
MIN_SPLIT_ROWS = 512

# Outputs of a tile, beyond which it is for aligned rows only.
MAX_UNALIGNED_TILE = 64 * 256

# The tile that splits are counted for.
_SPLIT_TILE = 128


def _config(rows: int, outputs: int, inputs: int, num_warps: int, num_stages: int) -> triton.Config:
    constants = {"BLOCK_M": rows, "BLOCK_N": outputs, "BLOCK_K": inputs}
    return triton.Config(constants, num_warps=num_warps, num_stages=num_stages)


# Tiles that spill nothing, whatever the bits; see offline.csv of the tests. Wide ones decode an element fewer times.
HALF_CONFIGS = (
    _config(32, 256, 128, 8, 4),
    _config(32, 128, 256, 8, 4),
    _config(64, 128, 128, 8, 3),
    _config(64, 64, 256, 8, 3),
    _config(64, 64, 128, 4, 3),
    _config(32, 64, 64, 4, 4),
)
FULL_CONFIGS = (
    _config(16, 64, 128, 8, 3),
    _config(16, 128, 64, 8, 3),
    _config(16, 64, 64, 8, 3),
    _config(16, 32, 64, 4, 3),
)
CONFIGS = {torch.bfloat16: HALF_CONFIGS, torch.float16: HALF_CONFIGS, torch.float32: FULL_CONFIGS}


@triton.jit
def _side_by_side(parts, PARTS: tl.constexpr):
    """PARTS tiles [M, W] as one [M, W * PARTS], equal columns of the tiles next to each other."""
    if PARTS == 1:
        result = parts[0]
    elif PARTS == 2:
        result = tl.interleave(parts[0], parts[1])
    elif PARTS == 4:
        result = tl.interleave(tl.interleave(parts[0], parts[2]), tl.interleave(parts[1], parts[3]))
    else:
        even = tl.interleave(tl.interleave(parts[0], parts[4]), tl.interleave(parts[2], parts[6]))
        odd = tl.interleave(tl.interleave(parts[1], parts[5]), tl.interleave(parts[3], parts[7]))
        result = tl.interleave(even, odd)
    return result


@triton.jit
def _weight_grad_kernel(
    grad_ptr,  # [M, N], any strides
    codes_ptr,  # uint8 [M * K * (LOW_BITS + HIGH_BITS) / 8]
    scale_ptr,  # bfloat16 [M * K / GROUP_SIZE]
    zero_ptr,  # [M * K / GROUP_SIZE]
    out_ptr,  # [splits, N, K], or [splits, K, N] if TRANSPOSED
    M,
    N,
    K,
    split_rows,
    stride_m,
    stride_n,
    LOW_BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``quantized_weight_grad_reference`` for one tile and the rows of one split."""
    LEVELS: tl.constexpr = 2 ** (LOW_BITS + HIGH_BITS) - 1
    PARTS: tl.constexpr = 8 // (HIGH_BITS if HIGH_BITS else LOW_BITS)
    WIDTH: tl.constexpr = GROUP_SIZE // PARTS
    BYTES: tl.constexpr = BLOCK_K // PARTS
    TILES: tl.constexpr = GROUP_SIZE // BLOCK_K
    groups_per_row = (K // GROUP_SIZE).to(tl.int64)
    column_group = tl.program_id(1) // TILES
    byte = tl.program_id(1) % TILES * BYTES + tl.arange(0, BYTES)  # [BYTES]
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    first = tl.program_id(2) * split_rows
    end = tl.minimum(first + split_rows, M)
    high_ptr = codes_ptr + M * groups_per_row * (GROUP_SIZE * LOW_BITS // 8)

    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(first, end, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        exists = m < end
        group = m.to(tl.int64) * groups_per_row + column_group
        grad_index = n[:, None] * stride_n + m.to(tl.int64)[None, :] * stride_m
        grad = tl.load(grad_ptr + grad_index, mask=(n < N)[:, None] & exists[None, :], other=0.0)  # [BLOCK_N, BLOCK_M]
        scale = tl.load(scale_ptr + group, mask=exists, other=0.0).to(tl.float32)[:, None]  # [BLOCK_M, 1]
        zero = tl.load(zero_ptr + group, mask=exists, other=0.0).to(tl.float32)[:, None]  # [BLOCK_M, 1]
        codes = load_plane(codes_ptr, group[:, None], byte[None, :], exists[:, None], LOW_BITS, PARTS, WIDTH)
        if HIGH_BITS:
            high = load_plane(high_ptr, group[:, None], byte[None, :], exists[:, None], HIGH_BITS, PARTS, WIDTH)
        values = ()
        for part in tl.static_range(PARTS):
            code = codes[part]
            if HIGH_BITS:
                code |= high[part] << LOW_BITS
            values = values + (decode(code, scale, zero, LEVELS).to(grad.dtype),)
        acc = tl.dot(grad, _side_by_side(values, PARTS), acc, input_precision="ieee")

    # Back from the order of the bytes: columns of one part lie side by side.
    tile = tl.reshape(acc.to(out_ptr.dtype.element_ty), (BLOCK_N, BYTES, PARTS))
    tile = tl.reshape(tl.permute(tile, (0, 2, 1)), (BLOCK_N, BLOCK_K))
    column = tl.arange(0, BLOCK_K)
    k = column_group * GROUP_SIZE + column // BYTES * WIDTH + tl.program_id(1) % TILES * BYTES + column % BYTES
    index = n[:, None] + k.to(tl.int64)[None, :] * N if TRANSPOSED else n[:, None] * K + k[None, :]
    split_ptr = out_ptr + tl.program_id(2).to(tl.int64) * N * K
    tl.store(split_ptr + index, tile, mask=(n < N)[:, None])


def is_wide(config: triton.Config) -> bool:
    """Whether a tile takes so many registers that nothing is left for addresses of single elements."""
    return config.kwargs["BLOCK_N"] * config.kwargs["BLOCK_K"] > MAX_UNALIGNED_TILE


def fitting_configs(configs: list[triton.Config], named_args: dict[str, Any], **kwargs: Any) -> list[triton.Config]:
    """The tiles for the dtype at hand whose columns lie in one group; wide ones where rows are aligned to 16."""
    arguments = {**named_args, **kwargs}
    is_aligned = arguments["N"] % 16 == 0 and arguments["stride_n"] == 1 and arguments["stride_m"] % 16 == 0
    return [
        config
        for config in CONFIGS[arguments["grad_ptr"].dtype]
        if config.kwargs["BLOCK_K"] <= arguments["GROUP_SIZE"] and (is_aligned or not is_wide(config))
    ]


_tuned_kernel = triton.autotune(
    configs=[*HALF_CONFIGS, *FULL_CONFIGS],
    key=["M", "N", "K", "split_rows", "stride_m", "stride_n", "LOW_BITS", "HIGH_BITS", "GROUP_SIZE", "TRANSPOSED"],
    prune_configs_by={"early_config_prune": fitting_configs},
    cache_results=True,
)(_weight_grad_kernel)


def format_options(bits: int, group_size: int, transposed: bool) -> dict[str, int]:
    """Keyword arguments of the kernel: the format of its operand and of its result."""
    low_bits, high_bits = (*PLANES[bits], 0)[:2]
    return {"LOW_BITS": low_bits, "HIGH_BITS": high_bits, "GROUP_SIZE": group_size, "TRANSPOSED": transposed}


def num_splits(rows: int, out_features: int, in_features: int, num_processors: int) -> int:
    """Parts that the rows are cut into, a power of two: a tile for each processor, if there are enough rows."""
    tiles = triton.cdiv(out_features, _SPLIT_TILE) * triton.cdiv(in_features, _SPLIT_TILE)
    splits = 1
    while tiles * splits * 2 <= num_processors and rows >= splits * 2 * MIN_SPLIT_ROWS:
        splits *= 2
    return splits


def launch_weight_grad(
    grad_out: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    transposed: bool,
    *,
    splits: int | None = None,
    config: triton.Config | None = None,
) -> Tensor:
    """``quantized_weight_grad_reference`` in one kernel, and a sum where the rows are split.

    ``splits`` and ``config`` override what the device and measurements choose.
    """
    check_operands(grad_out, scale, zero, bits, group_size, in_features)
    rows, out_features = grad_out.shape
    if splits is None:
        num_processors = torch.cuda.get_device_properties(grad_out.device).multi_processor_count
        splits = num_splits(rows, out_features, in_features, num_processors)
    shape = (in_features, out_features) if transposed else (out_features, in_features)
    out = grad_out.new_empty((splits, *shape), dtype=grad_out.dtype if splits == 1 else torch.float32)
    if out.numel() == 0:
        return out.new_empty(shape, dtype=grad_out.dtype)

    def grid(meta: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(out_features, meta["BLOCK_N"]), in_features // meta["BLOCK_K"], splits

    kernel = _tuned_kernel[grid] if config is None else _weight_grad_kernel[grid]
    kernel(
        grad_out,
        codes,
        scale,
        zero,
        out,
        rows,
        out_features,
        in_features,
        triton.cdiv(rows, splits),
        *grad_out.stride(),
        **format_options(bits, group_size, transposed),
        **({} if config is None else config.all_kwargs()),
    )
    return out[0] if splits == 1 else out.sum(0).to(grad_out.dtype)
