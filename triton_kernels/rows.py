"""Unbiased sampling of token rows: the weight gradient of a linear layer from ``num_rows`` of its input's M rows.

Formula, for the input X [M, K], the output's gradient G [M, N] and the norms a_m = |x_m|, Euclidean, in float32:

    p_m    = min(1, t * a_m)                      t such that the p_m sum to num_rows ("water-filling")
    kept   = systematic sampling                  num_rows different rows, row m with probability p_m
    w_m    = 1 / p_m
    grad_w = sum over kept of w_m * g_m x_m^T     E[grad_w] = G^T X

Rows with p = 1 are kept for certain and as they are. For norms a_1 >= a_2 >= ... and S_c = a_c+1 + a_c+2 + ..., the c
largest are certain as long as (num_rows - c + 1) * a_c >= S_(c-1); for the others t = (num_rows - c) / S_c. Where the
rows of norm above zero are at most ``num_rows``, all of them are certain and nothing is lost. Slots left over hold rows
of norm zero, with weight 0. Rows outside of ``valid`` count as zeros: those of padding, whose gradient is zero.

Systematic sampling: probabilities are integers q_m, p_m = q_m * 2**-42, with a sum of num_rows * 2**42, at least 1
where a_m > 0. The rows are shuffled: tokens of the same position in each sample are alike, and would be drawn or left
out together. With C_m = q_1 + ... + q_m in that order and one offset u, uniform in [0, 2**42), slot j = 1, 2, ... holds

    the first m with C_m >= j * 2**42 - u

As q_m <= 2**42, no row fills two slots; as the sum is exact, every slot is filled. What rounding leaves of the sum is
less than 2**22, and goes to the least of the rows that are not certain (what is missing) or comes from the largest of
them (what is too much), where that much fits for M up to 2**20.

Layout: ``rows`` holds the kept rows as they are, ``position`` int32 theirs in X, ascending, ``weight`` float32.

Error: mean 0, up to the rounding of w_m to float32. Its variance, summed over the elements of grad_w, is about

    sum over m of (1 / p_m - 1) * |g_m|**2 * |x_m|**2

exactly so for rows that are kept independently of each other; in 16 bits w_m * g_m is rounded once to G's dtype. A row
whose norm is not finite is ranked above all others, so that inf and nan come out; those of gradients come out where
their row is kept.

Source: WTA-CRS (NeurIPS 2023), certain rows beside random ones, which are drawn there with replacement; systematic
sampling in proportion to size (Madow, 1949); norms of the input alone, integers and layout are this project's.
"""

import torch
from torch import Tensor

from ._hash import FRACTION_BITS, mix_seed, noise, noise_at
from .pack_bool import unpack_bool
from .quantize import FLOAT_DTYPES

# A probability of 1 in integers. MAX_ROWS of them and an offset fit an int64.
ONE_BITS = 42
MAX_ROWS = 2**20

# Stands for norms that are not finite: above all of float32, and MAX_ROWS of them have a finite sum.
LARGEST_NORM = 2.0**200

# Elements of X that are float32 at a time on the CPU; they stay in its cache.
CHUNK_NUMEL = 2**18


def num_kept_rows(share: float, rows: int) -> int:
    """Rows that are kept of so many, in steps of a 1024th and rounded up; works on symbolic sizes too."""
    return (rows * max(1, round(share * 1024)) + 1023) // 1024


def sampled_nbytes(num_rows: int, in_features: int, dtype: torch.dtype) -> int:
    """Bytes of rows, positions and weights; works on symbolic sizes too."""
    return num_rows * (in_features * dtype.itemsize + torch.int32.itemsize + torch.float32.itemsize)


def sampling_variance(norms_product: Tensor, p: Tensor) -> Tensor:
    """The variance that sampling adds to a weight gradient, summed over the gradient's elements.

    To first order: rows count as kept independently of each other.

    Args:
        norms_product: |g_m| * |x_m|, float [M].
        p: What ``inclusion_probability`` gives, [M]; rows with 0 must have a product of 0, and add nothing.

    Returns:
        0-d, sum over m of (1 / p_m - 1) * norms_product_m**2.
    """
    return torch.where(p > 0, (1 / p - 1) * norms_product.to(p.dtype).square(), 0).sum()


def inclusion_probability(norm: Tensor, num_rows: int) -> Tensor:
    """The probabilities that rows are kept with, as they are sampled.

    Args:
        norm: Float32 [M], 0 or above; what is not finite ranks above all else.
        num_rows: Rows that are kept, 1 to M.

    Returns:
        float64 [M], with a sum of num_rows. Of rows of norm 0, some have 1 where slots are left over.
    """
    return inclusion_shares(norm, num_rows).double() * 2.0**-ONE_BITS


