"""Tests of the pass that computes the backward of a picked row for that row alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import actcompile
from actcompile.passes.drop_zero_rows import drop_zero_rows

from ..models import bert, relative_error
from .pairs import text, trace, trace_joint

BATCH, TOKENS, WIDTH = 3, 5, 8


def parameter(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def encode(x: Tensor, up: Tensor, bias: Tensor, down: Tensor, gain: Tensor) -> Tensor:
    """The last half of an encoder's layer."""
    y = F.linear(F.gelu(F.linear(x, up, bias)), down)
    return F.layer_norm(y + x, (WIDTH,), gain)


INPUTS = (parameter(BATCH, TOKENS, WIDTH), parameter(16, WIDTH), parameter(16), parameter(WIDTH, 16), parameter(WIDTH))

PICKS: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda y: y[:, 0],
    "last": lambda y: y[:, -1],
    "relu": lambda y: F.relu(y[:, 2]),
    "heads": lambda y: y.view(BATCH, TOKENS, 2, 4)[:, 1],
    "sample": lambda y: y[1],
    "feature": lambda y: y[..., 3],
    "two": lambda y: y[:, 0] * y[:, 3],
}


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_gradients_are_those_of_eager(pick: str, recompute: str) -> None:
    def model(*inputs: Tensor) -> Tensor:
        return torch.tanh(PICKS[pick](encode(*inputs)))

    _, found = trace(model, *INPUTS, recompute=recompute).run()
    exact = torch.autograd.grad(model(*INPUTS).sum(), INPUTS)
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_only_the_picked_row_is_saved() -> None:
    traced = trace(lambda *inputs: torch.tanh(encode(*inputs)[:, 0]), *INPUTS)
    saved = [row for row in traced.rows() if row.role == "activation"]
    assert saved
    assert all(row.numel <= BATCH * 16 for row in saved)


def test_what_a_picked_row_is_multiplied_with_is_computed_for_it_alone() -> None:
    """Neither graph computes a whole derivative of gelu for one row of it."""
    traced = trace(lambda *inputs: torch.tanh(encode(*inputs)[:, 0]), *INPUTS)
    forward, backward = (
        [
            node.meta["val"].shape
            for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
        ]
        for module in (traced.pair.forward, traced.pair.backward)
    )
    assert (forward, backward) == ([], [(BATCH, 1, 16)])


def test_products_of_weights_have_as_many_rows_as_samples() -> None:
    joint, _ = trace_joint(lambda *inputs: torch.tanh(encode(*inputs)[:, 0]), *INPUTS)
    drop_zero_rows(joint)
    products = joint.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    shapes = [[tuple(node.meta["val"].shape) for node in product.all_input_nodes] for product in products]
    # The forward's product, and of both layers the gradients of input and weight.
    assert shapes[1:] == [
        [(WIDTH, BATCH), (BATCH, 16)],
        [(BATCH, WIDTH), (WIDTH, 16)],
        [(BATCH, 16), (16, WIDTH)],
        [(16, BATCH), (BATCH, WIDTH)],
    ]


def test_a_gradient_of_all_rows_is_put_together_where_it_is_needed() -> None:
    def model(*inputs: Tensor) -> Tensor:
        y = encode(*inputs)
        return torch.tanh(y[:, 0]).sum() + y.square().sum()

    traced = trace(model, *INPUTS)
    _, found = traced.run()
    for got, expected in zip(found, torch.autograd.grad(model(*INPUTS), INPUTS), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_graph_that_picks_nothing_stays_as_it_is() -> None:
    joint, _ = trace_joint(lambda *inputs: torch.tanh(encode(*inputs)), *INPUTS)
    before = text(joint)
    drop_zero_rows(joint)
    assert text(joint) == before


def test_running_twice_equals_once() -> None:
    joint, _ = trace_joint(lambda *inputs: torch.tanh(encode(*inputs)[:, 0]), *INPUTS)
    drop_zero_rows(joint)
    once = text(joint)
    drop_zero_rows(joint)
    assert text(joint).count("= select_scatter(") == once.count("= select_scatter(") == 1
    assert text(joint).count("= mm(") == once.count("= mm(")


def test_a_classifier_saves_less_and_its_rows_keep_their_modules() -> None:
    torch.manual_seed(0)
    task = bert()
    exact = task.gradients()
    call = torch.compile(task.model, backend="act", options={"bits": 32, "recompute": "none", "lowering": "eager"})
    assert relative_error(task.gradients(call), exact) < 1e-6
    report = actcompile.report(task.model)
    last = [row for row in report.rows if row.module.startswith("bert.encoder.layer.1.output") and row.counts]
    assert last
    assert all(row.shape[0] * 48 > row.nbytes // 4 // row.shape[-1] for row in last)
    assert report.saved_nbytes < 0.9 * report.baseline_nbytes


def test_statistics_of_the_picked_row_stay_exact() -> None:
    torch.manual_seed(0)
    task = bert()
    options = {"bits": 4, "min_numel": 0, "lowering": "eager"}
    task.gradients(torch.compile(task.model, backend="act", options=options))
    rows = [row for row in actcompile.report(task.model).rows if row.op == "div" and row.shape == (8, 1, 1)]
    assert len(rows) == 2
    assert all(row.action == "keep" and "statistic" in row.reason for row in rows)
