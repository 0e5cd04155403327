"""The Triton kernels against the eager reference, bit for bit."""

import pytest
import torch

from actcompile.triton_kernels._hash import mix_seed, noise
from actcompile.triton_kernels.quantize import FLOAT_DTYPES, PLANES, dequantize_reference, quantize_reference

from .conftest import assert_same_bits

triton = pytest.importorskip("triton")
tl = triton.language
kernel = pytest.importorskip("actcompile.triton_kernels._quantize_kernel")

SEED, SALT = mix_seed(2024), 11
MAX = {dtype: torch.finfo(dtype).max for dtype in FLOAT_DTYPES}
TINY = {dtype: torch.finfo(dtype).smallest_normal for dtype in FLOAT_DTYPES}

pytestmark = pytest.mark.usefixtures("interpreter_handles_bfloat16")


def example(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Values of many magnitudes, a constant run and both extremes in the same group."""
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator) * torch.logspace(-6, 3, numel)
    x[numel // 3 : numel // 2] = 0.125
    if numel > 600:
        x[600] = x[601] = TINY[dtype] / 2
    x = x.to(dtype)
    if numel > 600:
        x[0], x[1] = MAX[dtype], -MAX[dtype]
    return x.to(device)


def check(x: torch.Tensor, bits: int, group_size: int) -> None:
    """Compares both directions on ``x``."""
    seed = torch.tensor(SEED, device=x.device)
    expected = quantize_reference(x, bits, group_size, seed, SALT)
    actual = kernel.launch_quantize(x, bits, group_size, seed, SALT)
    for left, right in zip(actual, expected, strict=True):
        assert left.dtype == right.dtype
        assert_same_bits(left, right)
    layout = (bits, group_size, x.shape, x.stride(), x.dtype)
    decoded, reference = kernel.launch_dequantize(*expected, *layout), dequantize_reference(*expected, *layout)
    assert_same_bits(decoded, reference)
    assert decoded.stride() == reference.stride()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("bits", PLANES)
def test_kernels_equal_reference(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    check(example(2900, dtype, device), bits, 256)


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize(("numel", "group_size"), [(1, 32), (0, 32), (1000, 32), (1024, 64), (5000, 4096), (3, 8192)])
def test_sizes(numel: int, group_size: int, bits: int, device: torch.device) -> None:
    check(example(numel, torch.float32, device), bits, group_size)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("bits", PLANES)
def test_broken_groups(bits: int, dtype: torch.dtype, device: torch.device) -> None:
    x = example(32 * 8, dtype, device)
    for place, value in ((5, torch.inf), (40, -torch.inf), (70, torch.nan), (110, torch.inf), (111, -torch.inf)):
        x[place] = value
    x[160:192] = torch.nan
    check(x, bits, 32)


def test_layouts(device: torch.device) -> None:
    x = example(2 * 6 * 5 * 7, torch.bfloat16, device).view(2, 6, 5, 7)
    for y in (x.to(memory_format=torch.channels_last), x.permute(3, 0, 2, 1), x[:, ::2], x[:1].expand(3, 6, 5, 7)):
        check(y, 4, 64)


@pytest.mark.parametrize("bits", PLANES)
def test_nothing_is_written_beyond_the_end(bits: int, device: torch.device) -> None:
    numel, group_size, poison = 300, 32, 77
    x, seed = example(numel, torch.float32, device), torch.tensor(SEED, device=device)
    expected = quantize_reference(x, bits, group_size, seed, SALT)
    groups = expected[1].numel()
    outputs = [torch.cat([t, t.new_full((64,), poison)]).fill_(poison) for t in expected]
    options = kernel.launch_options(bits, group_size, kernel.QUANTIZE_ELEMENTS_PER_THREAD)
    kernel._quantize_kernel[(2,)](x, seed, *outputs, mix_seed(SALT), numel, groups, **options)
    for output, reference in zip(outputs, expected, strict=True):
        assert torch.equal(output[:-64], reference)
        assert output[-64:].eq(poison).all()
    decoded = torch.full((groups * group_size + 64,), poison, dtype=torch.float32, device=device)
    options = kernel.launch_options(bits, group_size, kernel.DEQUANTIZE_ELEMENTS_PER_THREAD)
    kernel._dequantize_kernel[(2,)](*expected, decoded, numel, groups, **options)
    assert decoded[numel:].eq(poison).all()
    assert decoded[:numel].ne(poison).all()


@triton.jit
def _noise_kernel(key_ptr, start_ptr, out_ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # noqa: N803
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    values = kernel.noise(tl.load(key_ptr), tl.load(start_ptr + row), column)
    tl.store(out_ptr + row * WIDTH + column, values)


def test_noise_beyond_32_bit_indices(device: torch.device) -> None:
    key, group_size, width = torch.tensor(SEED, device=device), 2**30, 16
    start = torch.arange(8, device=device) * group_size
    out = torch.empty(8, width, dtype=torch.int32, device=device)
    _noise_kernel[(1,)](key, start, out, ROWS=8, WIDTH=width)
    assert torch.equal(out, noise(key, (8, group_size), slice(0, width)))


@pytest.mark.gpu
def test_tensor_beyond_32_bit_indices() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs a CUDA device with 24 GiB of free memory")
    bits, group_size, head = 4, 256, 4096
    x = torch.randn(head, device="cuda").to(torch.bfloat16).repeat(2**32 // head + 1)
    seed = torch.tensor(SEED, device="cuda")
    encoded = kernel.launch_quantize(x, bits, group_size, seed, SALT)
    decoded = kernel.launch_dequantize(*encoded, bits, group_size, x.shape, x.stride(), x.dtype)
    for flat in (x, decoded):
        assert flat.numel() == 2**32 + head
    scale = encoded[1][-head // group_size :].float().repeat_interleave(group_size)
    error = (decoded[-head:].float() - x[-head:].float()).abs()
    assert (error <= scale + x[-head:].float().abs() * 2**-8).all()
    # Index 2**32 + i hashes to other noise than index i.
    nbytes = head * bits // 8
    assert not torch.equal(encoded[0][:nbytes], encoded[0][-nbytes:])
    expected = quantize_reference(x[:head], bits, group_size, seed, SALT)
    assert torch.equal(encoded[0][:nbytes], expected[0])
