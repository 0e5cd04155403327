"""Kernels that Inductor generates around encoders and decoders give the bits of the operators."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch._inductor.config as inductor_config
from torch import Tensor
from torch._inductor.codegen.simd import SIMDScheduling
from torch._inductor.codegen.triton import TritonScheduling
from torch.nn import functional as F

from actcompile.passes import _fused_encoder
from actcompile.passes.lower import free_inputs
from actcompile.triton_kernels.quantize import FLOAT_DTYPES, PLANES

from ..virtual_cuda import generate, run, trace
from .conftest import INTERPRETED, assert_same_bits

if not INTERPRETED:
    pytest.skip("runs in Triton's interpreter", allow_module_level=True)

SEED = torch.tensor(-(2**40) + 5)
GROUP_SIZE = 256
quantize, dequantize = torch.ops.actcompile.quantize, torch.ops.actcompile.dequantize


def assert_encoded(
    function: Callable[..., Tensor], inputs: list[Tensor], bits: int, folder: Path, salt: int = 3
) -> Tensor:
    """``function``'s result, whose codes, made in the kernel that computes it, have the bits of the operator's."""

    def encode(*inputs: Tensor) -> tuple[Tensor, ...]:
        value = function(*inputs[:-1])
        return value, *quantize(value, bits, GROUP_SIZE, inputs[-1], salt)

    code = generate(trace(encode, *inputs, SEED))
    assert [call.is_kernel for call in code.calls] == [True], code.source
    value, *encoded = run(code, [*inputs, SEED], folder)
    torch.testing.assert_close(value, function(*inputs), equal_nan=True)
    for got, expected in zip(encoded, quantize(value, bits, GROUP_SIZE, SEED, salt), strict=True):
        assert_same_bits(got, expected)
    return value


def test_what_nobody_else_reads_is_not_written(tmp_path: Path) -> None:
    """Rows of 300 hold no whole groups: the kernel of their maxima could not encode them."""

    def encode(x: Tensor, seed: Tensor) -> tuple[Tensor, ...]:
        return quantize(x - x.amax(1, keepdim=True), 4, GROUP_SIZE, seed, 3)

    x = torch.randn(64, 300)
    graph = trace(encode, x, SEED)
    free_inputs(graph.graph)
    code = generate(graph)
    assert "empty_strided_cuda((64, 300)" not in code.source
    for got, expected in zip(run(code, [x, SEED], tmp_path), encode(x, SEED), strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bits", PLANES)
def test_after_pointwise_operators(bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    # Three tiles, the last of them with one group.
    assert_encoded(F.gelu, [torch.randn(9, GROUP_SIZE, dtype=dtype)], bits, tmp_path)


# A tile, a tile with room for a group more, and rows that do not fit into registers.
@pytest.mark.parametrize(
    ("width", "dtype"), [*itertools.product((512, 768), FLOAT_DTYPES), (4352, torch.float32), (8192, torch.float32)]
)
def test_after_a_reduction_of_rows(width: int, dtype: torch.dtype, tmp_path: Path) -> None:
    def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), weight)

    # Few rows would be split, each over several programs.
    with inductor_config.patch(split_reductions=False):
        assert_encoded(layer_norm, [torch.randn(5, width, dtype=dtype), torch.randn(width, dtype=dtype)], 4, tmp_path)


def test_dynamic_batch(tmp_path: Path) -> None:
    def function(x: Tensor, weight: Tensor, seed: Tensor) -> list[Tensor]:
        y = F.gelu(F.layer_norm(x, weight.shape, weight))
        return [y, *quantize(y, 3, GROUP_SIZE, seed, 1)]

    x, weight = torch.randn(6, 4, 512), torch.randn(512)
    code = generate(trace(function, x, weight, SEED, dynamic_batch=True))
    assert [call.is_kernel for call in code.calls] == [True]
    for batch in (x, x[:1], torch.randn(9, 4, 512)):
        y, *encoded = run(code, [batch, weight, SEED], tmp_path)
        for got, expected in zip(encoded, quantize(y, 3, GROUP_SIZE, SEED, 1), strict=True):
            assert_same_bits(got, expected)


def assert_encoded_in_calls(function: Callable[..., Any], inputs: list[Tensor], num_calls: int, folder: Path) -> None:
    """The codes of ``function``'s first result have the operator's bits; there are ``num_calls`` with the encoder's."""

    def encode(*inputs: Tensor) -> tuple[Tensor, ...]:
        results = function(*inputs[:-1])
        return *results, *quantize(results[0], 4, GROUP_SIZE, inputs[-1], 3)

    code = generate(trace(encode, *inputs, SEED))
    assert len(code.calls) == num_calls, code.source
    results = run(code, [*inputs, SEED], folder)
    for got, expected in zip(results[-3:], quantize(results[0], 4, GROUP_SIZE, SEED, 3), strict=True):
        assert_same_bits(got, expected)


def test_rows_that_are_no_whole_groups(tmp_path: Path) -> None:
    assert_encoded_in_calls(lambda x: [F.layer_norm(x, (384,))], [torch.randn(4, 384)], 2, tmp_path)


