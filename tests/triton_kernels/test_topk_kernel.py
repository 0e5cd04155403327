"""The Triton kernels of pruning against the eager reference, bit for bit."""

import pytest
import torch

from actcompile.triton_kernels._hash import mix_seed
from actcompile.triton_kernels._topk_sizes import num_groups
from actcompile.triton_kernels.quantize import FLOAT_DTYPES
from actcompile.triton_kernels.topk import densify_reference, sparsify_reference

from .conftest import assert_same_bits

pytest.importorskip("triton")
kernel = pytest.importorskip("actcompile.triton_kernels._topk_kernel")

SEED, SALT = mix_seed(2024), 11
FORMATS = [(51, 256), (12, 128), (1, 1024), (512, 512), (2, 16), (3, 16), (2, 4)]
ALL_FORMATS = pytest.mark.parametrize(("keep", "block"), FORMATS)
ALL_VALUE_BITS = pytest.mark.parametrize("value_bits", [16, 8, 4])
ALL_DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)

pytestmark = pytest.mark.usefixtures("interpreter_handles_bfloat16")


def example(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Many magnitudes, zeros, equal magnitudes, both extremes and, in one place each, inf and nan."""
    limits, generator = torch.finfo(dtype), torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator) * torch.logspace(-6, 3, numel)
    x[numel // 3 : numel // 2] = 0.0
    x[numel // 2 : numel // 2 + 300] = (x[numel // 2 : numel // 2 + 300] * 2).round()
    x = x.to(dtype)
    if numel > 2000:
        x[0], x[1], x[2], x[3] = limits.max, -limits.max, limits.smallest_normal / 2, -0.0
        x[1500], x[1600], x[1990] = torch.inf, -torch.nan, -torch.inf
    return x.to(device)


def check(x: torch.Tensor, keep: int, block: int, value_bits: int) -> None:
    """Compares both directions on ``x``."""
    seed = torch.tensor(SEED, device=x.device)
    expected = sparsify_reference(x, keep, block, value_bits, seed, SALT)
    actual = kernel.launch_sparsify(x, keep, block, value_bits, seed, SALT)
    for left, right in zip(actual, expected, strict=True):
        assert left.dtype == right.dtype
        assert_same_bits(left, right)
    layout = (keep, block, value_bits, x.shape, x.stride(), x.dtype)
    decoded, reference = kernel.launch_densify(*expected, *layout), densify_reference(*expected, *layout)
    assert_same_bits(decoded, reference)
    assert decoded.stride() == reference.stride()


@ALL_DTYPES
@ALL_VALUE_BITS
@ALL_FORMATS
def test_kernels_equal_reference(
    keep: int, block: int, value_bits: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(example(2900, dtype, device), keep, block, value_bits)


@ALL_VALUE_BITS
@ALL_FORMATS
@pytest.mark.parametrize("numel", [0, 1, 256, 1030])
def test_sizes(numel: int, keep: int, block: int, value_bits: int, device: torch.device) -> None:
    check(example(numel, torch.float32, device), keep, block, value_bits)


@pytest.mark.parametrize(("keep", "block"), [(51, 256), (3, 16)])
def test_layouts(keep: int, block: int, device: torch.device) -> None:
    x = example(2 * 6 * 5 * 7, torch.bfloat16, device).view(2, 6, 5, 7)
    for y in (x.to(memory_format=torch.channels_last), x.permute(3, 0, 2, 1), x[:, ::2], x[:1].expand(3, 6, 5, 7)):
        check(y, keep, block, 4)


@ALL_VALUE_BITS
@ALL_FORMATS
def test_nothing_is_written_beyond_the_end(keep: int, block: int, value_bits: int, device: torch.device) -> None:
    numel, poison = 300, 77
    x, seed = example(numel, torch.float32, device), torch.tensor(SEED, device=device)
    expected = sparsify_reference(x, keep, block, value_bits, seed, SALT)
    outputs = [torch.cat([t, t.new_full((64,), poison)]).fill_(poison) for t in expected]
    options, groups = kernel.launch_options(keep, block, value_bits), num_groups(numel, block)
    sparsify, densify = (
        (kernel._sparsify_positions_kernel, kernel._densify_positions_kernel)
        if block <= 16
        else (kernel._sparsify_kernel, kernel._densify_kernel)
    )
    sparsify[(2,)](x, seed, *outputs, mix_seed(SALT), numel, groups, **options)
    for output, reference in zip(outputs, expected, strict=True):
        assert torch.equal(output[:-64], reference)
        assert output[-64:].eq(poison).all()
    decoded = torch.full((numel + 64,), poison, dtype=torch.float32, device=device)
    densify[(2,)](*expected, decoded, numel, groups, **options)
    assert decoded[numel:].eq(poison).all()
    assert_same_bits(
        decoded[:numel], densify_reference(*expected, keep, block, value_bits, x.shape, x.stride(), x.dtype)
    )


@pytest.mark.gpu
def test_tensor_beyond_32_bit_indices() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs a CUDA device with 40 GiB of free memory")
    keep, block, head = 51, 256, 4096
    x = torch.randn(head, device="cuda").to(torch.bfloat16).repeat(2**32 // head + 1)
    seed = torch.tensor(SEED, device="cuda")
    parts = kernel.launch_sparsify(x, keep, block, 8, seed, SALT)
    decoded = kernel.launch_densify(*parts, keep, block, 8, x.shape, x.stride(), x.dtype)
    index, values, scale, _ = sparsify_reference(x[:head], keep, block, 8, seed, SALT)
    for tail in (parts[0][-index.numel() :], parts[0][: index.numel()]):
        assert torch.equal(tail, index)
    assert torch.equal(parts[1][: values.numel()], values)
    # Index 2**32 + i hashes to other noise than index i.
    assert not torch.equal(parts[1][-values.numel() :], values)
    error = (decoded[-head:] - decoded[:head]).float().abs()
    assert (error <= scale.float().repeat_interleave(block) * 1.01 + decoded[:head].float().abs() * 2**-7).all()
