"""The compiled CPU encoder against the reference, bit for bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from actcompile.triton_kernels import _compiled_cpu, _compiled_elements
from actcompile.triton_kernels._compiled_cpu import quantize_compiled
from actcompile.triton_kernels._hash import mix_seed
from actcompile.triton_kernels._layout import to_storage_order
from actcompile.triton_kernels.quantize import FLOAT_DTYPES, PLANES, encode_groups, group, quantize_reference

from .conftest import assert_same_bits

SALT = 11
ALL_BITS = pytest.mark.parametrize("bits", PLANES)
ALL_DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(x: Tensor, bits: int, group_size: int) -> None:
    """Compares with the reference on ``x``."""
    # Both halves of the seed count, and its sign.
    seed = torch.tensor(-(2**61) + 5)
    expected = quantize_reference(x, bits, group_size, seed, SALT)
    for got, reference in zip(quantize_compiled(x, bits, group_size, seed, SALT), expected, strict=True):
        assert got.dtype == reference.dtype
        assert_same_bits(got, reference)


def extremes(dtype: torch.dtype) -> Tensor:
    """Groups of 64 with the dtype's largest and smallest numbers, constants, inf and nan."""
    limits, generator = torch.finfo(dtype), torch.Generator().manual_seed(1)
    x = torch.randn(16, 64, generator=generator) * torch.logspace(-6, 3, 16).unsqueeze(1)
    x = x.to(dtype)
    x[0] = (torch.rand(64, generator=generator) * limits.max).to(dtype)
    x[1, ::2], x[1, 1::2] = -limits.max, limits.max
    x[2] = torch.arange(64).to(dtype) * limits.smallest_normal / 16
    x[3] = torch.arange(-32, 32).to(dtype) * limits.smallest_normal / 1024
    x[4], x[5], x[6, ::2] = 0.25, -limits.max, -0.0
    x[7, 3], x[8, 63], x[9, 5], x[10, 5] = torch.inf, -torch.inf, torch.nan, -torch.nan
    x[11, 1], x[11, 2], x[12], x[13] = torch.inf, -torch.inf, torch.nan, torch.inf
    return x


@ALL_DTYPES
@ALL_BITS
def test_values(bits: int, dtype: torch.dtype) -> None:
    check(extremes(dtype), bits, 64)
    for numel in (1, 63, 64, 65, 1000):
        check(randn(numel).to(dtype), bits, 64)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("group_size", [32, 1024, 2**22])
def test_group_sizes(group_size: int, bits: int) -> None:
    for numel in (5, 5000):
        check(randn(numel), bits, group_size)


def test_layouts() -> None:
    x = randn(2, 6, 8, 8)
    for y in (x.to(memory_format=torch.channels_last), x.permute(3, 0, 2, 1), x[:, ::2], x[:1].expand(3, 6, 8, 8)):
        check(y, 4, 64)
    codes, scale, zero = quantize_compiled(x[:0], 4, 64, torch.tensor(1), SALT)
    assert codes.numel() == scale.numel() == zero.numel() == 0


def test_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiled_elements, "THREAD_NUMEL", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    check(randn(3000), 6, 64)


def test_indices_beyond_32_bits() -> None:
    # numpy's zeros take no memory until they are written; the codes take half a GiB.
    x, tail = torch.from_numpy(np.zeros(2**32 + 4096, np.int16)).view(torch.bfloat16), randn(4096).to(torch.bfloat16)
    x[-4096:] = tail
    seed = torch.tensor(7)
    codes, scale, _ = quantize_compiled(x, 1, 256, seed, SALT)
    groups, key = group(to_storage_order(tail), 256), seed ^ mix_seed(SALT)
    expected = encode_groups(groups, 1, key, first_group=2**32 // 256)
    assert torch.equal(codes[-512:], expected[0])
    assert torch.equal(scale[-16:], expected[1])
    assert not torch.equal(codes[-512:], encode_groups(groups, 1, key)[0])


@pytest.mark.parametrize("bits", [3, 4])
def test_operator_passes_opcheck(bits: int) -> None:
    torch.library.opcheck(quantize_compiled, (randn(2, 4, 6, 10), bits, 64, torch.tensor(3), SALT))


@pytest.mark.parametrize(("bits", "group_size"), [(5, 256), (4, 48)])
def test_what_the_format_does_not_have(bits: int, group_size: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        quantize_compiled(torch.ones(64), bits, group_size, torch.tensor(1), SALT)


def test_formats_that_differ_in_bits_share_one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []
    load = _compiled_elements.CppPythonBindingsCodeCache.load_pybinding_async

    def spy(arguments: list[str], source: str, **options: object) -> Callable[[], Callable[..., None]]:
        sources.append(source)
        return load(arguments, source, **options)

    monkeypatch.setattr(_compiled_cpu, "_kernels", {})
    monkeypatch.setattr(_compiled_elements.CppPythonBindingsCodeCache, "load_pybinding_async", spy)
    formats = [(bits, 64, torch.float32) for bits in PLANES]
    _compiled_cpu.start_compiling(formats)
    _compiled_cpu.start_compiling([*formats, (4, 64, torch.bfloat16)])
    assert len(sources) == 2
    for bits in PLANES:
        check(extremes(torch.float32), bits, 64)
    assert len(sources) == 2
    # What nobody announced is compiled when it is called.
    check(randn(1000), 4, 128)
    assert len(sources) == 3