def inclusion_shares(norm: Tensor, num_rows: int) -> Tensor:
    """The same in integers, int64 [M], with a sum of num_rows * 2**ONE_BITS; see the module docstring."""
    ranked, order = torch.where(norm.isfinite(), norm.double(), LARGEST_NORM).sort(descending=True)
    # The smallest first: sums over norms of float32 are then exact to the last bits of float64.
    tail = ranked.flip(0).cumsum(0).flip(0)
    rank = torch.arange(len(norm), device=norm.device)
    positive = ranked > 0
    num_positive = positive.sum()
    fits = num_positive <= num_rows
    # One slot at least for those that are not certain, whose sum may be lost beside the norm of the last certain one.
    num_certain = ((num_rows - rank) * ranked >= tail)[: num_rows - 1].sum()
    num_certain = torch.where(fits, num_rows, num_certain)
    certain = rank < num_certain
    rest = tail.gather(0, num_certain.clamp(max=len(norm) - 1).view(1)).clamp(min=torch.finfo(torch.float64).tiny)
    drawn = ((num_rows - num_certain) * ranked / rest * 2.0**ONE_BITS).round().long().clamp(1, 2**ONE_BITS)
    shares = torch.where(certain, 2**ONE_BITS, torch.where(positive, drawn, 0))
    missing = (num_rows << ONE_BITS) - shares.sum()
    shares = shares + torch.where(rank == num_positive - 1, missing.clamp(min=0), 0)
    shares = shares + torch.where(rank == num_certain, missing.clamp(max=0), 0)
    return torch.empty_like(shares).scatter_(0, order, shares)


