"""pin_unstable: what turns small noise into large errors is computed in the forward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actcompile.passes.insert_codecs import insert_codecs
from actcompile.passes.pin_unstable import pin_unstable
from actcompile.plan import Action, Decision

from .pairs import text, trace, trace_joint

COARSE = Decision(Action.QUANTIZE, "test", bits=1, group_size=32)


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def test_relu_becomes_a_comparison_and_a_selection() -> None:
    joint, num_outputs = trace_joint(lambda w, x: torch.relu(x @ w).sin(), weight(8, 8), torch.randn(4, 8))
    assert pin_unstable(joint, num_outputs) == num_outputs + 1
    assert text(joint) == "\n".join(
        [
            "primals_1 = input",
            "primals_2 = input",
            "primals_3 = input",
            "tangents_1 = input",
            "mm = mm(primals_2, primals_1)",
            "le_scalar = le(mm, 0)",
            "scalar_tensor_default = scalar_tensor(0.0, float32, cpu)",
            "where_self = where(le_scalar, scalar_tensor_default, mm)",
            "sin = sin(where_self)",
            "cos = cos(where_self)",
            "mul = mul(tangents_1, cos)",
            "full_default = full([], 0.0, float32, strided, cpu, False)",
            "where = where(le_scalar, full_default, mul)",
            "permute = permute(primals_2, [1, 0])",
            "mm_1 = mm(permute, where)",
            "return [sin, le_scalar, mm_1, None, None]",
        ]
    )


def test_untouched_graph_is_unchanged() -> None:
    joint, num_outputs = trace_joint(lambda w, x: torch.sin(x @ w), weight(8, 8), torch.randn(4, 8))
    before = text(joint)
    assert pin_unstable(joint, num_outputs) == num_outputs
    assert text(joint) == before


def test_running_twice_pins_the_same() -> None:
    joint, num_outputs = trace_joint(lambda w, x: torch.relu(x @ w), weight(8, 8), torch.randn(4, 8))
    first = pin_unstable(joint, num_outputs)
    once = text(joint).splitlines()[:-1]
    assert pin_unstable(joint, num_outputs) == first
    assert text(joint).splitlines()[:-1] == once


def test_relu_of_nan_is_nan() -> None:
    values = torch.tensor([[float("nan"), -1.0, 0.0, 2.0]])
    traced = trace(lambda w, x: torch.relu(x * w).exp(), torch.ones(1, 4, requires_grad=True), values)
    torch.testing.assert_close(traced.run()[0], [torch.relu(values).exp()], equal_nan=True)


def test_sign_survives_the_coarsest_codes() -> None:
    """The gradient of a ReLU between two recomputed operators is 0 exactly where the input was negative."""
    bias = weight(256)
    x = torch.randn(16, 256)
    w = weight(256, 256)

    def function(bias: Tensor, w: Tensor, x: Tensor) -> Tensor:
        return torch.relu(F.layer_norm(x @ w, (256,)) + bias)

    traced = trace(function, bias, w, x, recompute="cheap")
    tangent = torch.rand(16, 256) + 0.5
    (exact, *_) = traced.run([tangent])[1]
    insert_codecs(traced.pair, traced.keep_all(mm=COARSE))
    assert "quantize" in text(traced.pair.forward)
    (noisy, *_) = traced.run([tangent])[1]
    torch.testing.assert_close(noisy, exact, rtol=0, atol=0)


def test_maximum_is_found_where_it_was() -> None:
    traced = trace(lambda w, x: (x @ w).exp().amax(1), weight(64, 64), torch.randn(16, 64) / 8, recompute="cheap")
    exact = traced.run()[1]
    insert_codecs(traced.pair, traced.keep_all(mm=COARSE))
    (noisy,) = traced.run()[1]
    assert torch.isfinite(noisy).all()
    assert ((noisy != 0) == (exact[0] != 0)).all()


@pytest.mark.parametrize("jump", [torch.sign, torch.floor, torch.ceil, torch.round, torch.trunc])
def test_rounded_values_are_saved(jump: Callable[[Tensor], Tensor]) -> None:
    """The backward reads the rounded values and rounds nothing again."""
    w, x = torch.ones(16, requires_grad=True), torch.rand(64, 16) * 0.8 + 0.1
    x[::2] += 1.0
    traced = trace(lambda w, x: jump(x.sin() * 2 - 1) * w, w, x, recompute="cheap")
    operator = f"= {jump.__name__}("
    assert operator in text(traced.pair.forward) and operator not in text(traced.pair.backward)


def test_exponentials_enter_linearly() -> None:
    """The mean gradient of cross-entropy over many draws of 2-bit noise is the exact one."""
    x, labels = torch.randn(32, 16) * 4, torch.randint(32, (32,))
    traced = trace(lambda w, x, labels: F.cross_entropy(x @ w, labels), weight(16, 32), x, labels)
    assert "= exp(" in text(traced.pair.forward)
    assert "= exp(" not in text(traced.pair.backward)
    (exact,) = traced.run()[1]
    coarse = Decision(Action.QUANTIZE, "test", bits=2, group_size=32)
    insert_codecs(traced.pair, traced.keep_all(exp=coarse))
    assert "quantize" in text(traced.pair.forward)
    draws = []
    for seed in range(400):
        traced.inputs = (*traced.inputs[:-1], torch.tensor(seed))
        draws.append(traced.run()[1][0])
    noise = float(torch.stack([draw - exact for draw in draws]).norm(dim=(1, 2)).mean())
    bias = float((torch.stack(draws).mean(0) - exact).norm())
    assert 0 < bias < 2 * noise / 400**0.5


def test_exponential_of_a_negative_square_may_run_again() -> None:
    traced = trace(lambda w, x: F.gelu(x @ w), weight(16, 16), torch.randn(8, 16))
    assert "= exp(" not in text(traced.pair.forward)
    assert "= exp(" in text(traced.pair.backward)


def test_pooling_does_not_run_again() -> None:
    traced = trace(
        lambda w, x: F.max_pool2d(torch.conv2d(x, w).sin(), 2).exp(),
        weight(3, 3, 3, 3),
        torch.randn(2, 3, 10, 10),
        recompute="cheap",
    )
    assert "max_pool" in text(traced.pair.forward)
    assert "max_pool2d_with_offsets" not in text(traced.pair.backward).replace("offsets_backward", "")
