"""Tests of the pass that stores pruned layer inputs, and of which products it finds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actcompile.passes import run_passes
from actcompile.passes._weight_grads import WeightGrads
from actcompile.passes.sparsify_linear import sparsify_linear
from actcompile.plan import Action, Decision, Plan
from actcompile.triton_kernels.topk import densify_reference, sparsify_reference

from .pairs import Traced, text, trace

PRUNE = Decision(Action.SPARSIFY, "test", bits=16, keep=51, block=256)
KEEP = Decision(Action.KEEP, "test")


def parameter(*shape: int) -> Tensor:
    return (torch.randn(shape) / 8).requires_grad_()


def prune_layer_inputs(traced: Traced) -> Plan:
    return Plan({row.key: PRUNE if row.is_layer_input else KEEP for row in traced.rows()})


def pruned(x: Tensor, decision: Decision = PRUNE) -> Tensor:
    parts = sparsify_reference(x, *decision.pruning, torch.tensor(0), 0)
    return densify_reference(*parts, *decision.pruning, x.shape, x.stride(), x.dtype)


# Each reads x [4, 6, 64] in one product with the weight [32, 64], or as said.
LINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "linear_with_bias": lambda x, w: F.linear(x, w, torch.ones(32)),
    "matmul": lambda x, w: x @ w.t(),
    "addmm": lambda x, w: torch.addmm(torch.ones(24, 32), x.flatten(0, 1), w.t()),
    "mm": lambda x, w: x.flatten(0, 1).mm(w.t()),
    "mm_of_a_kept_transpose": lambda x, w: x.flatten(0, 1).mm(w.view(64, 32)),
    "einsum": lambda x, w: torch.einsum("btk,nk->btn", x, w),
    "bmm_with_expanded_weights": lambda x, w: x.bmm(w.t().expand(4, 64, 32)),
}


@pytest.mark.parametrize("form", LINEAR)
def test_weight_gradient_reads_the_pruned_input_and_the_input_gradient_is_exact(form: str) -> None:
    x, v, w = torch.randn(4, 6, 64), parameter(64), parameter(32, 64)

    def model(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return LINEAR[form](torch.sin(x + v), w).square()

    traced = trace(model, x, v, w)
    run_passes(traced.pair, prune_layer_inputs(traced))
    assert text(traced.pair.backward).count("= sparse_weight_grad(") == 1
    assert "densify" not in text(traced.pair.backward)
    _, (grad_v, grad_w) = traced.run()
    h = torch.sin(x + v.detach())
    y = LINEAR[form](h, w)
    (exact_v,) = torch.autograd.grad(LINEAR[form](torch.sin(x + v), w).square().sum(), v)
    (expected_w,) = torch.autograd.grad(LINEAR[form](pruned(h), w), w, 2 * y.detach())
    torch.testing.assert_close(grad_w, expected_w, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_v, exact_v, rtol=1e-5, atol=1e-5)
    (exact_w,) = torch.autograd.grad(y.square().sum(), w)
    assert (grad_w - exact_w).norm() > 0.1 * exact_w.norm()


def test_rewritten_graphs_as_text() -> None:
    x, w = torch.randn(16, 64), parameter(32, 64)
    traced = trace(lambda x, w: F.linear(torch.sin(x), w).square(), x, w)
    sparsify_linear(traced.pair, prune_layer_inputs(traced))
    stored = ["sin_part0", "sin_part1", "sin_part2", "sin_part3"]
    assert "sparsify_default = sparsify(sin, 51, 256, 16, primals_3, 0)" in text(traced.pair.forward)
    forward, backward = (text(module).splitlines() for module in (traced.pair.forward, traced.pair.backward))
    assert forward[-1] == "return [pow_1, getitem, getitem_1, getitem_2, getitem_3, mm]"
    assert [line for line in backward if "_part" in line] == [
        *(f"{name} = input" for name in stored),
        f"sparse_weight_grad_default = sparse_weight_grad(mul_1, {', '.join(stored)}, 51, 256, 16, 64)",
    ]


def test_queries_keys_and_values_share_one_pruned_input() -> None:
    x = torch.randn(4, 8, 64)
    weights = [parameter(64, 64) for _ in range(3)]
    traced = trace(lambda x, *ws: sum(F.linear(torch.sin(x), w).square() for w in ws), x, *weights)
    run_passes(traced.pair, prune_layer_inputs(traced))
    assert text(traced.pair.forward).count("= sparsify(") == 1
    assert text(traced.pair.backward).count("= sparse_weight_grad(") == 3


def test_no_gradient_of_single_samples_is_computed() -> None:
    x, w = torch.randn(4, 6, 64), parameter(32, 64)
    traced = trace(lambda x, w: torch.sin(x).bmm(w.t().expand(4, 64, 32)).square(), x, w)
    assert "bmm" in text(traced.pair.backward)
    run_passes(traced.pair, prune_layer_inputs(traced))
    shapes = [tuple(n.meta["val"].shape) for n in traced.pair.backward.graph.nodes if "weight_grad" in str(n.target)]
    assert shapes == [(32, 64)]
    assert "= bmm(" not in text(traced.pair.backward)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolution(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 16, 8, 8).to(memory_format=memory_format)
    v, w = parameter(1, 16, 1, 1), parameter(8, 16, 3, 3)
    traced = trace(lambda x, v, w: F.conv2d(torch.sin(x + v), w, padding=1).square(), x, v, w)
    assert [row.op for row in traced.rows() if row.is_layer_input] == ["sin"]
    run_passes(traced.pair, prune_layer_inputs(traced))
    _, (grad_v, grad_w) = traced.run()
    h = torch.sin(x + v)
    y = F.conv2d(h, w, padding=1)
    (exact_v,) = torch.autograd.grad(y.square().sum(), v, retain_graph=True)
    (expected_w,) = torch.autograd.grad(F.conv2d(pruned(h.detach()), w, padding=1), w, 2 * y.detach())
    torch.testing.assert_close(grad_w, expected_w, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad_v, exact_v, rtol=1e-5, atol=1e-4)


def test_columns_of_a_transposed_input_are_decoded_first() -> None:
    x, w = torch.randn(64, 48), parameter(32, 64)
    traced = trace(lambda x, w: F.linear(torch.sin(x).t(), w).square(), x, w)
    run_passes(traced.pair, prune_layer_inputs(traced))
    assert "densify" in text(traced.pair.backward)
    _, (grad_w,) = traced.run()
    h = torch.sin(x)
    y = F.linear(h.t(), w)
    (expected,) = torch.autograd.grad(F.linear(pruned(h).t(), w), w, 2 * y.detach())
    torch.testing.assert_close(grad_w, expected, rtol=1e-5, atol=1e-5)


def test_products_of_attention_are_no_weight_gradients() -> None:
    x, w, u = torch.randn(16, 32), parameter(32, 32), parameter(32, 32)

    def attend(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        q, k = torch.sin(x @ w), torch.sin(x @ u)
        return (q @ k.t()).square()

    traced = trace(attend, x, w, u)
    weights = WeightGrads(traced.pair.backward.graph, traced.pair.input_roles)
    found = {slot.source.name: len(weights.of(slot.placeholder)) for slot in traced.pair.slots}
    assert any(name.startswith("sin") for name in found)
    assert not any(count for name, count in found.items() if name.startswith("sin"))


def test_what_a_pointwise_operator_reads_too_is_no_layer_input() -> None:
    x, w = torch.randn(16, 64), parameter(64, 64)
    traced = trace(lambda x, w: (F.linear(torch.sin(x @ w), w)).square(), x, w)
    assert [row.op for row in traced.rows() if row.is_layer_input and row.role == "activation"] == ["sin"]
    traced = trace(lambda x, w: F.linear(torch.exp(x @ w), w).square(), x, w)
    # The exponential's own gradient reads it.
    assert not any(row.is_layer_input for row in traced.rows() if row.op == "exp")


def test_gradient_handed_to_an_earlier_graph_is_none_of_a_weight() -> None:
    x = torch.randn(16, 64)
    boundary = torch.randn(32, 64, requires_grad=True) * 1.0
    traced = trace(lambda x, w: F.linear(torch.sin(x), w).square(), x, boundary)
    assert not any(row.is_layer_input for row in traced.rows())


def test_mostly_zero_rows_store_exactly_their_share() -> None:
    x, w = torch.randn(8, 256), parameter(16, 256)
    x[:, 13:] = 0
    traced = trace(lambda x, w: F.linear(F.hardtanh(x, -3, 3) * 1.0, w).square(), x, w)
    plan = prune_layer_inputs(traced)
    assert any(decision.action is Action.SPARSIFY for decision in plan.values())
    run_passes(traced.pair, plan)
    values = [n.meta["val"] for n in traced.pair.forward.graph.nodes if "getitem_1" in n.name]
    assert [tuple(value.shape) for value in values] == [(8 * 51,)]


def test_nothing_changes_without_a_decision_to_prune() -> None:
    x, w = torch.randn(16, 64), parameter(32, 64)
    traced = trace(lambda x, w: F.linear(torch.sin(x), w).square(), x, w)
    before = text(traced.pair.forward), text(traced.pair.backward)
    sparsify_linear(traced.pair, traced.keep_all())
    assert (text(traced.pair.forward), text(traced.pair.backward)) == before


def test_running_twice_raises() -> None:
    x, w = torch.randn(16, 64), parameter(32, 64)
    traced = trace(lambda x, w: F.linear(torch.sin(x), w).square(), x, w)
    plan = prune_layer_inputs(traced)
    sparsify_linear(traced.pair, plan)
    with pytest.raises(AssertionError):
        sparsify_linear(traced.pair, plan)


def test_a_row_without_a_decision_raises() -> None:
    x, w = torch.randn(16, 64), parameter(32, 64)
    traced = trace(lambda x, w: F.linear(torch.sin(x), w).square(), x, w)
    with pytest.raises(KeyError):
        sparsify_linear(traced.pair, Plan())
