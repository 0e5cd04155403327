"""factor_tangents: what a gradient is multiplied with becomes one factor."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from actcompile.passes.factor_tangents import factor_tangents
from actcompile.passes.insert_codecs import insert_codecs
from actcompile.passes.pin_unstable import _noise_in
from actcompile.plan import Action, Decision, Plan, Role

from .pairs import text, trace, trace_joint


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def joint_of(function: Callable[..., Tensor], num_weights: int, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    weights = [weight(8, 8, dtype=dtype) for _ in range(num_weights)]
    return trace_joint(function, *weights, torch.randn(4, 8, dtype=dtype))[0]


def factored(joint: fx.GraphModule) -> fx.GraphModule:
    num_weights = len(joint.graph.find_nodes(op="placeholder")) - 3
    roles = [*[Role.PARAMETER] * num_weights, Role.INPUT, Role.SEED]
    factor_tangents(joint, _noise_in(joint, 1, roles))
    return joint


def gradient(joint: fx.GraphModule, start: str) -> list[str]:
    """The lines of ``joint`` from the one of ``start`` to the transposition of the input."""
    lines = text(joint).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"{start} = "))
    return lines[first : next(i for i, line in enumerate(lines) if i > first and line.startswith("permute"))]


def product(w: Tensor, x: Tensor) -> Tensor:
    y = x @ w
    return y.exp() * y.sin()


def logarithm(w: Tensor, x: Tensor) -> Tensor:
    return torch.log(x @ w)


def softsign(w: Tensor, x: Tensor) -> Tensor:
    return F.softsign(x @ w)


def guarded(w: Tensor, x: Tensor) -> Tensor:
    y = x @ w
    return torch.where(y > 0.1, torch.log(y), 0.0)


def test_sums_of_products_become_one_factor() -> None:
    assert gradient(factored(joint_of(product, 1)), "cos") == [
        "cos = cos(mm)",
        "mul_tensor = mul(exp, cos)",
        "mul_tensor_1 = mul(sin, exp)",
        "add_tensor = add(mul_tensor, mul_tensor_1)",
        "mul_tensor_2 = mul(tangents_1, add_tensor)",
    ]


def test_selections_become_one_factor() -> None:
    assert gradient(factored(joint_of(lambda w, x: torch.ops.aten.elu(x @ w, 1.5, 2.0, 0.5), 1)), "le") == [
        "le = le(mm, 0)",
        "mul_5 = mul(mm, 0.5)",
        "exp = exp(mul_5)",
        "mul_tensor = mul(exp, 1.5)",
        "scalar_tensor_default = scalar_tensor(2.0, float32, cpu)",
        "where_self = where(le, mul_tensor, scalar_tensor_default)",
        "mul_tensor_1 = mul(tangents_1, where_self)",
    ]


def test_products_and_quotients_become_one_factor() -> None:
    assert gradient(factored(joint_of(softsign, 1)), "sign") == [
        "sign = sign(mm)",
        "reciprocal_default = reciprocal(add)",
        "mul_tensor = mul(div_2, -1.0)",
        "mul_tensor_1 = mul(mul_tensor, sign)",
        "add_tensor = add(reciprocal_default, mul_tensor_1)",
        "mul_tensor_2 = mul(tangents_1, add_tensor)",
    ]


def test_a_quotient_that_stands_alone_is_a_product_with_the_inverse() -> None:
    assert gradient(factored(joint_of(logarithm, 1)), "reciprocal_default") == [
        "reciprocal_default = reciprocal(mm)",
        "mul_tensor = mul(tangents_1, reciprocal_default)",
    ]


def test_quotients_of_half_precision_are_computed_in_float32() -> None:
    assert gradient(factored(joint_of(logarithm, 1, torch.bfloat16)), "convert_element_type_default") == [
        "convert_element_type_default = convert_element_type(tangents_1, float32)",
        "convert_element_type_default_1 = convert_element_type(mm, float32)",
        "reciprocal_default = reciprocal(convert_element_type_default_1)",
        "mul_tensor = mul(convert_element_type_default, reciprocal_default)",
        "convert_element_type_default_2 = convert_element_type(mul_tensor, bfloat16)",
    ]


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: (x @ w).sin(),
        lambda w, x: F.gelu(x @ w),
        lambda w, x: torch.relu(x @ w),
        lambda w, x: (x @ w) / 3.0,
    ],
)
def test_a_graph_of_single_factors_is_unchanged(function: Callable[..., Tensor]) -> None:
    joint = joint_of(function, 1)
    before = text(joint)
    assert text(factored(joint)) == before


@pytest.mark.parametrize("function", [product, logarithm, softsign, guarded])
def test_running_twice_equals_once(function: Callable[..., Tensor]) -> None:
    once = factored(joint_of(function, 1))
    before = text(once)
    assert text(factored(once)) == before


def branches(y: Tensor) -> Tensor:
    return torch.where(y < 2, y.exp(), y)


FUNCTIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "product": (product, 1),
    "logarithm": (logarithm, 1),
    "softsign": (softsign, 1),
    "guarded": (guarded, 1),
    "selu": (lambda w, x: F.selu(x @ w), 1),
    "quotient": (lambda w, v, x: (x @ w) / ((x @ v).abs() + 0.1), 2),
    "norm": (lambda w, x: F.normalize(x @ w, dim=1), 1),
    "branches": (lambda w, x: branches(x @ w), 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_are_the_same(name: str) -> None:
    function, num_weights = FUNCTIONS[name]
    joint = joint_of(function, num_weights)
    inputs = [*(torch.rand(8, 8) + 0.1 for _ in range(num_weights)), torch.rand(4, 8), torch.tensor(1234)]
    tangent = torch.randn(4, 8)
    joint.recompile()
    expected = joint(inputs, [tangent])
    before = text(joint)
    assert text(factored(joint)) != before
    torch.testing.assert_close(joint(inputs, [tangent]), expected)


def quotient(w: Tensor, v: Tensor, x: Tensor) -> Tensor:
    a, b = x @ w, x @ v
    return torch.where(b.abs() > 0.1, a / b, 0.0)


GUARDED: list[Callable[..., Tensor]] = [
    quotient,
    lambda w, v, x: branches(x @ w * 6) + x @ v,
    lambda w, v, x: branches(x @ w * 6) * (x @ v).square(),
    lambda w, v, x: torch.where(x @ w > 0.1, (x @ w) ** -2.0, 0.0) + x @ v,
]


@pytest.mark.parametrize("function", GUARDED)
@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_what_is_not_selected_makes_no_noise(function: Callable[..., Tensor], recompute: str) -> None:
    """However near to its pole it is, or however large."""
    torch.manual_seed(0)
    traced = trace(function, weight(64, 64), weight(64, 64), torch.randn(32, 64) / 8, recompute=recompute)
    exact = traced.run()[1]
    codes = Decision(Action.QUANTIZE, "test", bits=8, group_size=64)
    floats = {row.key: codes for row in traced.rows() if not row.obstacle and row.dtype == torch.float32}
    assert floats
    insert_codecs(traced.pair, Plan({**traced.keep_all(), **floats}))
    for noisy, one in zip(traced.run()[1], exact, strict=True):
        assert (noisy - one).norm() < 0.05 * one.norm()
