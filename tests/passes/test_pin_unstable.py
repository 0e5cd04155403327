"""pin_unstable: what turns small noise into large errors is computed in the forward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from actcompile.passes.insert_codecs import insert_codecs
from actcompile.passes.pin_unstable import pin_unstable, unfold
from actcompile.plan import Action, Decision, Role

from .pairs import text, trace, trace_joint

ROLES = [Role.PARAMETER, Role.INPUT, Role.SEED]
COARSE = Decision(Action.QUANTIZE, "test", bits=1, group_size=32)


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def test_relu_becomes_a_comparison_and_a_selection() -> None:
    joint, num_outputs = trace_joint(lambda w, x: torch.relu(x @ w).sin(), weight(8, 8), torch.randn(4, 8))
    # The mask, and the cosine, which oscillates.
    assert pin_unstable(joint, num_outputs, ROLES) == num_outputs + 2
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
            "return [sin, le_scalar, cos, mm_1, None, None]",
        ]
    )


def test_untouched_graph_is_unchanged() -> None:
    joint, num_outputs = trace_joint(lambda w, v, x: (x @ w) * v, weight(8, 8), weight(8), torch.randn(4, 8))
    before = text(joint)
    assert pin_unstable(joint, num_outputs, [Role.PARAMETER, *ROLES]) == num_outputs
    assert text(joint) == before


def test_bounded_functions_come_back_in_the_place_of_what_stands_for_them() -> None:
    joint, num_outputs = trace_joint(lambda w, x: F.softplus(x @ w, beta=2), weight(8, 8), torch.randn(4, 8))
    assert pin_unstable(joint, num_outputs, ROLES) == num_outputs
    assert "sigmoid_default = sigmoid(mm)\nmul_tensor = mul(tangents_1, sigmoid_default)" in text(joint)
    unfold(joint.graph)
    assert text(joint) == "\n".join(
        [
            "primals_1 = input",
            "primals_2 = input",
            "primals_3 = input",
            "tangents_1 = input",
            "mm = mm(primals_2, primals_1)",
            "mul = mul(mm, 2)",
            "exp = exp(mul)",
            "log1p = log1p(exp)",
            "div = div(log1p, 2)",
            "gt = gt(mul, 20)",
            "where = where(gt, mm, div)",
            "mul_4 = mul(mm, 2)",
            "gt_2 = gt(mul_4, 20)",
            "exp_2 = exp(mul_4)",
            "add_1 = add(exp_2, 1.0)",
            "div_tensor_1 = div(exp_2, add_1)",
            "scalar_tensor_default_1 = scalar_tensor(1.0, float32, cpu)",
            "where_self_1 = where(gt_2, scalar_tensor_default_1, div_tensor_1)",
            "mul_tensor = mul(tangents_1, where_self_1)",
            "permute = permute(primals_2, [1, 0])",
            "mm_1 = mm(permute, mul_tensor)",
            "return [where, mm_1, None, None]",
        ]
    )


def test_running_twice_pins_the_same() -> None:
    joint, num_outputs = trace_joint(lambda w, x: torch.relu(x @ w), weight(8, 8), torch.randn(4, 8))
    first = pin_unstable(joint, num_outputs, ROLES)
    once = text(joint).splitlines()[:-1]
    assert pin_unstable(joint, num_outputs, ROLES) == first
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


# name -> function of a product; operators of what is saved for its gradient
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "silu": (F.silu, ["mm"]),
    "gelu": (F.gelu, ["mm"]),
    "gelu_tanh": (lambda y: F.gelu(y, approximate="tanh"), ["mm"]),
    "mish": (F.mish, ["mm"]),
    "softplus": (F.softplus, ["mm"]),
    "elu": (F.elu, ["mm"]),
    "logsigmoid": (F.logsigmoid, ["mm"]),
    "square": (torch.square, ["mm"]),
    # The slope jumps at 0: the factor of the branch that was taken.
    "selu": (F.selu, ["where"]),
    # Masks.
    "relu": (torch.relu, ["le"]),
    "leaky_relu": (F.leaky_relu, ["gt"]),
    # What oscillates or is a hump (1 - tanh(y)**2) is stored by its value.
    "sin": (torch.sin, ["cos"]),
    "tanh": (torch.tanh, ["mul"]),
    # Poles and steep spots.
    "sqrt": (lambda y: torch.sqrt(y + 100), ["reciprocal"]),
    "reciprocal": (lambda y: 1 / (y + 100), ["mul"]),
    "log": (lambda y: torch.log(y + 100), ["reciprocal"]),
    "exp": (torch.exp, ["exp"]),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_an_activation_function_saves(name: str) -> None:
    function, expected = ACTIVATIONS[name]
    w, x = weight(16, 16), torch.randn(8, 16)
    traced = trace(lambda w, x: function(x @ w), w, x, recompute="cheap")
    assert [row.op for row in traced.rows() if row.role is not Role.INPUT] == expected
    outputs, gradients = traced.run()
    result = function(x @ w)
    torch.testing.assert_close(outputs, [result])
    torch.testing.assert_close(gradients, list(torch.autograd.grad(result.sum(), [w])))


def test_a_quotient_saves_one_factor_for_each_of_its_operands() -> None:
    def function(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return (x @ w) / ((x @ v).abs() + 1e-3)

    inputs = weight(16, 16), weight(16, 16), torch.randn(8, 16)
    traced = trace(function, *inputs, recompute="cheap")
    # 1 / (|y| + eps), and x * sign(y) / (|y| + eps)**2
    assert [row.op for row in traced.rows() if row.role is not Role.INPUT] == ["reciprocal", "mul"]
    assert "= div(" not in text(traced.pair.backward)
    exact = torch.autograd.grad(function(*inputs).sum(), inputs[:2])
    torch.testing.assert_close(traced.run()[1], list(exact))


DIVISIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quotient": lambda y: y / (y.square() + 1e-3),
    "inverse root": lambda y: torch.rsqrt(y.square() + 1e-3),
    "power": lambda y: (y.abs() + 1e-3) ** -1.5,
    "norm": lambda y: F.normalize(y, dim=1),
    "root mean square": lambda y: y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-3),
    "layer norm": lambda y: F.layer_norm(y, (64,)),
    "softmax": lambda y: torch.softmax(y, 1),
    "distance": lambda y: (y[:8] - y[8:]).norm(dim=1),
    "tangent": torch.tan,
    "arc sine": lambda y: torch.asin(torch.tanh(y)),
    "inverse hyperbolic sine": torch.asinh,
    "logit": lambda y: torch.logit(torch.sigmoid(y)),
}


@pytest.mark.parametrize("name", DIVISIONS)
@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_nothing_is_divided_by_what_may_be_noisy(name: str, recompute: str) -> None:
    """Neither in two steps, nor by the inverse of a root."""
    traced = trace(
        lambda w, x: DIVISIONS[name](x @ w).square(), weight(64, 64), torch.randn(16, 64), recompute=recompute
    )
    exact = {slot.placeholder for slot, row in zip(traced.pair.slots, traced.rows(), strict=True) if row.obstacle}
    noisy = {slot.placeholder for slot in traced.pair.slots} - exact
    for node in traced.pair.backward.graph.nodes:
        if not noisy.isdisjoint(node.all_input_nodes):
            noisy.add(node)
        divisors = node.args[1:] if node.target is torch.ops.aten.div.Tensor else ()
        if str(node.target).split(".")[-2:-1] in (["reciprocal"], ["rsqrt"], ["sqrt"], ["log"]):
            divisors = node.args
        assert noisy.isdisjoint(value for value in divisors if isinstance(value, fx.Node)), node.format_node()
