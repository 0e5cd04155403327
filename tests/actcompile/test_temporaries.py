"""What operators take beside their results: the rules against the meter."""

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor

from actcompile import triton_kernels  # noqa: F401  defines the operators
from actcompile._temporaries import Operand, temporary_nbytes
from actcompile.meter import measure_peak

aten = torch.ops.aten


def operand(value: Tensor) -> Operand:
    return Operand(
        [sympy.Integer(size) for size in value.shape], [sympy.Integer(step) for step in value.stride()], value.dtype
    )


def predicted(kernel: str, *operands: Tensor, **arguments: Any) -> int:
    named = {int(name[1:]) if name.startswith("_") else name: value for name, value in arguments.items()}
    return int(temporary_nbytes(kernel, [operand(value) for value in operands], named))


def measured(fn: Callable[[], object]) -> int:
    fn()
    peak = measure_peak(fn)
    return peak.peak_nbytes - peak.end_nbytes


def test_operators_without_a_rule_take_nothing() -> None:
    assert predicted("extern_kernels.mm", torch.randn(8, 8), torch.randn(8, 8)) == 0


@pytest.mark.parametrize("numel", [4096, 4100])
def test_masks(numel: int) -> None:
    mask = torch.rand(numel) > 0.5
    found = measured(lambda: torch.ops.actcompile.pack_bool(mask))
    assert predicted("torch.ops.actcompile.pack_bool.default", mask) == pytest.approx(found, abs=64)


@pytest.mark.parametrize("name", ["quantize", "quantize_compiled"])
def test_codes_of_dense_tensors_take_nothing_and_else_a_copy(name: str) -> None:
    kernel = f"torch.ops.actcompile.{name}.default"
    x = torch.randn(16, 256)
    assert predicted(kernel, x, _0=4, _1=256) == 0
    # Of these, only the compiled encoder fills the last group up without a copy of them all.
    copied = {"quantize": 16 * 255 * 4, "quantize_compiled": 0}[name]
    assert predicted(kernel, x[:, :255].contiguous(), _0=4, _1=256) == copied
    # Every second column: gathered first.
    assert predicted(kernel, x.view(32, 128)[:, ::2], _0=4, _1=256) == 32 * 64 * 4
    assert predicted(kernel, x.t(), _0=4, _1=256) == 0


@pytest.mark.parametrize(("tokens", "head"), [(64, 64), (128, 32), (256, 64), (1024, 16)])
def test_attention(tokens: int, head: int) -> None:
    name = "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu"
    q, k, v = (torch.randn(1, 2, tokens, head) for _ in range(3))
    forward = lambda: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)  # noqa: E731
    assert predicted(f"{name}.default", q, k, v) == measured(forward)
    scores = predicted(f"{name}_backward.default", q, q, k, v)
    assert (
        scores
        == 2
        * torch.get_num_threads()
        * min(tokens, {64: 32, 128: 32, 256: 64, 1024: 256}[tokens])
        * min(tokens, 512)
        * 4
    )


@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride"), [(3, 32, 3, 1), (32, 32, 3, 1), (32, 64, 3, 2), (32, 64, 1, 2)]
)
def test_convolutions(inputs: int, outputs: int, kernel: int, stride: int) -> None:
    """oneDNN's scratch memory is left out: a few percent of what is copied."""
    x, weight = torch.randn(8, inputs, 32, 32), torch.randn(outputs, inputs, kernel, kernel)
    options = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], 1)
    forward = lambda: aten.convolution(x, weight, None, *options)  # noqa: E731
    assert predicted("extern_kernels.convolution", x, weight, stride=(stride, stride)) == pytest.approx(
        measured(forward), rel=0.05
    )
    if inputs == 3:
        return
    gradient = torch.randn_like(forward())
    found = measured(lambda: aten.convolution_backward(gradient, x, weight, [0], *options, [True, True, False]))
    name = "torch.ops.aten.convolution_backward.default"
    assert predicted(name, gradient, x, weight) == pytest.approx(found, rel=0.05)


def test_convolutions_in_channels_last_copy_no_images() -> None:
    x = torch.randn(8, 32, 32, 32).to(memory_format=torch.channels_last)
    weight = torch.randn(32, 32, 3, 3)
    assert predicted("extern_kernels.convolution", x, weight, stride=(1, 1)) == 2 * weight.nbytes
    assert predicted("torch.ops.aten.convolution_backward.default", x, x, weight) == 3 * weight.nbytes
