"""Quantization on the CPU: cases worked by hand, extremes, memory formats, unbiasedness, the operators."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from actcompile.triton_kernels._hash import FRACTION_BITS, mix_seed, noise
from actcompile.triton_kernels.quantize import (
    FLOAT_DTYPES,
    MIN_SCALE,
    PLANES,
    dequantize,
    dequantize_reference,
    num_groups,
    pack_planes,
    quantize,
    quantize_reference,
    quantized_nbytes,
    split_planes,
    unpack_planes,
)

from .conftest import assert_same_bits

SALT = 3
ALL_BITS = pytest.mark.parametrize("bits", PLANES)
ALL_DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def seed(step: int = 0) -> Tensor:
    # Mixed from more words than a salt, or the two would cancel where they are equal.
    return torch.tensor(mix_seed(2024, step))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def round_trip(x: Tensor, bits: int, group_size: int = 256, step: int = 0) -> Tensor:
    encoded = quantize_reference(x, bits, group_size, seed(step), SALT)
    return dequantize_reference(*encoded, bits, group_size, x.shape, x.stride(), x.dtype)


def decoded_codes(x: Tensor, bits: int, group_size: int = 32, step: int = 0) -> Tensor:
    """The code of every element, [num_groups, group_size]."""
    return unpack_planes(
        split_planes(quantize_reference(x, bits, group_size, seed(step), SALT)[0], bits, group_size), bits, group_size
    )


# Layout


def test_one_bit_by_hand() -> None:
    x = torch.cat([torch.full((16,), -1.0), torch.full((16,), 1.0)])
    codes, scale, zero = quantize_reference(x, 1, 32, seed(), SALT)
    # Byte j of 4 holds the elements j, j + 4, ..., j + 28: the upper half of the elements are its upper four bits.
    assert codes.tolist() == [0xF0] * 4
    assert scale.tolist() == [2.0]
    assert zero.tolist() == [-1.0]
    assert torch.equal(round_trip(x, 1, 32), x)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        # Element e has the code e mod 2**bits.
        (1, [0x00, 0xFF, 0x00, 0xFF]),
        (2, [0x00, 0x55, 0xAA, 0xFF] * 2),
        # The low two bits of j, j + 8, j + 16 and j + 24; then the third bit of j, j + 4, ..., j + 28.
        (3, [0x00, 0x55, 0xAA, 0xFF] * 2 + [0xAA] * 4),
        (4, [0x11 * j for j in range(16)]),
        # The low four bits of j and j + 16; then the high two bits of j, j + 8, j + 16 and j + 24.
        (6, [0x11 * j for j in range(16)] + [0b01010000] * 8),
        (8, list(range(32))),
    ],
)
def test_planes_by_hand(bits: int, expected: list[int]) -> None:
    codes = (torch.arange(32, dtype=torch.int32) % 2**bits).view(1, 32)
    packed = pack_planes(codes, bits)
    assert packed.tolist() == expected
    assert torch.equal(unpack_planes(split_planes(packed, bits, 32), bits, 32), codes)


@ALL_BITS
def test_planes_of_several_groups(bits: int) -> None:
    codes = torch.randint(2**bits, (5, 64), generator=torch.Generator().manual_seed(bits)).to(torch.int32)
    packed = pack_planes(codes, bits)
    assert packed.numel() == 5 * 64 * bits // 8
    assert torch.equal(unpack_planes(split_planes(packed, bits, 64), bits, 64), codes)


@ALL_DTYPES
@ALL_BITS
@pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 1000])
def test_sizes(numel: int, bits: int, dtype: torch.dtype) -> None:
    x = randn(numel).to(dtype)
    codes, scale, zero = encoded = quantize_reference(x, bits, 256, seed(), SALT)
    assert scale.numel() == zero.numel() == num_groups(numel, 256) == math.ceil(numel / 256)
    assert sum(t.nbytes for t in encoded) == quantized_nbytes(numel, bits, 256, dtype)
    assert (codes.dtype, scale.dtype, zero.dtype) == (torch.uint8, torch.bfloat16, dtype)
    decoded = round_trip(x, bits)
    assert decoded.shape == x.shape
    assert decoded.dtype == dtype
    if numel == 1:
        assert torch.equal(decoded, x)


def test_the_last_group_is_filled_with_the_last_element() -> None:
    x = randn(40)
    filled = torch.cat([x, x[-1:].expand(24)])
    for left, right in zip(
        quantize_reference(x, 4, 32, seed(), SALT), quantize_reference(filled, 4, 32, seed(), SALT), strict=True
    ):
        assert torch.equal(left, right)


# Values


def test_ties_go_where_the_noise_says() -> None:
    x = torch.full((32,), 0.5)
    x[0], x[1] = 0.0, 1.0
    codes = decoded_codes(x, 1)[0]
    u = noise(seed() ^ mix_seed(SALT), (1, 32), slice(0, 32))[0]
    assert torch.equal(codes[2:], (u[2:] >= 2 ** (FRACTION_BITS - 1)).to(torch.int32))
    assert codes[:2].tolist() == [0, 1]
    assert 0 < codes[2:].sum() < 30


@ALL_DTYPES
@ALL_BITS
@pytest.mark.parametrize("value", [0.0, 1.0, -2.7, 3e-5, 6e4, -6e4])
def test_constant_groups_are_exact(value: float, bits: int, dtype: torch.dtype) -> None:
    x = torch.full((300,), value, dtype=dtype)
    _, scale, zero = quantize_reference(x, bits, 256, seed(), SALT)
    assert torch.equal(round_trip(x, bits), x)
    assert scale.tolist() == [MIN_SCALE] * 2
    assert torch.equal(zero, x[:2])


@ALL_DTYPES
@ALL_BITS
def test_group_minimum_is_exact(bits: int, dtype: torch.dtype) -> None:
    # ReLU's zeros among them.
    for x in (randn(64, 256), randn(64, 256).relu()):
        x = x.to(dtype)
        low = x.amin(1, keepdim=True)
        minimum = x == low
        for step in range(4):
            assert torch.equal(round_trip(x, bits, step=step)[minimum], low.expand_as(x)[minimum])


@ALL_DTYPES
@ALL_BITS
def test_error_is_below_one_scale(bits: int, dtype: torch.dtype) -> None:
    x = (randn(64, 256) * torch.logspace(-3, 3, 64).unsqueeze(1) + torch.linspace(-20, 20, 64).unsqueeze(1)).to(dtype)
    scale = quantize_reference(x, bits, 256, seed(), SALT)[1].double().unsqueeze(1)
    error = (round_trip(x, bits).double() - x.double()).abs()
    # Decoding rounds once more, to the tensor's dtype.
    rounding = torch.finfo(dtype).eps * (x.double().abs() + scale)
    assert (error <= scale + rounding).all()
    spread = (x.double().amax(1) - x.double().amin(1)).unsqueeze(1)
    assert (scale <= (spread / (2**bits - 1) * (1 + 2**-7)).clamp(min=MIN_SCALE)).all()


@ALL_BITS
def test_the_highest_code_never_wraps(bits: int) -> None:
    x = randn(128, 32) * torch.logspace(-25, 30, 128).unsqueeze(1)
    top = x == x.amax(1, keepdim=True)
    for step in range(50):
        codes = decoded_codes(x, bits, step=step)
        assert codes.max() <= 2**bits - 1
        # The scale is rounded up by at most 1/128: at 8 bits the highest position is 253 at the least.
        assert (codes[top] >= math.floor((2**bits - 1) * 128 / 129)).all()


def test_float16_extremes_never_decode_to_inf() -> None:
    extreme = torch.finfo(torch.float16).max
    x = torch.tensor([-extreme, 0.0, extreme, extreme], dtype=torch.float16).repeat(64)
    for bits in PLANES:
        for low in (-extreme, 0.0):
            y = x.clamp(min=low)
            for step in range(20):
                assert round_trip(y, bits, step=step).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_extremes_never_decode_to_inf(dtype: torch.dtype) -> None:
    extreme = torch.finfo(dtype).max
    x = torch.tensor([-extreme, 0.0, extreme, extreme], dtype=dtype).repeat(64)
    for bits in PLANES:
        assert round_trip(x, bits).isfinite().all(), bits


@ALL_DTYPES
def test_tiny_ranges(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    x = (torch.arange(256).to(dtype) * smallest).to(dtype)
    error = (round_trip(x, 8).double() - x.double()).abs()
    assert (error <= max(256 * smallest / 255, MIN_SCALE) * 1.02).all()


BROKEN = pytest.mark.parametrize("values", [[torch.inf], [-torch.inf], [torch.nan], [torch.inf, -torch.inf]], ids=str)


@ALL_DTYPES
@ALL_BITS
@BROKEN
def test_what_is_not_finite_comes_back_as_nan_and_alone(values: list[float], bits: int, dtype: torch.dtype) -> None:
    x = randn(4, 256).to(dtype)
    broken = x.clone()
    places = slice(17, 17 + len(values))
    broken[1, places] = torch.tensor(values, dtype=dtype)
    scale = quantize_reference(broken, bits, 256, seed(), SALT)[1].float()
    assert (scale < 0).tolist() == [False, True, False, False]
    decoded, expected = round_trip(broken, bits), round_trip(x, bits)
    assert decoded[1].isnan().nonzero().flatten().tolist() == list(range(256))[places]
    assert_same_bits(decoded[[0, 2, 3]], expected[[0, 2, 3]])
    known = broken[1].isfinite()
    limit = -scale[1] * (1 + torch.finfo(dtype).eps * 2**bits)
    assert ((decoded[1] - broken[1]).float().abs()[known] <= limit).all()


@ALL_DTYPES
@ALL_BITS
def test_without_a_finite_element_all_is_nan(bits: int, dtype: torch.dtype) -> None:
    for values in ([torch.nan], [torch.inf], [torch.inf, -torch.inf, torch.nan, torch.nan]):
        assert round_trip(torch.tensor(values, dtype=dtype).repeat(64), bits, 64).isnan().all()


@ALL_DTYPES
@ALL_BITS
def test_extremes_beside_nan(bits: int, dtype: torch.dtype) -> None:
    extreme = torch.finfo(dtype).max
    x = torch.tensor([-extreme, 0.0, extreme, torch.nan], dtype=dtype).repeat(64)
    for low in (-extreme, 0.0, extreme):
        for step in range(20):
            y = x.clamp(min=low)
            decoded = round_trip(y, bits, step=step)
            assert_same_bits(decoded.isfinite(), y.isfinite())
    # Constants are exact.
    assert_same_bits(decoded, y)


@pytest.mark.parametrize("bits", [bits for bits in PLANES if bits > 1])
def test_the_mean_beside_nan_approaches_the_tensor(bits: int) -> None:
    x = randn(64, 32)
    x[:, 3], x[:, 20] = torch.nan, torch.inf
    known, draws = x.isfinite(), 400
    scale = quantize_reference(x, bits, 32, seed(), SALT)[1].double().unsqueeze(1)
    top = x.masked_fill(~known, -torch.inf).amax(1, keepdim=True).double()
    position = (x.double() - top) / scale
    variance = (position.frac() * (1 - position.frac()) * scale**2)[known]
    mean = torch.stack([round_trip(x, bits, 32, step=n).double() for n in range(draws)]).mean(0)
    error = (mean - x)[known]
    # 1,920 nearly normal errors: the standard error of their root mean square is 1.6%.
    assert float(error.square().mean().sqrt()) == pytest.approx(math.sqrt(float(variance.mean()) / draws), rel=0.07)
    assert abs(float(error.mean())) < 4 * math.sqrt(float(variance.mean()) / draws / error.numel())


def test_one_bit_beside_nan_is_the_mean() -> None:
    x = torch.tensor([0.0, 0.0, 0.0, 4.0]).repeat(8)
    x[:4] = torch.nan
    codes, scale, zero = quantize_reference(x, 1, 32, seed(), SALT)
    # Of 28 elements 7 are 4, which no draw changes.
    assert (scale.tolist(), zero.tolist()) == ([-4.0], [1.0])
    # Of byte j, the element j alone is nan.
    assert codes.tolist() == [1] * 4
    assert torch.equal(round_trip(x, 1, 32)[4:], torch.ones(28))
    y = randn(32)
    y[5] = -torch.inf
    means = torch.stack([round_trip(y, 1, 32, step=n)[0] for n in range(400)])
    spread = float(y[y.isfinite()].max() - y[y.isfinite()].min())
    # The mean of 31 codes of a variance of at most 1/4.
    assert float(means.mean()) == pytest.approx(float(y[y.isfinite()].mean()), abs=4 * spread / 2 / math.sqrt(31 * 400))


# Memory formats


@pytest.mark.parametrize(
    "x",
    [
        randn(2, 6, 5, 7).to(memory_format=torch.channels_last),
        randn(4, 3, 50).permute(2, 0, 1),
        randn(1, 300).t(),
        randn(0, 3).t(),
        torch.tensor(2.5),
    ],
    ids=["channels_last", "permuted", "size 1", "empty", "0-d"],
)
def test_dense_strides_survive(x: Tensor) -> None:
    decoded = round_trip(x, 8)
    assert decoded.stride() == x.stride()
    torch.testing.assert_close(decoded, x, rtol=0, atol=float(x.max() - x.min()) / 250 if x.numel() else 0)


@pytest.mark.parametrize("x", [randn(60, 80)[:, ::2], randn(1, 80).expand(60, 80)], ids=["gaps", "expanded"])
def test_other_strides_become_contiguous(x: Tensor) -> None:
    decoded = round_trip(x, 8)
    assert decoded.is_contiguous()
    torch.testing.assert_close(decoded, x, rtol=0, atol=float(x.max() - x.min()) / 250)


def test_groups_follow_storage_order() -> None:
    x = randn(2, 8, 16, 16)
    last = x.to(memory_format=torch.channels_last)
    expected = quantize_reference(last.permute(0, 2, 3, 1).flatten(), 4, 256, seed(), SALT)
    for left, right in zip(quantize_reference(last, 4, 256, seed(), SALT), expected, strict=True):
        assert torch.equal(left, right)


# Noise


def relu_like(numel: int) -> Tensor:
    return randn(numel).relu()


def offset_by_30_ranges(numel: int) -> Tensor:
    x = torch.rand(numel, generator=torch.Generator().manual_seed(numel))
    return x + 30


@ALL_BITS
@pytest.mark.parametrize("make", [randn, offset_by_30_ranges, relu_like], ids=lambda make: make.__name__)
def test_the_mean_over_seeds_approaches_the_tensor(make, bits: int) -> None:  # type: ignore[no-untyped-def]
    x, draws = make(16_384), {100: 0.0, 400: 0.0}
    _, scale, zero = quantize_reference(x, bits, 256, seed(), SALT)
    step = scale.double().unsqueeze(1)
    position = ((x.view(-1, 256).double() - zero.double().unsqueeze(1)) / step).clamp(max=2**bits - 1)
    variance = position.frac() * (1 - position.frac()) * step**2

    total = torch.zeros_like(x, dtype=torch.float64)
    for n in range(1, max(draws) + 1):
        total += round_trip(x, bits, step=n)
        if n in draws:
            draws[n] = float(((total / n - x) ** 2).mean().sqrt())
    # 16,384 squares of nearly normal errors: the standard error of their root mean square is under 1%.
    for n, rms in draws.items():
        assert rms == pytest.approx(math.sqrt(float(variance.mean()) / n), rel=0.04)
    assert draws[100] / draws[400] == pytest.approx(2, rel=0.05)


def test_seed_and_salt_change_the_rounding() -> None:
    x = randn(4096)
    codes = {
        quantize_reference(x, 4, 256, seed(step), salt)[0].numpy().tobytes() for step in range(3) for salt in range(3)
    }
    assert len(codes) == 9
    assert_same_bits(round_trip(x, 4, step=5), round_trip(x, 4, step=5))


# Operators


@pytest.mark.parametrize(
    "x",
    [randn(3, 100), randn(2, 4, 6, 10).to(memory_format=torch.channels_last), randn(40, 6)[:, ::2]],
    ids=["contiguous", "channels_last", "gaps"],
)
def test_operators_pass_opcheck(x: Tensor) -> None:
    torch.library.opcheck(quantize, (x, 3, 64, seed(), SALT))
    encoded = quantize_reference(x, 3, 64, seed(), SALT)
    torch.library.opcheck(dequantize, (*encoded, 3, 64, list(x.shape), list(x.stride()), x.dtype))


def test_quantize_gets_the_traced_strides() -> None:
    assert torch.Tag.needs_exact_strides in torch.ops.actcompile.quantize.default.tags


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype", "message"),
    [
        (5, 256, torch.float32, r"bits must be one of .*, got 5"),
        (4, 48, torch.float32, r"group_size must be a power of two from 32 up, got 48"),
        (4, 16, torch.float32, r"group_size must be a power of two from 32 up, got 16"),
        (4, 256, torch.float64, r"quantize takes .*, got torch.float64"),
    ],
)
def test_what_the_format_does_not_have(bits: int, group_size: int, dtype: torch.dtype, message: str) -> None:
    x = torch.zeros(8, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        quantize(x, bits, group_size, seed(), SALT)
    with pytest.raises(ValueError, match=message):
        dequantize(x.to(torch.uint8), x, x, bits, group_size, [8], [1], dtype)


def test_kernels_are_imported_at_their_first_launch() -> None:
    script = (
        "import sys, torch, actcompile.triton_kernels.quantize, actcompile.triton_kernels.pack_bool\n"
        "torch.ops.actcompile.quantize(torch.ones(3), 4, 32, torch.tensor(1), 2)\n"
        "assert not [name for name in sys.modules if name.startswith('actcompile') and name.endswith('_kernel')]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
