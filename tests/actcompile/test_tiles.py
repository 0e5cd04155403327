"""Graphs that are interpreted a few rows at a time, against the same graphs taken whole."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from actcompile import _tiles
from actcompile._tiles import Tiling, call_node, find_tilings, ordered, run_graph
from actcompile.config import Config
from actcompile.passes import run_passes
from actcompile.passes._fx import graph_outputs
from actcompile.passes.place_codecs import DECODERS
from actcompile.planner import make_plan

from ..passes.pairs import trace

X = torch.randn(6, 4, 8)


def chain(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = (x * 2).tanh()
    return (y.exp() + w, y.sum(-1))


def views(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = (x.view(24, 8) * w).sin().view(6, 32).cos()
    return (y.view(6, 4, 8).permute(0, 2, 1) + 1, y.view(48, 4) * 3)


def expanded(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    mean = x.mean(1, keepdim=True).exp()
    return (mean.expand(6, 4, 8), (x - mean.expand(6, 4, 8)).neg())


def across_rows(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = x.exp()
    total = y.sum((0, 1))
    return (y / total, (x @ w.t().expand(8, 8)).sin().cos(), x[:4].sin() + 1)


def aliased(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = x.sin()
    return (y.unsqueeze(1), y.view(6, 32), (y.unsqueeze(-1) * 2).squeeze(-1).abs())


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "_TILE_NBYTES", 300)


def _traced(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake")(*inputs)


@pytest.mark.parametrize("function", [chain, views, expanded, across_rows, aliased])
def test_results_are_those_of_the_whole(function: Callable[..., tuple[Tensor, ...]]) -> None:
    w = torch.randn(8)
    graph = _traced(function, X, w).graph
    pieces = find_tilings(ordered(graph))
    assert any(isinstance(piece, Tiling) for piece in pieces)
    values = dict(zip(graph.find_nodes(op="placeholder"), (X, w), strict=True))
    results = run_graph(pieces, graph_outputs(graph), values, {}, call_node)
    for result, expected in zip(results, function(X, w), strict=True):
        torch.testing.assert_close(result, expected)
        assert result.stride() == expected.stride()
    left = {node for node in values if node.users} - set(graph.output_node().all_input_nodes)
    assert not left, "values that nobody reads any more are let go"


def test_only_what_is_read_behind_a_run_is_there_whole() -> None:
    graph = _traced(chain, X, torch.randn(8)).graph
    (tiling,) = find_tilings(ordered(graph))
    assert isinstance(tiling, Tiling)
    assert tiling.count == 3
    assert [node.target for node in tiling.returned] == [torch.ops.aten.add.Tensor, torch.ops.aten.sum.dim_IntList]


def test_what_is_kept_is_there_whole() -> None:
    w = torch.randn(8)
    graph = _traced(chain, X, w).graph
    kept = graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    values = dict(zip(graph.find_nodes(op="placeholder"), (X, w), strict=True))
    taken = dict.fromkeys(kept)
    pieces = find_tilings(ordered(graph), kept=kept)
    run_graph(pieces, graph_outputs(graph), values, {}, call_node, taken, lambda value: -value)
    torch.testing.assert_close(taken, {kept[0]: -(X * 2).tanh()})
    assert kept[0] not in values


def test_what_must_be_whole_is_in_no_run() -> None:
    graph = _traced(chain, X, torch.randn(8)).graph
    whole = graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default)
    pieces = find_tilings(ordered(graph), whole)
    assert whole[0] in pieces


def test_codes_are_decoded_by_parts() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return F.gelu(x @ w).square().sum()

    traced = trace(loss, torch.randn(8, 8, requires_grad=True), X)
    run_passes(traced.pair, make_plan(traced.rows(), Config(bits=8, min_numel=0)))
    graph = traced.pair.backward.graph
    saved = traced.pair.forward(*(value.detach() for value in traced.inputs))[len(traced.pair.user_outputs) :]
    names = graph.find_nodes(op="placeholder")
    pieces = find_tilings(ordered(graph))
    decoded = {n for piece in pieces if isinstance(piece, Tiling) for n in piece.nodes if n.target in DECODERS}
    assert decoded
    readers: dict[fx.Node, object] = {}
    results = run_graph(
        pieces, graph_outputs(graph), dict(zip(names, [*saved, torch.ones(())], strict=True)), readers, call_node
    )
    whole = fx.Interpreter(traced.pair.backward).run(*saved, torch.ones(()))
    torch.testing.assert_close(results[0], whole[0])
    assert set(readers) == decoded


def _product_and_chain(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return ((x.view(24, 8) @ w).view(6, 4, 8).sin() * x,)


def _product_returned(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = x.view(24, 8) @ w
    return (y.view(6, 4, 8).sin() * x, y.view(4, 48))


def _product_read_later(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    y = x.view(24, 8) @ w
    return (y.view(6, 4, 8).sin() * x, y.t() @ y)


@pytest.mark.parametrize(
    ("function", "is_reused"),
    [
        (_product_and_chain, True),
        (_product_returned, False),
        (_product_read_later, False),
        (lambda x, w: (x.view(24, 8).sin().view(6, 4, 8) * 2,), False),
    ],
)
def test_results_take_the_memory_of_what_nobody_reads_any_more(
    function: Callable[..., tuple[Tensor, ...]], is_reused: bool
) -> None:
    w = torch.randn(8, 8)
    x = X.clone()
    graph = _traced(function, x, w).graph
    products = []

    def evaluate(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        value = call_node(node, values)
        if node.target is torch.ops.aten.mm.default:
            products.append(value.data_ptr())
        return value

    values = dict(zip(graph.find_nodes(op="placeholder"), (x, w), strict=True))
    pieces = find_tilings(ordered(graph))
    assert any(isinstance(piece, Tiling) for piece in pieces)
    results = run_graph(pieces, graph_outputs(graph), values, {}, evaluate)
    torch.testing.assert_close(x, X, rtol=0, atol=0)
    for result, expected in zip(results, function(X, w), strict=True):
        torch.testing.assert_close(result, expected)
    assert (results[0].data_ptr() in products) == is_reused


def test_views_accept_other_strides_than_those_that_were_traced() -> None:
    """cuDNN's attention returns gradients in a layout of its own."""
    graph = make_fx(lambda x: x.view(2, 12))(torch.randn(2, 3, 4)).graph
    placeholder, view, _ = graph.nodes
    x = torch.randn(2, 4, 3).transpose(1, 2)
    assert torch.equal(call_node(view, {placeholder: x}), x.reshape(2, 12))
