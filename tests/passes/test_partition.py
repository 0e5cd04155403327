"""partition: what is recomputed, and what is saved once instead of twice."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import actcompile
from actcompile.passes._fx import hint_nbytes

from .pairs import Traced, trace


def saved(traced: Traced) -> list[str]:
    return [slot.source.name for slot in traced.pair.slots]


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def feed_forward(w: Tensor, x: Tensor) -> Tensor:
    return F.gelu(F.layer_norm(x @ w, (64,))) @ w


def grouped(w: Tensor, x: Tensor) -> Tensor:
    keys = (x @ w).view(4, 1, 8).expand(4, 3, 8).reshape(12, 8)
    return F.gelu(keys) @ keys.t()


FUNCTIONS = {
    "feed_forward": (feed_forward, [(64, 64), (4, 64)]),
    "grouped": (grouped, [(8, 8), (4, 8)]),
    "amax": (lambda w, x: (x @ w).amax(1), [(8, 8), (4, 8)]),
    "where": (lambda w, x: torch.where(x @ w > 0, x @ w, 0.0).exp(), [(8, 8), (4, 8)]),
}


@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_numbers_are_those_of_eager(name: str, recompute: str) -> None:
    function, (weight_shape, input_shape) = FUNCTIONS[name]
    w, x = weight(*weight_shape), torch.randn(input_shape)
    traced = trace(function, w, x, recompute=recompute)
    outputs, gradients = traced.run()
    expected = function(w, x)
    torch.testing.assert_close(outputs, [expected])
    torch.testing.assert_close(gradients, list(torch.autograd.grad(expected.sum(), [w])))


def test_none_saves_what_torch_compile_saves() -> None:
    traced = trace(feed_forward, weight(64, 64), torch.randn(4, 64))
    assert saved(traced) == ["mm", "getitem_1", "rsqrt", "permute", "primals_1", "permute_2"]


def test_cheap_looks_embeddings_up_again() -> None:
    ids = torch.randint(16, (4, 8))
    for recompute, saved_again in (("none", True), ("cheap", False)):
        traced = trace(lambda w, i: F.gelu(F.embedding(i, w)), weight(16, 8), ids, recompute=recompute)
        assert any("embedding" in row.op for row in traced.rows()) == saved_again
        _, (gradient,) = traced.run()
        w = traced.inputs[0].detach().requires_grad_()
        (expected,) = torch.autograd.grad(F.gelu(F.embedding(ids, w)).sum(), [w])
        torch.testing.assert_close(gradient, expected)


def test_cheap_repeats_no_matrix_product() -> None:
    traced = trace(feed_forward, weight(64, 64), torch.randn(4, 64), recompute="cheap")
    assert saved(traced) == ["mm", "getitem_1", "rsqrt", "primals_1", "permute_2"]
    products = [n for n in traced.pair.backward.graph.nodes if n.target is torch.ops.aten.mm.default]
    # Two for each of the two in the forward, less the gradient of the input.
    assert len(products) == 3


def test_residual_stream_is_stored_not_summed_up_again() -> None:
    def function(w: Tensor, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + F.layer_norm(x, (64,)) @ w
        return x.sin()

    traced = trace(function, weight(64, 64), torch.randn(8, 64), recompute="cheap")
    products = [slot.source for slot in traced.pair.slots if slot.source.target is torch.ops.aten.mm.default]
    assert not products


def test_views_of_one_tensor_are_saved_once() -> None:
    def function(w: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        return y.view(2, 2, 8) @ v, y.square().t()

    inputs = weight(8, 8), weight(8, 6), torch.randn(4, 8)
    traced = trace(function, *inputs)
    # Both read the product, one of them through a view and its transpose; permute_4 is the input's.
    assert [slot.source.name for slot in traced.pair.slots] == ["mm", "primals_2", "permute_4"]
    outputs, gradients = traced.run()
    expected = function(*inputs)
    torch.testing.assert_close(outputs, list(expected))
    total = expected[0].sum() + expected[1].sum()
    torch.testing.assert_close(gradients, list(torch.autograd.grad(total, inputs[:2])))


def test_repeated_keys_are_saved_before_they_are_repeated() -> None:
    traced = trace(grouped, weight(8, 8), torch.randn(4, 8))
    keys = traced.pair.slots[0].source
    assert keys.name == "mm"
    assert hint_nbytes(keys) == 4 * 8 * 4


def test_permuted_parameters_are_saved_as_the_parameter() -> None:
    traced = trace(feed_forward, weight(64, 64), torch.randn(4, 64))
    assert "primals_1" in saved(traced)
    assert not [
        n for n in traced.pair.slots if n.source.name.startswith("permute") and "primals_1" in str(n.source.args)
    ]


def test_comparisons_are_made_in_the_forward() -> None:
    traced = trace(lambda w, x: (x @ w).amax(1), weight(8, 8), torch.randn(4, 8), recompute="cheap")
    assert "eq" in saved(traced)
    assert "mm" not in saved(traced)
    assert not [n for n in traced.pair.backward.graph.nodes if n.target is torch.ops.aten.eq.Tensor]


def test_regions_that_are_compiled_once_are_split_as_torch_does() -> None:
    """Their subgraphs come to the same partitioner first; what they save are rows of the graph around them."""

    @torch.compiler.nested_compile_region
    def region(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() @ torch.ones(16, 16)).cos()

    w = torch.randn(16, 16, requires_grad=True)
    x = torch.randn(8, 16)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return region(region(x @ w)).sum()

    (expected,) = torch.autograd.grad(loss(x), w)
    step = torch.compile(loss, backend="act", options={"bits": 4, "min_numel": 0, "lowering": "eager"})
    (found,) = torch.autograd.grad(step(x), w)
    torch.testing.assert_close(found, expected)
    rows = [row for row in actcompile.report().rows if row.op == "invoke_subgraph"]
    assert rows and {str(row.action) for row in rows} == {"keep"}
