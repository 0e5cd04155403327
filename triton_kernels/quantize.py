"""Group-wise quantization to 1, 2, 3, 4, 6 or 8 bits with unbiased stochastic rounding.

Formula, per group of ``group_size`` consecutive elements in storage order (the last group is padded with copies of
the tensor's last element):

    zero  = min(group)                                            in the tensor's own dtype, exact
    scale = (max(group) - zero) / (2**bits - 1)                   bf16, rounded up (see below)
    code  = floor((x - zero) / scale + u),  u uniform in [0, 1)   made against the stored scale and zero
    x'    = zero + scale * code                                   so that E[x'] = x and |x' - x| < scale

Layout: ``codes`` is uint8, one plane after another for the whole tensor; ``PLANES`` splits a code's bits into planes of
1, 2, 4 or 8 bits. A plane of w bits holds G * w / 8 bytes per group; byte j of a group holds the elements j,
j + G * w / 8, j + 2 * G * w / 8, ... from its low bits up. ``scale`` and ``zero`` hold one number per group.

Error: the noise of one element has mean 0 and variance f * (1 - f) * scale**2, f the fractional part of its position.
Constant groups come back exactly. Where the highest level would lie beyond the dtype's largest number the scale is
rounded down, and it exceeds neither 2**126 nor float32's largest number / (2**bits - 1): what lies above the highest
level then comes back as that level.

Inf and nan come back as nan, both of them, and alone: a group that holds some has a negative scale, which marks it, and
in such a group the highest code means nan. Its finite elements have the codes below, upside down:

    zero  = max(finite)
    scale = -(zero - min(finite)) / (2**bits - 2)                 bf16, its magnitude rounded as above

At 1 bit no code is left between zero and nan: there zero is the mean of what the finite elements would come back as in
a group of their own, and they all come back as that.

Bit-exactness: every product that feeds a sum is exact (a bf16 scale times a code of at most 8 bits, a power of two
times a float), so contraction to FMA changes nothing and the reference, the compiled CPU code and the Triton kernel
give the same bits.

Source: GACT, section 4 (group-wise quantization with stochastic rounding); the rounding against stored bf16 scales and
the plane layout are this project's.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._hash import FRACTION_BITS, mix_seed, noise
from ._layout import from_storage_order, to_storage_order

# bits -> widths of the planes, low bits first.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 6: (4, 2), 8: (8,)}

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Smallest and largest scale: its reciprocal and the products with it stay normal fp32 numbers.
MIN_SCALE, MAX_SCALE = 2.0**-100, 2.0**126

# Half of the largest range that a group can have.
MAX_SPREAD = torch.finfo(torch.float32).max * 0.5

# Rounds the fp32 bit pattern of a positive number up to the next bf16.
_BF16_CARRY, _BF16_MASK = 0xFFFF, -0x10000


def num_groups(numel: int, group_size: int) -> int:
    """Groups that ``numel`` elements fill, the last one perhaps partly."""
    return (numel + group_size - 1) // group_size


def quantized_nbytes(numel: int, bits: int, group_size: int, dtype: torch.dtype) -> int:
    """Bytes of codes, scales and zeros for ``numel`` elements; works on symbolic sizes too."""
    return num_groups(numel, group_size) * (group_size * bits // 8 + torch.bfloat16.itemsize + dtype.itemsize)


def quantize_reference(x: Tensor, bits: int, group_size: int, seed: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes ``x``; see the module docstring for formula and layout.

    Args:
        x: Float32, bfloat16 or float16, any shape and strides; read in storage order (``_layout``).
        bits: 1, 2, 3, 4, 6 or 8.
        group_size: A power of two from 32 up.
        seed: 0-d int64 on x's device; one value per training step.
        salt: Distinguishes the tensors of one step.

    Returns:
        codes uint8 [num_groups * group_size * bits / 8], scale bfloat16 [num_groups], zero in x's dtype [num_groups].

    Raises:
        ValueError: For bits, group sizes or dtypes that the format does not have.
    """
    check_arguments(x.dtype, bits, group_size)
    return encode_groups(group(to_storage_order(x), group_size), bits, seed ^ mix_seed(salt))