def row_norms(x: Tensor) -> Tensor:
    """Float32 [M]: the Euclidean norm of each row, or its largest magnitude where squares are too small to add up."""
    if not x.numel():
        return x.new_zeros(len(x), dtype=torch.float32)
    # Other devices convert to float32 while they add up.
    on_cpu = x.device.type == "cpu"
    parts = map(Tensor.float, torch.split(x, max(CHUNK_NUMEL // x.shape[1], 1))) if on_cpu else [x]
    return torch.cat([_part_norms(part) for part in parts])


def _part_norms(part: Tensor) -> Tensor:
    largest = part.amax(1).maximum(-part.amin(1)).float()
    return torch.linalg.vector_norm(part, 2, 1, dtype=torch.float32).maximum(largest)


def sample_rows_reference(
    x: Tensor, valid: Tensor | None, num_rows: int, seed: Tensor, salt: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples rows of ``x``; see the module docstring for formula and layout.

    Args:
        x: Float32, bfloat16 or float16 [M, K], any strides.
        valid: Bool [M], or None for all: rows outside are never needed.
        num_rows: Rows to keep, 1 to M.
        seed: 0-d int64 on x's device; one value per training step.
        salt: Distinguishes the tensors of one step.

    Returns:
        rows [num_rows, K] in x's dtype; position int32 [num_rows], ascending and all different; weight float32
        [num_rows], 0 where a slot is left over.

    Raises:
        ValueError: For shapes, counts or dtypes that the format does not have.
    """
    check_sample(x, valid, num_rows)
    norm = row_norms(x)
    if valid is not None:
        norm = torch.where(valid, norm, 0)
    if not len(x):
        return x.clone(), norm.int(), norm
    shares = inclusion_shares(norm, num_rows)
    draws = noise(seed ^ mix_seed(salt), (1, 2), slice(0, 2)).long().view(2)
    offset = ((draws[0] << FRACTION_BITS) | draws[1]) >> (2 * FRACTION_BITS - ONE_BITS)
    ends = (torch.arange(1, num_rows + 1, device=x.device) << ONE_BITS) - offset
    order = noise_at(seed ^ mix_seed(salt), torch.arange(2, len(x) + 2, device=x.device), draws.new_zeros(()).int())
    order = order.argsort()
    position = order[torch.searchsorted(shares[order].cumsum(0), ends)].sort().values.int()
    used = norm.index_select(0, position) != 0
    weight = torch.where(used, 2.0**ONE_BITS / shares.index_select(0, position).double(), 0).float()
    rows = x.index_select(0, position)
    # Whatever padding holds: a weight of 0 would not take nan away.
    return rows if valid is None else rows.masked_fill_(~used.unsqueeze(1), 0), position, weight


def check_sample(x: Tensor, valid: Tensor | None, num_rows: int) -> None:
    """Raises ValueError for what ``sample_rows`` does not take."""
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"sample_rows takes {FLOAT_DTYPES}, got {x.dtype}: cast the tensor, or keep it exact")
    if x.dim() != 2 or x.shape[0] > MAX_ROWS:
        raise ValueError(f"x must be [M, K] with M up to {MAX_ROWS}, got {tuple(x.shape)}: flatten or split its rows")
    if num_rows > x.shape[0] or (num_rows < 1 and x.shape[0] > 0):
        raise ValueError(f"num_rows must be from 1 to {x.shape[0]}, got {num_rows!r}: keep a row, or the tensor exact")
    if valid is not None and (valid.dtype != torch.bool or valid.dim() != 1 or valid.shape[0] != x.shape[0]):
        raise ValueError(
            f"valid must be torch.bool [{x.shape[0]}], got {valid.dtype} {tuple(valid.shape)}: one element per row of x"
        )


@torch.library.custom_op("actcompile::sample_rows", mutates_args=())
def sample_rows(
    x: Tensor, valid: Tensor | None, num_rows: int, seed: Tensor, salt: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``sample_rows_reference`` as an operator, on any device."""
    return sample_rows_reference(x, valid, num_rows, seed, salt)


@sample_rows.register_fake
def _(x: Tensor, valid: Tensor | None, num_rows: int, seed: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
    check_sample(x, valid, num_rows)
    position = x.new_empty(num_rows, dtype=torch.int32)
    return x.new_empty(num_rows, x.shape[1]), position, x.new_empty(num_rows, dtype=torch.float32)


def sampled_weight_grad_reference(
    grad_out: Tensor, rows: Tensor, position: Tensor, weight: Tensor, packed_valid: Tensor | None = None
) -> Tensor:
    """The weight gradient from sampled rows.

    Args:
        grad_out: Float32, bfloat16 or float16 [M, N], any strides.
        rows: What ``sample_rows`` made of X [M, K] in grad_out's dtype.
        position: The same.
        weight: The same.
        packed_valid: ``valid`` as ``pack_bool`` stores it, where there was one.

    Returns:
        [N, K] in grad_out's dtype; nan where a row outside of ``valid`` has a gradient: it was no padding.

    Raises:
        ValueError: For operands that do not fit each other.
    """
    check_operands(grad_out, rows, position, weight)
    # In place: the product is taken in float32 and rounded to the gradient's dtype.
    scaled = grad_out.index_select(0, position).mul_(weight.unsqueeze(1))
    grad = scaled.t() @ rows
    if packed_valid is None or not grad_out.numel():
        return grad
    valid = unpack_bool(packed_valid, grad_out.shape[:1])
    largest = grad_out.amax(1).maximum(-grad_out.amin(1))
    return torch.where((largest.masked_fill(valid, 0) != 0).any(), torch.nan, grad)


def check_operands(grad_out: Tensor, rows: Tensor, position: Tensor, weight: Tensor) -> None:
    """Raises ValueError for operands that do not fit each other."""
    if grad_out.dim() != 2:
        raise ValueError(f"grad_out must be [M, N], got {tuple(grad_out.shape)}: view it as two-dimensional")
    shapes = (tuple(rows.shape[:1]), tuple(position.shape), tuple(weight.shape))
    if rows.dim() != 2 or shapes != (shapes[0],) * 3:
        raise ValueError(
            f"rows, position and weight must be [R, K], [R] and [R], got {tuple(rows.shape)}, {shapes[1]} and "
            f"{shapes[2]}: pass what one call of sample_rows gave"
        )
    if (position.dtype, weight.dtype) != (torch.int32, torch.float32):
        raise ValueError(
            f"position and weight must be torch.int32 and torch.float32, got {position.dtype} and {weight.dtype}: "
            "pass what sample_rows gave"
        )
    if grad_out.dtype != rows.dtype:
        raise ValueError(f"grad_out must have the dtype of rows {rows.dtype}, got {grad_out.dtype}: cast it")


@torch.library.custom_op("actcompile::sampled_weight_grad", mutates_args=())
def sampled_weight_grad(
    grad_out: Tensor, rows: Tensor, position: Tensor, weight: Tensor, packed_valid: Tensor | None = None
) -> Tensor:
    """``sampled_weight_grad_reference`` as an operator, on any device."""
    return sampled_weight_grad_reference(grad_out, rows, position, weight, packed_valid)


@sampled_weight_grad.register_fake
def _(grad_out: Tensor, rows: Tensor, position: Tensor, weight: Tensor, packed_valid: Tensor | None = None) -> Tensor:
    check_operands(grad_out, rows, position, weight)
    return grad_out.new_empty(grad_out.shape[1], rows.shape[1])
