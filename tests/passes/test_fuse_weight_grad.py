"""fuse_weight_grad: what is rewritten, what is left alone, and that gradients stay the same."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.functional import linear

import actcompile
from actcompile import backend
from actcompile.passes._fx import call
from actcompile.passes.fuse_weight_grad import fuse_weight_grad
from actcompile.passes.insert_codecs import insert_codecs
from actcompile.plan import Action, Decision, Plan, Role
from actcompile.triton_kernels._weight_grad_times import Product, Times, measure

from .pairs import Traced, text, trace

aten = torch.ops.aten
dequantize = torch.ops.actcompile.dequantize.default

PARTS = "sin_part0, sin_part1, sin_part2, 4, 64"


class Table:
    """A decision function that notes what it is asked."""

    def __init__(self, answer: bool = True) -> None:
        self.answer = answer
        self.asked: list[tuple[Product, ...]] = []

    def __call__(self, products: Sequence[Product], device: torch.device) -> bool:
        self.asked.append(tuple(products))
        return self.answer


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def quantized(function: Callable[..., Any], *inputs: Tensor, group_size: int = 64) -> Traced:
    """The pair with every activation in 4 bits."""
    traced = trace(function, *inputs)
    codes, exact = Decision(Action.QUANTIZE, "test", bits=4, group_size=group_size), Decision(Action.KEEP, "test")
    rows = traced.rows()
    insert_codecs(traced.pair, Plan({row.key: codes if row.role is Role.ACTIVATION else exact for row in rows}))
    return traced


def fused(traced: Traced) -> str:
    """The backward after the pass; its gradients stay, and a second run changes nothing."""
    before, table = traced.run(), Table()
    fuse_weight_grad(traced.pair, Plan(), table)
    traced.pair.backward.graph.lint()
    after = traced.run()
    torch.testing.assert_close(after, before)
    assert [gradient.stride() for gradient in after[1]] == [gradient.stride() for gradient in before[1]]
    rewritten = text(traced.pair.backward)
    again = Table()
    fuse_weight_grad(traced.pair, Plan(), again)
    assert text(traced.pair.backward) == rewritten and not again.asked
    assert table.asked
    return rewritten


def unchanged(traced: Traced, answer: bool = True) -> Table:
    """The pass leaves the backward alone."""
    before, table = text(traced.pair.backward), Table(answer)
    fuse_weight_grad(traced.pair, Plan(), table)
    assert text(traced.pair.backward) == before
    return table


def test_linear() -> None:
    traced = quantized(lambda w, x: linear(x.sin(), w), weight(8, 64), torch.randn(16, 64))
    assert fused(traced) == "\n".join(
        [
            "sin_part0 = input",
            "sin_part1 = input",
            "sin_part2 = input",
            "tangents_1 = input",
            f"quantized_weight_grad_default = quantized_weight_grad(tangents_1, {PARTS}, 64, False)",
            "return [quantized_weight_grad_default, None, None]",
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_with_bias_in_three_dimensions(dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, 64, dtype=dtype)
    traced = quantized(lambda w, b, x: linear(x.sin(), w, b), weight(8, 64, dtype=dtype), weight(8, dtype=dtype), x)
    backward = fused(traced)
    parts = PARTS.replace("sin", "view")
    assert "view_2 = view(tangents_1, [16, 8])" in backward
    assert f"quantized_weight_grad_default = quantized_weight_grad(view_2, {parts}, 64, False)" in backward
    assert "dequantize" not in backward and "mm(" not in backward and "permute" not in backward


def test_transposed_weight() -> None:
    """A layer that keeps its weight as [in_features, out_features]."""
    traced = quantized(lambda w, b, x: torch.addmm(b, x.sin(), w), weight(64, 8), weight(8), torch.randn(16, 64))
    backward = fused(traced)
    parts = PARTS.replace("sin", "permute")
    assert f"quantized_weight_grad_default = quantized_weight_grad(tangents_1, {parts}, 64, True)" in backward
    assert "mm(" not in backward


@pytest.mark.parametrize("by_token", [True, False])
def test_stored_in_other_dimensions(by_token: bool) -> None:
    """Attention's output has the dimensions [batch, heads, tokens, width], and may lie in memory token by token."""
    traced = quantized(lambda w, x: linear(x.sin(), w), weight(8, 64), torch.randn(16, 64))
    graph = traced.pair.backward.graph
    (decoder,) = graph.find_nodes(op="call_function", target=dequantize)
    strides = [512, 16, 64, 1] if by_token else [512, 128, 16, 1]
    with graph.inserting_before(decoder):
        heads = call(graph, dequantize, *decoder.args[:5], [2, 4, 8, 16], strides, torch.float32)
        tokens = call(graph, aten.permute.default, heads, [0, 2, 1, 3])
        if not by_token:
            tokens = call(graph, aten.clone.default, tokens, memory_format=torch.contiguous_format)
        rows = call(graph, aten.view.default, tokens, [16, 64])
    decoder.replace_all_uses_with(rows)
    graph.eliminate_dead_code()
    if by_token:
        assert "dequantize" not in fused(traced)
    else:
        assert unchanged(traced).asked == []


