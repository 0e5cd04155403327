"""What all of a backward passes through, and how much samples count there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from actcompile._weights import bottleneck, squares

from ..passes.pairs import trace


def classifier(w: Tensor, x: Tensor) -> Tensor:
    return -F.log_softmax((x @ w).tanh() @ w, -1)[:, 0].sum()


def body(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w).tanh() @ w


def two_results(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    y = (x @ w).tanh()
    return y @ w, y * 2


def joined_results(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ w
    return y.sin(), y.cos()


def bottleneck_of(function: Callable[[Tensor, Tensor], object]) -> tuple[fx.Node | None, fx.Graph]:
    graph = trace(function, torch.randn(8, 8, requires_grad=True), torch.randn(4, 8)).pair.backward.graph
    samples = [node for node in graph.nodes if node.op != "output" and node.meta["val"].shape[:1] == (4,)]
    return bottleneck(graph, {node.name: 0 for node in samples}), graph


def test_gradient_of_logits() -> None:
    node, graph = bottleneck_of(classifier)
    products = graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert node is not None
    assert {user.target for user in node.users} <= {torch.ops.aten.mm.default, torch.ops.aten.permute.default}
    assert node.meta["val"].shape == (4, 8) and node not in products


def test_loss_outside_the_graph() -> None:
    node, _ = bottleneck_of(body)
    assert node is not None and node.op == "placeholder" and "tangents" in node.name


def test_of_two_results_neither_is_all() -> None:
    node, _ = bottleneck_of(two_results)
    assert node is None


def test_where_two_results_join() -> None:
    node, _ = bottleneck_of(joined_results)
    assert node is not None and node.target is torch.ops.aten.add.Tensor


@pytest.mark.parametrize("dim", [0, 1])
def test_squares(dim: int) -> None:
    value = torch.arange(8.0).view(2, 4)
    expected = {0: [14.0, 126.0], 1: [0 + 1 + 16 + 25.0, 4 + 9 + 36 + 49.0]}
    assert squares(value, dim, 2) == pytest.approx(expected[dim])