def test_tensors_that_are_no_whole_groups(tmp_path: Path) -> None:
    assert_encoded_in_calls(lambda x: [F.gelu(x)], [torch.randn(3, 100)], 2, tmp_path)


def test_beside_a_reduction_of_columns(tmp_path: Path) -> None:
    def function(x: Tensor) -> list[Tensor]:
        y = x.exp()
        return [y, y.sum(0)]

    # The encoder with the exponential; the reduction, split.
    assert_encoded_in_calls(function, [torch.randn(256, 256)], 3, tmp_path)


def test_transposed_readers(tmp_path: Path) -> None:
    """What reads the tensor in another order would tile it otherwise."""

    def function(x: Tensor, z: Tensor) -> list[Tensor]:
        y = x.exp()
        return [y, y.t() + z]

    assert_encoded_in_calls(function, [torch.randn(64, 256), torch.randn(256, 64)], 2, tmp_path)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("bits", PLANES)
def test_groups_that_are_not_finite(number: float, bits: int, tmp_path: Path) -> None:
    x = torch.randn(4, GROUP_SIZE)
    x[1, 7], x[2] = number, number
    value = assert_encoded(lambda x: x * 2.0, [x], bits, tmp_path)
    assert value[1].isfinite().sum() == GROUP_SIZE - 1


@pytest.mark.parametrize("bits", PLANES)
def test_decoding_groups_that_are_not_finite(bits: int, tmp_path: Path) -> None:
    x = torch.randn(4, GROUP_SIZE)
    x[1, 7], x[2], x[3, 0] = math.inf, math.nan, 1e38
    codes = quantize(x, bits, GROUP_SIZE, SEED, 3)

    def decode(*codes: Tensor) -> Tensor:
        return dequantize(*codes, bits, GROUP_SIZE, x.shape, x.stride(), x.dtype) * 0.5

    (got,) = run(generate(trace(decode, *codes)), list(codes), tmp_path)
    assert_same_bits(got, decode(*codes))
    assert torch.equal(got.isfinite(), x.isfinite())


def test_extremes(tmp_path: Path) -> None:
    x = torch.zeros(4, GROUP_SIZE)
    x[0, ::2], x[0, 1::2] = torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max
    x[1, 5], x[2] = torch.finfo(torch.float32).tiny, 3.0
    assert_encoded(lambda x: -x, [x], 8, tmp_path)


def test_memory_formats(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 8, 16).to(memory_format=torch.channels_last)
    value = assert_encoded(lambda x: x.sin(), [x], 3, tmp_path)
    assert value.is_contiguous(memory_format=torch.channels_last)


def test_two_tensors_of_one_kernel(tmp_path: Path) -> None:
    def function(x: Tensor, seed: Tensor) -> list[Tensor]:
        y = x.exp()
        return [y, *quantize(x, 2, GROUP_SIZE, seed, 1), *quantize(y, 6, GROUP_SIZE, seed, 2)]

    x = torch.randn(3, GROUP_SIZE)
    code = generate(trace(function, x, SEED))
    assert len(code.calls) == 1
    y, *encoded = run(code, [x, SEED], tmp_path)
    expected = *quantize(x, 2, GROUP_SIZE, SEED, 1), *quantize(y, 6, GROUP_SIZE, SEED, 2)
    for got, one in zip(encoded, expected, strict=True):
        assert_same_bits(got, one)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bits", PLANES)
def test_decoding_in_what_reads_it(bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(3, 5, 40, dtype=dtype).permute(2, 0, 1)
    codes = quantize(x, bits, GROUP_SIZE, SEED, 3)

    def decode(*codes: Tensor) -> Tensor:
        return dequantize(*codes, bits, GROUP_SIZE, x.shape, x.stride(), dtype).float() * 0.5

    code = generate(trace(decode, *codes))
    assert [call.is_kernel for call in code.calls] == [True]
    (got,) = run(code, list(codes), tmp_path)
    assert_same_bits(got.to(dtype), decode(*codes).to(dtype))


def test_unpacking_in_what_reads_it(tmp_path: Path) -> None:
    mask = torch.randn(7, 13) > 0
    packed = torch.ops.actcompile.pack_bool(mask)

    def unpack(packed: Tensor, x: Tensor) -> Any:
        return torch.where(torch.ops.actcompile.unpack_bool(packed, mask.shape), x, 0.0)

    x = torch.randn(7, 13)
    code = generate(trace(unpack, packed, x))
    assert [call.is_kernel for call in code.calls] == [True]
    (got,) = run(code, [packed, x], tmp_path)
    assert torch.equal(got, unpack(packed, x))


def test_every_class_that_is_asked_tiles_encoders_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since 2.14, nodes ask the one that Triton's scheduling is derived from."""
    _fused_encoder.install()
    monkeypatch.setattr(_fused_encoder, "_encoders", lambda nodes: iter(nodes))
    for scheduling in (SIMDScheduling, TritonScheduling):
        tiling = scheduling.select_tiling([object()], sympy.Integer(512), sympy.S.One)
        assert tiling == {"x": 512, "r0_": 1}