def group(flat: Tensor, group_size: int) -> Tensor:
    """[n] -> [num_groups, group_size], the last group filled up with copies of the last element."""
    missing = -flat.numel() % group_size
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    return flat.view(-1, group_size)


def encode_groups(groups: Tensor, bits: int, key: Tensor, first_group: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The formula for [num_groups, group_size], the first of them the ``first_group``-th of its tensor."""
    draws = noise(key, groups.shape, slice(0, groups.shape[1]), first_group)
    codes, scale, zero = encode_values(groups, bits, draws)
    return pack_planes(codes, bits), scale, zero


def encode_values(groups: Tensor, bits: int, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int32 [num_groups, group_size], scale and zero [num_groups]; ``draws`` is the noise of each element."""
    levels = 2**bits - 1
    values = groups.float()
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    # Halves, so that the spread of huge values does not overflow; exact.
    whole = (high * 0.5 - low * 0.5).abs() < math.inf
    known = None if whole.all() else values.isfinite()
    if known is not None:
        low, high = known_extremes(values, known)
    # Marked groups are those of the negated elements, with one level less.
    sign = torch.where(whole, 1, -1).float()
    low, high = torch.where(whole, low, -high), torch.where(whole, high, -low)
    # A tensor: on CUDA, torch divides by a number by multiplying with its reciprocal.
    top = torch.where(whole, levels, max(levels - 1, 1)).float()
    # Neither the highest level nor its distance from the zero may lie beyond the largest number.
    room = (torch.finfo(groups.dtype).max * 0.5 - low * 0.5).clamp(max=MAX_SPREAD) / top * 2.0
    raw = torch.minimum((high * 0.5 - low * 0.5) / top * 2.0, room).clamp(MIN_SCALE, MAX_SCALE).view(torch.int32)
    above = ((raw + _BF16_CARRY) & _BF16_MASK).view(torch.float32)
    scale = torch.where(above <= room, above, (raw & _BF16_MASK).view(torch.float32))

    inverse, scale, zero = 2.0 / scale * sign, scale * sign, low * sign
    position = torch.minimum((values * 0.5 - zero * 0.5) * inverse, top)
    fixed = (position * float(2**FRACTION_BITS)).to(torch.int32)
    codes = (fixed + draws) >> FRACTION_BITS
    if known is not None:
        if bits == 1:
            zero = torch.where(whole, zero, zero + scale * _share(codes, known))
            codes = torch.where(whole, codes, 0)
        # What a non-finite position converts to differs between machines.
        codes = torch.where(known, codes, levels)
    return codes, scale.to(torch.bfloat16).view(-1), zero.to(groups.dtype).view(-1)


def known_extremes(values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of the elements that are ``known``, 0 where there are none."""
    low = values.masked_fill(~known, math.inf).amin(1, keepdim=True)
    high = values.masked_fill(~known, -math.inf).amax(1, keepdim=True)
    return torch.where(low <= high, low, 0.0), torch.where(low <= high, high, 0.0)


def _share(codes: Tensor, known: Tensor) -> Tensor:
    """Mean of the ``known`` codes of 1 bit, cut to 16 significant bits: its product with a scale is exact."""
    ones = torch.where(known, codes, 0).sum(1, keepdim=True).float()
    return ((ones / known.sum(1, keepdim=True).clamp(min=1).float()).view(torch.int32) & -0x100).view(torch.float32)


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """int32 codes [num_groups, group_size] -> uint8 planes."""
    planes, offset = [], 0
    for width in PLANES[bits]:
        # [num_groups, fields of a byte, bytes]
        fields = ((codes >> offset) & (2**width - 1)).unflatten(1, (8 // width, -1))
        plane = functools.reduce(torch.bitwise_or, (f << (width * i) for i, f in enumerate(fields.unbind(1))))
        planes.append(plane.to(torch.uint8).view(-1))
        offset += width
    return planes[0] if len(planes) == 1 else torch.cat(planes)


def dequantize_reference(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Inverse of ``quantize_reference``: a tensor of ``shape``, ``stride`` and ``dtype``."""
    check_arguments(dtype, bits, group_size)
    value = decode_groups(split_planes(codes, bits, group_size), scale, zero, bits, group_size)
    return from_storage_order(value.to(dtype).view(-1)[: math.prod(shape)], shape, stride)


def decode_groups(planes: Sequence[Tensor], scale: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """The inverse of the formula: planes, uint8 [num_groups, bytes], to float32 [num_groups, group_size]."""
    return decode_values(unpack_planes(planes, bits, group_size), scale.unsqueeze(1), zero.unsqueeze(1), bits)


def decode_values(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The inverse of ``encode_values`` in float32; ``scale`` and ``zero`` are [num_groups, 1]."""
    value = zero.float() + scale.float() * codes.float()
    return torch.where((scale < 0) & (codes == 2**bits - 1), math.nan, value)


def split_planes(codes: Tensor, bits: int, group_size: int) -> list[Tensor]:
    """Codes -> one uint8 [num_groups, bytes] per plane, views."""
    groups = codes.numel() * 8 // (bits * group_size)
    sizes = [groups * group_size * width // 8 for width in PLANES[bits]]
    return [
        plane.view(groups, size // max(groups, 1)) for plane, size in zip(torch.split(codes, sizes), sizes, strict=True)
    ]


def unpack_planes(planes: Sequence[Tensor], bits: int, group_size: int) -> Tensor:
    """uint8 planes [num_groups, bytes] -> int32 codes [num_groups, group_size]."""
    code: Tensor | None = None
    offset = 0
    for plane, width in zip(planes, PLANES[bits], strict=True):
        shifts = torch.arange(0, 8, width, dtype=torch.int32, device=plane.device).view(1, -1, 1)
        field = ((plane.to(torch.int32).unsqueeze(1) >> shifts) & (2**width - 1)).reshape(-1, group_size) << offset
        code = field if code is None else code | field
        offset += width
    assert code is not None
    return code


def check_arguments(dtype: torch.dtype, bits: int, group_size: int) -> None:
    """Raises ValueError for what the format does not have."""
    if bits not in PLANES:
        raise ValueError(f"bits must be one of {tuple(PLANES)}, got {bits!r}: choose the nearest of them")
    if group_size < 32 or group_size & (group_size - 1):
        raise ValueError(f"group_size must be a power of two from 32 up, got {group_size!r}: 256 is the default")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"quantize takes {FLOAT_DTYPES}, got {dtype}: cast the tensor, or keep it exact")


# Exact strides: the layout that was traced decides the order in which the backward's decode writes.
@torch.library.custom_op(
    "actcompile::quantize", mutates_args=(), device_types="cpu", tags=(torch.Tag.needs_exact_strides,)
)
def quantize(x: Tensor, bits: int, group_size: int, seed: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize_reference`` as an operator."""
    from ._chunked import quantize_in_chunks

    return quantize_in_chunks(x, bits, group_size, seed, salt)


@quantize.register_fake
def quantize_fake(x: Tensor, bits: int, group_size: int, seed: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes of ``quantize``'s results."""
    check_arguments(x.dtype, bits, group_size)
    groups = num_groups(x.numel(), group_size)
    codes = x.new_empty(groups * (group_size * bits // 8), dtype=torch.uint8)
    return codes, x.new_empty(groups, dtype=torch.bfloat16), x.new_empty(groups)


@quantize.register_kernel("cuda")
def _(x: Tensor, bits: int, group_size: int, seed: Tensor, salt: int) -> tuple[Tensor, Tensor, Tensor]:
    from ._quantize_kernel import launch_quantize

    with torch.cuda.device(x.device):
        return launch_quantize(x, bits, group_size, seed, salt)


@torch.library.custom_op("actcompile::dequantize", mutates_args=(), device_types="cpu")
def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """``dequantize_reference`` as an operator."""
    from ._chunked import dequantize_in_chunks

    return dequantize_in_chunks(codes, scale, zero, bits, group_size, shape, stride, dtype)


@dequantize.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    check_arguments(dtype, bits, group_size)
    return from_storage_order(codes.new_empty(math.prod(shape), dtype=dtype), shape, stride)


@dequantize.register_kernel("cuda")
def _(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    group_size: int,
    shape: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    from ._quantize_kernel import launch_dequantize

    with torch.cuda.device(codes.device):
        return launch_dequantize(codes, scale, zero, bits, group_size, shape, stride, dtype)
