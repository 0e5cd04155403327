"""Tests of the pass that stores some rows of layer inputs."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import actcompile
from actcompile.passes import run_passes
from actcompile.passes.sample_rows import _matrix, sample_rows
from actcompile.plan import Action, Decision, Plan, Role

from ..models import bert, relative_error
from .pairs import Traced, text, trace
from .test_sparsify_linear import LINEAR, parameter


def sample_layer_inputs(traced: Traced, rows: float, bits: int | None = None, padded: bool = False) -> Plan:
    sampled = Decision(Action.SAMPLE, "test", rows=rows, bits=bits, group_size=bits and 256, padded=padded)
    kept = Decision(Action.KEEP, "test")
    return Plan({row.key: sampled if row.num_rows else kept for row in traced.rows()})


def mark_padding(traced: Traced) -> None:
    """Lets the first input mark padding."""
    traced.pair.roles[traced.pair.forward.graph.find_nodes(op="placeholder")[0]] = Role.PADDING


def test_rewritten_graphs_as_text() -> None:
    x, w = torch.randn(16, 64), parameter(32, 64)
    traced = trace(lambda x, w: F.linear(torch.sin(x), w).square(), x, w)
    sample_rows(traced.pair, sample_layer_inputs(traced, 0.5))
    assert "sample_rows_default = sample_rows(sin, None, 8, primals_3, 0)" in text(traced.pair.forward)
    parts = ["sin_part0", "sin_part1", "sin_part2"]
    assert [line for line in text(traced.pair.backward).splitlines() if "_part" in line] == [
        *(f"{name} = input" for name in parts),
        f"sampled_weight_grad_default = sampled_weight_grad(mul_1, {', '.join(parts)})",
    ]


def test_every_form_of_a_linear_layer_is_exact_with_all_rows_but_zeros() -> None:
    for form, linear in LINEAR.items():
        x, w = torch.randn(4, 6, 64), parameter(32, 64)
        x[1:3] = 0

        def model(x: Tensor, w: Tensor, linear=linear) -> Tensor:  # type: ignore[no-untyped-def]
            return linear(torch.sin(x), w).square()

        traced = trace(model, x, w)
        run_passes(traced.pair, sample_layer_inputs(traced, 0.5))
        assert text(traced.pair.backward).count("= sampled_weight_grad(") == 1, form
        _, (grad_w,) = traced.run()
        (exact,) = torch.autograd.grad(model(x, w).sum(), w)
        torch.testing.assert_close(grad_w, exact, rtol=1e-5, atol=1e-5)


def test_mean_over_seeds_is_the_exact_gradient() -> None:
    x, w = torch.randn(24, 64), parameter(32, 64)

    def model(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(torch.sin(x), w).square()

    traced = trace(model, x, w)
    run_passes(traced.pair, sample_layer_inputs(traced, 0.5, bits=8))
    (exact,) = torch.autograd.grad(model(x, w).sum(), w)
    draws = []
    for seed in range(200):
        traced.inputs = (*traced.inputs[:-1], torch.tensor(seed))
        draws.append(traced.run()[1][0])
    errors = torch.stack(draws) - exact
    one = errors.square().mean(0).sum().sqrt()
    assert one > 0.2 * exact.norm()
    # Independent draws leave 1 / sqrt(200) of one error; a bias would stay.
    assert errors.mean(0).norm() < 1.3 * one / 200**0.5


def test_padding_is_left_out_first_and_without_loss() -> None:
    mask, x, w = torch.ones(4, 8, dtype=torch.int64), torch.randn(4, 8, 64), parameter(32, 64)
    mask[:, 5:] = 0

    def model(mask: Tensor, x: Tensor, w: Tensor) -> Tensor:
        return F.linear(torch.sin(x), w).square() * mask.unsqueeze(2)

    traced = trace(model, mask, x, w)
    mark_padding(traced)
    run_passes(traced.pair, sample_layer_inputs(traced, 0.625, padded=True))
    assert "pack_bool" in text(traced.pair.forward)
    _, (grad_w,) = traced.run()
    (exact,) = torch.autograd.grad(model(mask, x, w).sum(), w)
    torch.testing.assert_close(grad_w, exact, rtol=1e-5, atol=1e-5)


def test_padding_with_a_gradient_comes_out_as_nan() -> None:
    mask, x, w = torch.ones(4, 8, dtype=torch.int64), torch.randn(4, 8, 64), parameter(32, 64)
    mask[:, 5:] = 0
    traced = trace(lambda mask, x, w: F.linear(torch.sin(x), w).square() + 0 * mask.sum(), mask, x, w)
    mark_padding(traced)
    run_passes(traced.pair, sample_layer_inputs(traced, 0.625, padded=True))
    _, (grad_w,) = traced.run()
    assert grad_w.isnan().all()


def test_layers_that_share_an_input_share_its_rows() -> None:
    x, weights = torch.randn(4, 8, 64), [parameter(64, 64) for _ in range(3)]
    traced = trace(lambda x, *ws: sum(F.linear(torch.sin(x), w).square() for w in ws), x, *weights)
    run_passes(traced.pair, sample_layer_inputs(traced, 0.5))
    assert text(traced.pair.forward).count("= sample_rows(") == 1
    assert text(traced.pair.backward).count("= sampled_weight_grad(") == 3


def test_convolutions_and_columns_have_no_rows() -> None:
    images, kernel = torch.randn(2, 16, 8, 8), parameter(8, 16, 3, 3)
    traced = trace(lambda x, w: F.conv2d(torch.sin(x), w).square(), images, kernel)
    assert [(row.is_layer_input, row.num_rows) for row in traced.rows() if row.op == "sin"] == [(True, 0)]
    x, w = torch.randn(64, 48), parameter(32, 64)
    traced = trace(lambda x, w: F.linear(torch.sin(x).t(), w).square(), x, w)
    assert not any(row.num_rows for row in traced.rows())


def test_padding_of_a_model_is_dropped_without_loss_and_reported() -> None:
    torch.manual_seed(0)
    task = bert()
    exact = task.gradients()
    options = {"rows": 0.92, "padding": "attention_mask", "bits": 32, "recompute": "none", "lowering": "eager"}
    found = task.gradients(torch.compile(task.model, backend="act", options=options))
    assert relative_error(found, exact) < 1e-6
    rows = [row for row in actcompile.report(task.model).rows if row.action == "sample"]
    # Of the last layer, behind its attention, one token's rows are all that is saved.
    assert len(rows) == 5
    # 384 tokens, 48 or more features: rows, and eight bytes and a bit for each.
    assert all(row.kept == "0.92 of rows" and row.stored_nbytes < 0.96 * row.nbytes for row in rows)


def test_rows_are_those_that_the_layer_reads_however_its_input_was_stored() -> None:
    x, w = torch.randn(16, 64), parameter(8, 64)
    traced = trace(lambda x, w: F.linear(torch.sin(x), w).square(), x, w)
    (source,) = traced.pair.forward.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    assert _matrix(source.graph, source, 64) is source
    assert _matrix(source.graph, source, 32).meta["val"].shape == (32, 32)


def test_padding_that_no_argument_marks_is_an_error() -> None:
    task = bert()
    options = {"rows": 0.9, "padding": "atention_mask", "lowering": "eager"}
    with pytest.raises(actcompile.ConfigError, match=r"padding must name an argument.*'atention_mask'"):
        task.gradients(torch.compile(task.model, backend="act", options=options))
