"""The compiled CPU bodies of pruning against the reference, bit for bit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from actcompile.triton_kernels import _compiled_elements, _compiled_topk
from actcompile.triton_kernels._compiled_topk import densify_compiled, sparsify_compiled
from actcompile.triton_kernels._hash import mix_seed
from actcompile.triton_kernels.quantize import FLOAT_DTYPES
from actcompile.triton_kernels.topk import densify_reference, pad_groups, sparsify_groups, sparsify_reference

from .conftest import assert_same_bits

SALT = 11
# Both halves of the seed count, and its sign.
SEED = torch.tensor(-(2**61) + 5)
FORMATS = [(51, 256), (12, 128), (1, 1024), (512, 512), (2, 16), (3, 16), (2, 4)]
ALL_FORMATS = pytest.mark.parametrize(("keep", "block"), FORMATS)
ALL_VALUE_BITS = pytest.mark.parametrize("value_bits", [16, 8, 4])
ALL_DTYPES = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(x: Tensor, keep: int, block: int, value_bits: int) -> None:
    """Compares both directions with the reference on ``x``."""
    expected = sparsify_reference(x, keep, block, value_bits, SEED, SALT)
    for got, reference in zip(sparsify_compiled(x, keep, block, value_bits, SEED, SALT), expected, strict=True):
        assert got.dtype == reference.dtype
        assert_same_bits(got, reference)
    layout = (keep, block, value_bits, x.shape, x.stride(), x.dtype)
    decoded, reference = densify_compiled(*expected, *layout), densify_reference(*expected, *layout)
    assert_same_bits(decoded, reference)
    assert decoded.stride() == reference.stride()


def extremes(dtype: torch.dtype) -> Tensor:
    """Rows of 1024 with the dtype's largest and smallest numbers, equal magnitudes, mostly zeros, inf and nan."""
    limits, generator = torch.finfo(dtype), torch.Generator().manual_seed(1)
    x = (torch.randn(14, 1024, generator=generator) * torch.logspace(-6, 3, 14).unsqueeze(1)).to(dtype)
    x[0] = (torch.rand(1024, generator=generator) * limits.max).to(dtype)
    x[1, ::2], x[1, 1::2] = -limits.max, limits.max
    x[2] = torch.arange(1024).to(dtype) * limits.smallest_normal / 16
    x[3] = torch.arange(-512, 512).to(dtype) * limits.smallest_normal / 1024
    x[4], x[5], x[6, ::2] = 0.25, 0.0, -0.0
    x[7, 3], x[8, 63], x[9, 5], x[10, 5] = torch.inf, -torch.inf, torch.nan, -torch.nan
    x[11, 1], x[11, 2], x[12] = torch.inf, -torch.inf, torch.nan
    x[13, torch.arange(1024) % 20 != 7] = 0.0
    return x


@ALL_DTYPES
@ALL_VALUE_BITS
@ALL_FORMATS
def test_values(keep: int, block: int, value_bits: int, dtype: torch.dtype) -> None:
    check(extremes(dtype), keep, block, value_bits)
    check((randn(8192) * 3).round().to(dtype), keep, block, value_bits)
    for numel in (0, 1, 255, 257, 1000):
        check(randn(numel).to(dtype), keep, block, value_bits)


@ALL_DTYPES
def test_decoded_values_round_as_the_dtype_does(dtype: torch.dtype) -> None:
    """Every code of 8 bits, at scales down to where the dtype's numbers are subnormal."""
    groups = 64
    codes = torch.arange(256, dtype=torch.uint8).repeat(groups)
    scale = (torch.rand(groups, generator=torch.Generator().manual_seed(3)) + 1) * torch.logspace(-38, -5, groups)
    parts = (codes.new_full((groups * 32,), 255), codes, scale.bfloat16(), (-scale * 77).to(dtype))
    layout = (256, 256, 8, [groups * 256], [1], dtype)
    assert_same_bits(densify_compiled(*parts, *layout), densify_reference(*parts, *layout))


@pytest.mark.parametrize(("keep", "block"), [(51, 256), (3, 16)])
def test_layouts(keep: int, block: int) -> None:
    x = randn(2, 6, 8, 8)
    for y in (x.to(memory_format=torch.channels_last), x.permute(3, 0, 2, 1), x[:, ::2], x[:1].expand(3, 6, 8, 8)):
        check(y, keep, block, 4)


@pytest.mark.parametrize(("keep", "block"), [(51, 256), (3, 16)])
def test_threads_give_the_same_bits(keep: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiled_elements, "THREAD_NUMEL", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    check(randn(3000), keep, block, 4)


def test_indices_beyond_32_bits() -> None:
    # numpy's zeros take no memory until they are written; what is stored takes one GiB.
    x, tail = torch.from_numpy(np.zeros(2**32 + 4096, np.int16)).view(torch.bfloat16), randn(4096).to(torch.bfloat16)
    x[-4096:] = tail
    index, values, _, _ = sparsify_compiled(x, 100, 1024, 8, SEED, SALT)
    arguments = (pad_groups(tail, 1024), 100, 1024, 8, SEED ^ mix_seed(SALT))
    expected = sparsify_groups(*arguments, first_group=2**32 // 1024)
    assert torch.equal(index[-512:], expected[0])
    assert torch.equal(values[-400:], expected[1])
    assert not torch.equal(values[-400:], sparsify_groups(*arguments)[1])


@pytest.mark.parametrize(("keep", "block", "value_bits"), [(51, 256, 16), (3, 16, 4)])
def test_operators_pass_opcheck(keep: int, block: int, value_bits: int) -> None:
    x = randn(2, 4, 6, 10)
    torch.library.opcheck(sparsify_compiled, (x, keep, block, value_bits, SEED, SALT))
    parts = sparsify_reference(x, keep, block, value_bits, SEED, SALT)
    layout = (keep, block, value_bits, list(x.shape), list(x.stride()), x.dtype)
    torch.library.opcheck(densify_compiled, (*parts, *layout))


def test_what_the_format_does_not_have() -> None:
    with pytest.raises(ValueError, match="keep must be in"):
        sparsify_compiled(torch.ones(64), 4, 16, 4, SEED, SALT)


def test_formats_of_a_block_and_dtype_share_one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compiled_topk, "_kernels", {})
    _compiled_topk.start_compiling_sparse([(256, torch.float32)])
    kernel = _compiled_topk._kernels[256, torch.float32]
    for keep in (10, 51):
        check(randn(1000), keep, 256, 8)
    _compiled_topk.start_compiling_sparse([(256, torch.float32), (256, torch.bfloat16)])
    assert _compiled_topk._kernels[256, torch.float32] is kernel
    assert len(_compiled_topk._kernels) == 2