def test_gradient_that_is_not_permuted() -> None:
    """The other operand is computed in the shape that the product reads."""
    traced = quantized(lambda w, x: w @ x.sin().t(), weight(8, 64), torch.randn(16, 64))
    backward = fused(traced)
    assert "permute_default = permute(tangents_1, [1, 0])\nquantized_weight_grad_default" in backward
    assert "quantized_weight_grad(permute_default, " in backward and "64, 64, False)" in backward


def test_two_layers_read_the_same_tensor() -> None:
    traced = quantized(
        lambda w, u, x: [linear(x.sin(), w), linear(x.sin(), u)], weight(8, 64), weight(24, 64), torch.randn(16, 64)
    )
    before = text(traced.pair.backward)
    assert before.count("dequantize(") == 1
    table = unchanged(traced, answer=False)
    assert [[product.out_features for product in asked] for asked in table.asked] == [[24, 8]]
    assert fused(traced).count("quantized_weight_grad(") == 2


def test_what_the_table_is_asked() -> None:
    traced = quantized(lambda w, x: linear(x.sin(), w), weight(8, 128), torch.randn(16, 128, dtype=torch.float32))
    (asked,) = unchanged(traced, answer=False).asked
    assert asked == (Product("cpu", 16, 8, 128, 4, 64, "float32", 0),)


def test_nothing_is_rewritten_on_the_cpu() -> None:
    traced = quantized(lambda w, x: linear(x.sin(), w), weight(8, 64), torch.randn(16, 64))
    before = text(traced.pair.backward)
    fuse_weight_grad(traced.pair, Plan())
    assert text(traced.pair.backward) == before


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        pytest.param(
            lambda w, x: linear(x.sin(), w).sum() + (x.sin() * w[0]).sum(), [(8, 64), (16, 64)], id="other reader"
        ),
        pytest.param(lambda w, x: linear(x.sin(), w), [(8, 96), (16, 96)], id="groups across rows"),
        pytest.param(lambda w, x: linear(x.sin().t(), w), [(8, 64), (64, 64)], id="column by column"),
        pytest.param(lambda w, x: (w @ x.sin()) @ x.sin(), [(64, 64), (64, 64)], id="operand of the gradient"),
    ],
)
def test_left_alone(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    traced = quantized(function, weight(*shapes[0]), torch.randn(shapes[1]))
    assert "dequantize" in text(traced.pair.backward)
    assert unchanged(traced).asked == []


def test_small_groups_are_left_alone() -> None:
    traced = quantized(lambda w, x: linear(x.sin(), w), weight(8, 64), torch.randn(16, 64), group_size=32)
    assert unchanged(traced).asked == []


@pytest.mark.slow
@functorch_config.patch(enable_autograd_cache=False)  # The decision is part of what the cache would hand over.
def test_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way through Inductor, with the reference in place of the kernel, and the norm in place of the time."""
    pytest.importorskip("triton")
    monkeypatch.setattr("triton.testing.do_bench", lambda run, return_mode: run().norm().item())
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    table = Table()
    found: list[Times] = []

    def pays(products: Sequence[Product], device: torch.device) -> bool:
        # Real tensors are measured, though the graph is one of fake tensors.
        found.extend(measure(product, device) for product in products)
        return table(products, device)

    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
    x, gradients = torch.randn(32, 64), []
    for fuse in (fuse_weight_grad, functools.partial(fuse_weight_grad, pays=pays)):
        monkeypatch.setattr(backend, "fuse_weight_grad", fuse)
        torch._dynamo.reset()
        model.zero_grad()
        compiled = torch.compile(model, backend="act", options={"bits": 4, "min_numel": 1, "seed": 1, "auto": False})
        actcompile.set_rng_state({"position": 0})
        compiled(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert table.asked == [(Product("cpu", 32, 64, 256, 4, 256, "float32", 0),)]
    ((inside, apart, decode),) = found
    assert inside == pytest.approx(apart) and decode > 0
