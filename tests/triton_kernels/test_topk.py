"""Pruning on the CPU: cases worked by hand, ties, extremes, memory formats, error bounds, unbiasedness, operators."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from actcompile.meter import measure_peak
from actcompile.triton_kernels import _chunked
from actcompile.triton_kernels._hash import mix_seed
from actcompile.triton_kernels._select import select_largest
from actcompile.triton_kernels._topk_sizes import group_numel, half_dtype, num_groups, num_kept, sparsified_nbytes
from actcompile.triton_kernels.quantize import FLOAT_DTYPES
from actcompile.triton_kernels.topk import (
    densify,
    densify_reference,
    pack_fields,
    sparsify,
    sparsify_reference,
    unpack_fields,
)

from .conftest import assert_same_bits

SALT = 3
FORMATS = [(51, 256), (26, 128), (3, 1024), (512, 512), (2, 16), (3, 16), (2, 4)]
ALL_FORMATS = pytest.mark.parametrize(("keep", "block"), FORMATS)
ALL_VALUE_BITS = pytest.mark.parametrize("value_bits", [16, 8, 4])
ALL_DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def seed(step: int = 0) -> Tensor:
    return torch.tensor(mix_seed(2024, step))


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def round_trip(x: Tensor, keep: int, block: int, value_bits: int = 16, step: int = 0) -> Tensor:
    parts = sparsify_reference(x, keep, block, value_bits, seed(step), SALT)
    return densify_reference(*parts, keep, block, value_bits, x.shape, x.stride(), x.dtype)


def kept_elements(x: Tensor, keep: int, block: int) -> Tensor:
    """Which elements are kept, by a stable sort: bool [num_blocks, block], for sizes that are whole blocks."""
    order = x.view(-1, block).abs().sort(dim=1, descending=True, stable=True).indices
    return torch.zeros(x.numel() // block, block, dtype=torch.bool).scatter_(1, order[:, :keep], True)


# Layout


def test_bitmap_by_hand() -> None:
    x = torch.zeros(256)
    x[[0, 9, 130, 255]] = torch.tensor([1.0, -4.0, 2.0, -3.0])
    index, values, scale, zero = sparsify_reference(x, 2, 128, 16, seed(), SALT)
    # Byte j of a block holds the elements 8 * j to 8 * j + 7, from its low bit up.
    assert index.tolist() == [1, 2, *[0] * 14, 4, *[0] * 14, 0x80]
    assert (values.dtype, values.tolist()) == (torch.bfloat16, [1.0, -4.0, 2.0, -3.0])
    assert scale.numel() == zero.numel() == 0
    assert torch.equal(round_trip(x, 2, 128), x)


@pytest.mark.parametrize(
    ("keep", "block", "places", "expected"),
    [
        # The first two blocks keep 1 and 14, 0 and 15; what no magnitude decides is kept from the start on.
        (2, 16, [1, 14, 16, 31], [0xE1, 0xF0, *[0x10] * 14]),
        (3, 16, [1, 4, 14, 16, 23, 31], [0x41, 0x0E, 0xF7, *[0x10, 0x02, 0x21] * 7]),
        # Two blocks in a byte: 1 and 3, 0 and 2.
        (2, 4, [1, 3, 4, 6], [0b10_00_11_01, *[0b01_00_01_00] * 31]),
    ],
)
def test_positions_by_hand(keep: int, block: int, places: list[int], expected: list[int]) -> None:
    x = torch.zeros(256)
    x[places] = torch.arange(1.0, len(places) + 1)
    index, values, _, _ = sparsify_reference(x, keep, block, 16, seed(), SALT)
    assert index.tolist() == expected
    assert values[: len(places)].tolist() == list(range(1, len(places) + 1))
    assert not values[len(places) :].any()
    assert torch.equal(round_trip(x, keep, block), x)


def test_codes_by_hand() -> None:
    x = torch.zeros(128)
    # Values on levels are exact: zero -1, scale 1.
    x[[2, 3, 50, 90, 127]] = torch.tensor([-1.0, 14.0, 2.0, 5.0, 3.0])
    _, values, scale, zero = sparsify_reference(x, 5, 128, 4, seed(), SALT)
    assert values.tolist() == [0xF0, 0x63, 0x04]
    assert (scale.tolist(), zero.tolist()) == ([1.0], [-1.0])
    assert torch.equal(round_trip(x, 5, 128, 4), x)


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_fields_survive_packing(width: int) -> None:
    fields = torch.randint(2**width, (3, 21), generator=torch.Generator().manual_seed(width))
    packed = pack_fields(fields, width)
    assert packed.numel() == 3 * math.ceil(21 * width / 8)
    unpacked = unpack_fields(packed.view(3, -1), width)
    assert torch.equal(unpacked[:, :21], fields.to(torch.uint8))
    assert not unpacked[:, 21:].any()


@ALL_DTYPES
@ALL_VALUE_BITS
@ALL_FORMATS
@pytest.mark.parametrize("numel", [0, 1, 255, 256, 257, 5000])
def test_sizes(numel: int, keep: int, block: int, value_bits: int, dtype: torch.dtype) -> None:
    x = randn(numel).to(dtype)
    index, values, scale, zero = parts = sparsify_reference(x, keep, block, value_bits, seed(), SALT)
    assert sum(part.nbytes for part in parts) == sparsified_nbytes(numel, keep, block, value_bits, dtype)
    stored = half_dtype(dtype) if value_bits == 16 else torch.uint8
    assert (index.dtype, values.dtype, scale.dtype, zero.dtype) == (torch.uint8, stored, torch.bfloat16, dtype)
    groups = num_groups(numel, block)
    assert scale.numel() == zero.numel() == (groups if value_bits < 16 else 0)
    if value_bits == 16:
        assert values.numel() == groups * group_numel(block) // block * keep
    decoded = densify_reference(*parts, keep, block, value_bits, x.shape, x.stride(), dtype)
    assert (decoded.shape, decoded.dtype) == (x.shape, dtype)
    if numel == 1 and value_bits == 16:
        assert torch.equal(decoded, x.to(stored).to(dtype))


def test_a_padding_zero_is_never_kept_in_place_of_an_element() -> None:
    x = torch.zeros(300)
    x[[256, 290]] = torch.tensor([1e-30, -1e-30])
    assert torch.equal(round_trip(x, 2, 256, 16)[256:].nonzero().view(-1), torch.tensor([0, 34]))
    index = sparsify_reference(torch.zeros(300), 44, 256, 16, seed(), SALT)[0].view(2, -1)
    assert torch.equal(unpack_fields(index, 1).bool()[1], torch.arange(256) < 44)


@pytest.mark.parametrize(
    ("sparsity", "block", "expected"),
    # 12.5 and 13.5 of 128 round to an even count.
    [(0.8, 256, 51), (0.0, 128, 128), (0.99, 128, 1), (0.999, 128, 1), (0.90234375, 128, 12), (0.89453125, 128, 14)],
)
def test_num_kept(sparsity: float, block: int, expected: int) -> None:
    assert num_kept(sparsity, block) == expected


# Selection


@ALL_DTYPES
@ALL_FORMATS
def test_selection_is_that_of_a_stable_sort(keep: int, block: int, dtype: torch.dtype) -> None:
    for x in (randn(8192), randn(8192).relu(), (randn(8192) * 3).round(), randn(8192) * torch.logspace(-40, 38, 8192)):
        x = x.to(dtype).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
        assert torch.equal(select_largest(x.view(-1, block), keep), kept_elements(x, keep, block))


@ALL_DTYPES
@ALL_VALUE_BITS
@ALL_FORMATS
def test_exactly_keep_of_95_percent_zeros(keep: int, block: int, value_bits: int, dtype: torch.dtype) -> None:
    """Back Razor's threshold would be 0 and keep everything."""
    x = torch.where(torch.arange(20 * 1024) % 20 == 7, randn(20 * 1024), 0.0).to(dtype)
    index, values, _, _ = sparsify_reference(x, keep, block, value_bits, seed(), SALT)
    kept = select_largest(x.view(-1, block), keep)
    assert (kept.sum(1) == keep).all()
    if block >= 128:
        assert (unpack_fields(index.view(-1, block // 8), 1).sum(1) == keep).all()
    assert values.numel() * values.itemsize == num_groups(x.numel(), block) * math.ceil(
        group_numel(block) // block * keep * value_bits / 8
    )
    # Everything that is not zero is kept where there is room.
    fits = (x.view(-1, block) != 0).sum(1) <= keep
    assert kept[fits].logical_or(x.view(-1, block)[fits] == 0).all()


@ALL_DTYPES
@ALL_FORMATS
def test_the_first_of_equal_magnitudes_are_kept(keep: int, block: int, dtype: torch.dtype) -> None:
    for value in (0.0, 1.5, -65504.0):
        kept = select_largest(torch.full((3, block), value, dtype=dtype), keep)
        assert torch.equal(kept, (torch.arange(block) < keep).expand(3, block))
    signs = torch.full((1, block), 2.0, dtype=dtype)
    signs[:, ::2] = -2.0
    assert torch.equal(select_largest(signs, keep)[0], torch.arange(block) < keep)
    # Both zeros are one magnitude.
    zeros = torch.zeros(1, block, dtype=dtype)
    zeros[:, 1::2] = -0.0
    assert torch.equal(select_largest(zeros, keep)[0], torch.arange(block) < keep)


# Values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@ALL_FORMATS
def test_half_precision_values_are_exact_at_16_bits(keep: int, block: int, dtype: torch.dtype) -> None:
    x = (randn(8192) * torch.logspace(-30, 30, 8192)).to(dtype)
    x = torch.where(x.isfinite(), x, torch.finfo(dtype).max)
    expected = torch.where(kept_elements(x, keep, block), x.view(-1, block), 0)
    assert torch.equal(round_trip(x, keep, block), expected.view(-1))


def test_float32_values_keep_their_range_at_16_bits() -> None:
    limit, smallest = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal
    x = torch.zeros(128)
    x[:6] = torch.tensor([limit, -limit, 3e38, 1e30, smallest, -smallest])
    decoded = round_trip(x, 6, 128)
    assert decoded.isfinite().all()
    assert ((decoded - x).abs() <= x.abs() * 2**-8).all()
    x = randn(8192) * torch.logspace(-37, 37, 8192)
    kept, decoded = kept_elements(x, 51, 256).view(-1), round_trip(x, 51, 256)
    assert ((decoded - x).abs()[kept] <= x.abs()[kept] * 2**-8).all()


@ALL_DTYPES
@pytest.mark.parametrize("value_bits", [8, 4])
@ALL_FORMATS
def test_error_of_kept_values_is_below_one_scale(keep: int, block: int, value_bits: int, dtype: torch.dtype) -> None:
    x = (randn(64, 1024) * torch.logspace(-3, 3, 64).unsqueeze(1)).to(dtype).view(-1)
    scale = sparsify_reference(x, keep, block, value_bits, seed(), SALT)[2].double()
    kept, decoded = kept_elements(x, keep, block), round_trip(x, keep, block, value_bits)
    assert not decoded.view(-1, block)[~kept].any()
    step = scale.repeat_interleave(group_numel(block))
    # Decoding rounds once more, to the tensor's dtype.
    bound = step + torch.finfo(dtype).eps * (x.double().abs() + step)
    assert ((decoded.double() - x.double()).abs() <= bound)[kept.view(-1)].all()
    values = x.view(-1, block)[kept].double().view(len(scale), -1)
    assert (scale <= (values.amax(1) - values.amin(1)) / (2**value_bits - 1) * (1 + 2**-7)).all()


@ALL_DTYPES
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@ALL_FORMATS
def test_what_is_not_finite_comes_back(value: float, keep: int, block: int, dtype: torch.dtype) -> None:
    numel, place = 3 * max(group_numel(block), 256), max(group_numel(block), 256) + 77
    x = randn(numel).to(dtype)
    x[place] = value
    decoded = round_trip(x, keep, block)
    assert decoded[place].isnan() if math.isnan(value) else decoded[place] == value
    assert decoded.isfinite().sum() == numel - 1
    for value_bits in (8, 4):
        decoded = round_trip(x, keep, block, value_bits)
        assert decoded[place].isnan()
        assert decoded.isfinite().sum() == numel - 1


def test_nan_is_kept_before_inf() -> None:
    x = torch.full((128,), torch.inf)
    x[100], x[101] = torch.nan, -torch.nan
    assert round_trip(x, 2, 128).isnan().nonzero().view(-1).tolist() == [100, 101]


@ALL_DTYPES
@ALL_VALUE_BITS
def test_extremes_never_decode_to_inf(value_bits: int, dtype: torch.dtype) -> None:
    extreme = torch.finfo(dtype).max
    x = torch.tensor([-extreme, 0.0, extreme, extreme], dtype=dtype).repeat(64)
    for keep, block in ((200, 256), (2, 16), (2, 4)):
        for step in range(10):
            assert round_trip(x, keep, block, value_bits, step).isfinite().all()


def analytic_energy(fraction: float) -> dict[str, float]:
    """Energy in the largest ``fraction`` of a distribution."""
    normal = torch.distributions.Normal(0.0, 1.0)
    t = normal.icdf(torch.tensor(1 - fraction / 2))
    exceeded = -math.log(fraction)
    return {
        "gaussian": fraction + 2 * float(t * normal.log_prob(t).exp()),
        "laplace": fraction * (1 + exceeded + exceeded**2 / 2),
    }


def test_energy_that_is_kept() -> None:
    """That of the distributions' tails: a block of 256 stands for the whole tensor to within 1%."""
    normal, uniform = randn(2**20), torch.rand(2**20, generator=torch.Generator().manual_seed(1)) - 0.5
    laplace = -uniform.sign() * (1 - 2 * uniform.abs()).clamp(min=1e-7).log()
    expected = analytic_energy(51 / 256)
    for name, x in {"gaussian": normal, "laplace": laplace, "gelu": gelu(normal)}.items():
        energy = float(round_trip(x, 51, 256).square().sum() / x.square().sum())
        whole = float(x.square().sort(descending=True).values[: x.numel() * 51 // 256].sum() / x.square().sum())
        assert energy == pytest.approx(expected.get(name, whole), abs=0.01), name
        assert energy <= whole + 1e-4
    # What is left of a block's energy without its largest elements is at most their share of its count, for any block.
    softmax = (randn(4096, 256) * 2).softmax(1).view(-1)
    for x in (softmax, torch.ones(4096)):
        blocks = x.view(-1, 256)
        energy = round_trip(x, 51, 256).view(-1, 256).square().sum(1) / blocks.square().sum(1)
        assert (energy >= 51 / 256 * (1 - 2**-7)).all()


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
    decoded = round_trip(x.half(), 128, 128)
    assert decoded.stride() == x.stride()
    assert torch.equal(decoded, x.half())


@pytest.mark.parametrize("x", [randn(60, 80)[:, ::2], randn(1, 80).expand(60, 80)], ids=["gaps", "expanded"])
def test_other_strides_become_contiguous(x: Tensor) -> None:
    decoded = round_trip(x.half(), 128, 128)
    assert decoded.is_contiguous()
    assert torch.equal(decoded, x.half())


# Noise


@pytest.mark.parametrize("value_bits", [8, 4])
@pytest.mark.parametrize(("keep", "block"), [(51, 256), (3, 16), (2, 4)])
def test_the_mean_over_seeds_approaches_what_is_kept(keep: int, block: int, value_bits: int) -> None:
    x = randn(16_384)
    expected = torch.where(kept_elements(x, keep, block), x.view(-1, block), 0.0).view(-1).double()
    _, _, scale, zero = sparsify_reference(x, keep, block, value_bits, seed(), SALT)
    step = scale.double().repeat_interleave(group_numel(block))
    position = (x.double() - zero.double().repeat_interleave(group_numel(block))) / step
    fraction = position.clamp(max=2**value_bits - 1).frac()
    variance = float((fraction * (1 - fraction) * step**2)[expected != 0].sum())
    total, num_draws = torch.zeros_like(expected), 100
    for n in range(num_draws):
        total += round_trip(x, keep, block, value_bits, step=n)
    error = float((total / num_draws - expected).square().sum())
    # 2,048 squares of nearly normal errors at the least: the standard error of their sum is about 3%.
    assert error == pytest.approx(variance / num_draws, rel=0.12)


def test_seed_and_salt_change_the_rounding_alone() -> None:
    x = randn(4096)
    parts = [sparsify_reference(x, 51, 256, 4, seed(step), salt) for step in range(3) for salt in range(3)]
    assert len({values.numpy().tobytes() for _, values, _, _ in parts}) == 9
    assert len({index.numpy().tobytes() for index, _, _, _ in parts}) == 1


# Operators


@ALL_DTYPES
@ALL_VALUE_BITS
@ALL_FORMATS
def test_operators_equal_the_references(
    keep: int, block: int, value_bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_chunked, "CHUNK_NUMEL", 1024)
    x = randn(3, 50, 27).to(dtype).transpose(0, 1)
    expected = sparsify_reference(x, keep, block, value_bits, seed(), SALT)
    parts = sparsify(x, keep, block, value_bits, seed(), SALT)
    for part, reference in zip(parts, expected, strict=True):
        assert part.dtype == reference.dtype
        assert_same_bits(part, reference)
    layout = (keep, block, value_bits, x.shape, x.stride(), dtype)
    decoded = densify(*parts, *layout)
    assert_same_bits(decoded, densify_reference(*expected, *layout))
    assert decoded.stride() == x.stride()


def test_memory_is_that_of_the_results() -> None:
    x = torch.randn(2**22)
    parts = sparsify(x, 51, 256, 4, seed(), SALT)
    encode = measure_peak(lambda: sparsify(x, 51, 256, 4, seed(), SALT))
    decode = measure_peak(lambda: densify(*parts, 51, 256, 4, x.shape, x.stride(), x.dtype))
    assert encode.peak_nbytes < x.nbytes
    assert decode.peak_nbytes < 1.5 * x.nbytes


@pytest.mark.parametrize(
    "x",
    [randn(3, 100), randn(2, 4, 6, 10).to(memory_format=torch.channels_last), randn(40, 6)[:, ::2]],
    ids=["contiguous", "channels_last", "gaps"],
)
@pytest.mark.parametrize(("keep", "block", "value_bits"), [(51, 256, 16), (3, 16, 4)])
def test_operators_pass_opcheck(x: Tensor, keep: int, block: int, value_bits: int) -> None:
    torch.library.opcheck(sparsify, (x, keep, block, value_bits, seed(), SALT))
    parts = sparsify_reference(x, keep, block, value_bits, seed(), SALT)
    torch.library.opcheck(densify, (*parts, keep, block, value_bits, list(x.shape), list(x.stride()), x.dtype))


def test_sparsify_gets_the_traced_strides() -> None:
    assert torch.Tag.needs_exact_strides in torch.ops.actcompile.sparsify.default.tags


@pytest.mark.parametrize(
    ("keep", "block", "value_bits", "dtype", "message"),
    [
        (5, 64, 16, torch.float32, r"block must be one of .*, got 64"),
        (0, 256, 16, torch.float32, r"keep must be in .* for a block of 256, got 0"),
        (257, 256, 16, torch.float32, r"keep must be in .* for a block of 256, got 257"),
        (4, 16, 16, torch.float32, r"keep must be in .* for a block of 16, got 4"),
        (51, 256, 2, torch.float32, r"value_bits must be one of .*, got 2"),
        (51, 256, 16, torch.float64, r"sparsify takes .*, got torch.float64"),
    ],
)
def test_what_the_format_does_not_have(
    keep: int, block: int, value_bits: int, dtype: torch.dtype, message: str
) -> None:
    x = torch.zeros(8, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        sparsify(x, keep, block, value_bits, seed(), SALT)
    with pytest.raises(ValueError, match=message):
        densify(x.to(torch.uint8), x, x, x, keep, block, value_bits, [8], [1], dtype)


def test_kernels_are_imported_at_their_first_launch() -> None:
    script = (
        "import sys, torch, actcompile.triton_kernels.topk\n"
        "torch.ops.actcompile.sparsify(torch.ones(3), 2, 16, 4, torch.tensor(1), 2)\n"
        "assert not [name for name in sys.modules if name.startswith('actcompile') and name.endswith('_kernel')]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
