"""Where the batch lies, and backwards for parts of it, against the whole backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actcompile._batch import find_batch
from actcompile._slices import Part, cut, samples_meet, slice_backward
from actcompile.passes._fx import call
from actcompile.plan import Role

from ..passes.pairs import trace

IOTA = torch.ops.prims.iota.default
BATCH = 6
IDS = torch.randint(16, (BATCH, 5))
X = torch.randn(BATCH, 5, 8)


def mlp(w: Tensor, x: Tensor) -> Tensor:
    return F.layer_norm(F.gelu(x.flatten(0, 1) @ w).view(BATCH, 5, 8), (8,)).square().mean()


def attention(w: Tensor, x: Tensor) -> Tensor:
    q, k, v = (part.view(BATCH, 5, 2, 4).transpose(1, 2) for part in (x @ w.repeat(1, 3)).split(8, dim=-1))
    return (F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(-1, 8) @ w).tanh().sum()


def images(w: Tensor, x: Tensor) -> Tensor:
    kernel = w.view(4, 1, 4, 4)[:, :, :3, :3]
    return F.max_pool2d(torch.conv2d(x.view(BATCH, 1, 5, 8), kernel, padding=1).relu(), 2).mean((2, 3)).exp().sum(0)[1]


def classes(w: Tensor, ids: Tensor) -> Tensor:
    hidden = F.embedding(ids, w.repeat(2, 1)) + w[:5]
    return F.cross_entropy((hidden @ w).view(-1, 8), ids.view(-1) % 8)


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize(
    ("function", "x"),
    [(mlp, X), (attention, X), (images, X), (classes, IDS)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_gradients_of_parts_add_up(function: Callable[..., Tensor], x: Tensor, count: int) -> None:
    traced = trace(function, torch.randn(8, 8, requires_grad=True), x)
    found = find_batch(traced.pair)
    assert found is not None
    size, dims = found
    assert size == BATCH
    for module in (traced.pair.forward, traced.pair.backward):
        module.recompile()
    outputs = traced.pair.forward(*(value.detach() for value in traced.inputs))
    saved = outputs[len(traced.pair.user_outputs) :]
    whole = traced.pair.backward(*saved, torch.ones(()))[0]
    sliced = slice_backward(traced.pair, size, dims, count)
    module = torch.fx.GraphModule(traced.pair.backward, sliced.graph)
    names = [node.name for node in sliced.graph.find_nodes(op="placeholder")]
    total = torch.zeros(8, 8)
    for index in range(count):
        part = Part(index * (size // count), size // count, size)
        given = dict(zip(names, [*saved, torch.ones(())], strict=True))
        total += module(*(cut(v, dims[n], part) if n in dims else v for n, v in given.items()))[0]
    torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-5)
    assert not samples_meet(traced.pair.backward.graph, dims)


def normalized(w: Tensor, x: Tensor) -> Tensor:
    y = (x @ w).flatten(0, 1)
    return F.batch_norm(y, None, None, training=True).exp().sum()


def test_samples_meet_in_batch_normalization() -> None:
    traced = trace(normalized, torch.randn(8, 8, requires_grad=True), X)
    found = find_batch(traced.pair)
    assert found is None or samples_meet(traced.pair.backward.graph, found[1])


def contrastive(w: Tensor, x: Tensor) -> Tensor:
    y = torch.tanh(x.flatten(1) @ w.repeat(5, 1))
    return F.cross_entropy(y @ y.t(), torch.arange(BATCH))


def shuffled(w: Tensor, x: Tensor) -> Tensor:
    return (torch.tanh(x @ w)[torch.tensor([3, 1, 2, 0, 5, 4])] * x).sum()


def flipped(w: Tensor, x: Tensor) -> Tensor:
    return (torch.tanh(x @ w).flip(0) * x).sum()


def summed_up(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh((x @ w).cumsum(0)).square().sum()


def halves(w: Tensor, x: Tensor) -> Tensor:
    first, second = torch.tanh(x @ w).chunk(2)
    return (first * second).sum()


def shifted(w: Tensor, x: Tensor) -> Tensor:
    y = torch.tanh(x @ w)
    return (y[1:] * y[:-1]).sum()


def both_ways(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(torch.cat([x @ w, -x @ w])).square().sum()


def sequence_first(w: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(x.transpose(0, 1).reshape(-1, 8) @ w).view(5, BATCH, 8).mean(0).square().sum()


def graph_nodes(w: Tensor, x: Tensor) -> Tensor:
    edges = torch.tensor([[0, 1, 2], [3, 4, 5]])
    y = torch.tanh(x @ w)
    return torch.zeros_like(y).index_add(0, edges[0], y[edges[1]]).square().sum()


@pytest.mark.parametrize(
    "function", [contrastive, shuffled, flipped, summed_up, halves, shifted, both_ways, graph_nodes, sequence_first]
)
def test_mixed_samples_are_refused(function: Callable[..., Tensor], capfd: pytest.CaptureFixture[str]) -> None:
    traced = trace(function, torch.randn(8, 8, requires_grad=True), X)
    assert traced.pair.roles[next(iter(traced.pair.roles))] is Role.PARAMETER
    assert find_batch(traced.pair) is None
    assert not capfd.readouterr().err


def picked(w: Tensor, x: Tensor) -> Tensor:
    samples, positions = torch.arange(BATCH)[:, None], torch.arange(5)[None]
    return (torch.tanh(x @ w)[samples, positions].exp() * 3).sum()


@pytest.mark.parametrize("is_number", [False, True])
def test_numbers_of_samples_in_the_backward_are_positions(is_number: bool) -> None:
    """Of some samples alone they pick these; what is computed from the numbers themselves would be wrong."""
    traced = trace(picked, torch.randn(8, 8, requires_grad=True), X)
    forward, backward = traced.pair.forward.graph, traced.pair.backward.graph
    nodes = {node.name: node for node in forward.nodes}
    saved = [node for node in backward.find_nodes(op="placeholder") if node.name.startswith("unsqueeze")]
    (expand,) = backward.find_nodes(op="call_function", target=torch.ops.aten.expand.default)
    with backward.inserting_before(expand):
        for node in saved:
            iota = backward.node_copy(nodes[node.name].args[0])  # type: ignore[arg-type]
            again = backward.node_copy(nodes[node.name], {nodes[node.name].args[0]: iota}.__getitem__)  # type: ignore[arg-type]
            node.replace_all_uses_with(again)
            if is_number and iota.args[0] == BATCH:
                call(backward, torch.ops.aten.mul.Tensor, iota, 2)
    found = find_batch(traced.pair)
    assert (found is None) is is_number
    if found is not None:
        sliced = slice_backward(traced.pair, BATCH, found[1], 3)
        lengths = [node.args[0] for node in sliced.graph.find_nodes(op="call_function", target=IOTA)]
        assert sorted(lengths) == [2, 5]
