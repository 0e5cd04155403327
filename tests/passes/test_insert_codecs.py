"""insert_codecs: quantize, expanded tensors, narrow integers, what it leaves alone."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from actcompile.analysis import analyze
from actcompile.passes._attention_bias import is_unaligned_bias
from actcompile.passes._fx import GraphPair
from actcompile.passes.insert_codecs import insert_codecs
from actcompile.plan import Action, Decision, Plan, Role

from .pairs import text, trace

aten = torch.ops.aten

QUANTIZE = Decision(Action.QUANTIZE, "test", bits=8, group_size=32)


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def test_codes_cross_in_place_of_the_tensor() -> None:
    traced = trace(lambda w, x: (x @ w).square(), weight(8, 8), torch.randn(16, 8))
    insert_codecs(traced.pair, traced.keep_all(mm=QUANTIZE))
    assert text(traced.pair.forward) == "\n".join(
        [
            "primals_1 = input",
            "primals_2 = input",
            "primals_3 = input",
            "mm = mm(primals_2, primals_1)",
            "quantize_default = quantize(mm, 8, 32, primals_3, 0)",
            "getitem = getitem(quantize_default, 0)",
            "getitem_1 = getitem(quantize_default, 1)",
            "getitem_2 = getitem(quantize_default, 2)",
            "pow_1 = pow(mm, 2)",
            "permute = permute(primals_2, [1, 0])",
            "return [pow_1, getitem, getitem_1, getitem_2, permute]",
        ]
    )
    assert text(traced.pair.backward) == "\n".join(
        [
            "mm_part0 = input",
            "mm_part1 = input",
            "mm_part2 = input",
            "permute = input",
            "tangents_1 = input",
            "dequantize_default = dequantize(mm_part0, mm_part1, mm_part2, 8, 32, [16, 8], [8, 1], float32)",
            "pow_2 = pow(dequantize_default, 1.0)",
            "mul = mul(pow_2, 2.0)",
            "mul_1 = mul(tangents_1, mul)",
            "mm_1 = mm(permute, mul_1)",
            "return [mm_1, None, None]",
        ]
    )


def test_gradient_is_that_of_the_rounded_tensor() -> None:
    w, x = weight(8, 8), torch.randn(16, 8)
    traced = trace(lambda w, x: (x @ w).square(), w, x)
    (exact,) = traced.run()[1]
    insert_codecs(traced.pair, traced.keep_all(mm=QUANTIZE))
    outputs, (noisy,) = traced.run()
    y = (x @ w).detach()
    torch.testing.assert_close(outputs[0], y.square(), rtol=0, atol=0)
    codes, scale, zero = torch.ops.actcompile.quantize(y, 8, 32, traced.inputs[-1], 0)
    rounded = torch.ops.actcompile.dequantize(codes, scale, zero, 8, 32, y.shape, y.stride(), y.dtype)
    torch.testing.assert_close(noisy, x.t() @ (2 * rounded))
    assert 0 < (noisy - exact).norm() < 0.02 * exact.norm()


def test_every_tensor_has_a_salt_of_its_own() -> None:
    traced = trace(lambda w, x: ((x @ w).square() @ w).square(), weight(8, 8), torch.randn(16, 8))
    insert_codecs(traced.pair, traced.keep_all(mm=QUANTIZE))
    salts = [
        node.args[-1]
        for node in traced.pair.forward.graph.find_nodes(
            op="call_function", target=torch.ops.actcompile.quantize.default
        )
    ]
    assert len(salts) == 2 and len(set(salts)) == 2


def test_keeping_everything_changes_nothing() -> None:
    traced = trace(lambda w, x: (x @ w).square(), weight(8, 8), torch.randn(16, 8))
    before = text(traced.pair.forward), text(traced.pair.backward)
    insert_codecs(traced.pair, traced.keep_all())
    assert (text(traced.pair.forward), text(traced.pair.backward)) == before


def test_running_twice_raises() -> None:
    traced = trace(lambda w, x: (x @ w).square(), weight(8, 8), torch.randn(16, 8))
    plan = traced.keep_all(mm=QUANTIZE)
    insert_codecs(traced.pair, plan)
    with pytest.raises(AssertionError):
        insert_codecs(traced.pair, plan)


def test_a_slot_without_a_decision_raises() -> None:
    traced = trace(lambda w, x: (x @ w).square(), weight(8, 8), torch.randn(16, 8))
    with pytest.raises(KeyError):
        insert_codecs(traced.pair, Plan())


def test_layout_survives() -> None:
    """Convolutions of channels_last tensors and permuted tensors come back with their strides."""
    images = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    kernel = (torch.randn(4, 4, 3, 3) / 6).to(memory_format=torch.channels_last).requires_grad_()
    traced = trace(lambda w, x: torch.conv2d(x, w).square(), kernel, images)
    (exact,) = traced.run()[1]
    insert_codecs(traced.pair, traced.keep_all(convolution=QUANTIZE))
    (decoder,) = traced.pair.backward.graph.find_nodes(
        op="call_function", target=torch.ops.actcompile.dequantize.default
    )
    source = next(node for node in traced.pair.forward.graph.nodes if node.name == "convolution")
    assert decoder.meta["val"].stride() == source.meta["val"].stride() == (64, 1, 16, 4)
    (noisy,) = traced.run()[1]
    assert (noisy - exact).norm() < 0.02 * exact.norm()


def test_expanded_dimension_is_stored_once() -> None:
    """An activation that another graph expanded arrives with a stride of 0."""
    boundary = torch.randn(4, 1, 16, requires_grad=True).expand(4, 8, 16)
    traced = trace(lambda x, y: F.gelu(x) @ y, boundary, torch.randn(16, 16))
    exact = traced.run()
    insert_codecs(traced.pair, traced.keep_all(placeholder=QUANTIZE))
    forward, backward = text(traced.pair.forward), text(traced.pair.backward)
    assert "slice_tensor = slice(primals_1, 1, 0, 1)\nquantize_default = quantize(slice_tensor, " in forward
    assert (
        "8, 32, [4, 1, 16], [16, 0, 1], float32)\nexpand_default = expand(dequantize_default, [4, 8, 16])" in backward
    )
    outputs, (noisy,) = traced.run()
    torch.testing.assert_close(outputs, exact[0], rtol=0, atol=0)
    assert 0 < (noisy - exact[1][0]).norm() < 0.02 * exact[1][0].norm()


def test_integers_are_narrowed() -> None:
    images = torch.randn(2, 3, 20, 20)
    kernel = weight(3, 3, 3, 3)

    def function(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.max_pool2d(torch.conv2d(x, w), 17, 1)

    traced = trace(function, kernel, images)
    (key,) = (slot.key for slot in traced.pair.slots if slot.source.meta["val"].dtype == torch.int64)
    outputs, gradients = traced.run()
    plan = Plan({**traced.keep_all(), key: Decision(Action.NARROW, "test", dtype=torch.int16)})
    insert_codecs(traced.pair, plan)
    # What the indices are called is up to torch.
    narrowed = re.search(
        r"convert_element_type_default = convert_element_type\((\w+), int16\)", text(traced.pair.forward)
    )
    assert narrowed is not None
    widened = f"convert_element_type_default = convert_element_type({narrowed[1]}_part0, int64)"
    assert widened in text(traced.pair.backward)
    again = traced.run()
    torch.testing.assert_close(again, (outputs, gradients), rtol=0, atol=0)


@pytest.mark.parametrize(("num_kept", "num_copies"), [(1, 1), (2, 2), (3, 0)])
def test_kept_parts_of_a_larger_tensor_are_copied_unless_they_are_all_of_it(num_kept: int, num_copies: int) -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        q, k, v = (part.view(2, 8, 2, 8).transpose(1, 2) for part in (x @ w).split(16, dim=-1))
        return F.scaled_dot_product_attention(q, k, v).square().sum()

    traced = trace(loss, torch.randn(8, 48, requires_grad=True), torch.randn(2, 8, 8))
    parts = [row.key for row in traced.rows() if row.shape == (2, 2, 8, 8) and row.op == "permute"]
    assert len(parts) == 3
    codes = Decision(Action.QUANTIZE, "test", bits=8, group_size=32)
    plan = traced.keep_all()
    insert_codecs(traced.pair, Plan({**plan, **dict.fromkeys(parts[num_kept:], codes)}))
    copied = [node for slot in traced.pair.slots for node in slot.outputs if slot.key in parts and "clone" in node.name]
    assert len(copied) == num_copies


def partitioned(forward: Callable[..., Any], backward: Callable[..., Any], x: Tensor, tangent: Tensor) -> GraphPair:
    """A pair made by hand: ``forward(x)`` is one output and what is saved, ``backward`` takes that and the tangent."""
    saved = make_fx(forward)(x)(x)[1:]
    graphs = make_fx(forward)(x), make_fx(backward)(*saved, tangent)
    return GraphPair.from_partition(*graphs, 1, 0, [Role.ACTIVATION])


def keep(pair: GraphPair) -> Plan:
    return Plan({slot.key: Decision(Action.KEEP, "test") for slot in pair.slots})


def test_repeated_part_of_a_larger_tensor_is_copied_once() -> None:
    def forward(x: Tensor) -> list[Tensor]:
        y = x.sin()
        return [y.sum(), y[:1, :8].expand(8, 8, 8)]

    with FakeTensorMode():
        pair = partitioned(forward, lambda part, tangent: [part * tangent], torch.randn(4, 16, 8), torch.tensor(2.0))
        insert_codecs(pair, keep(pair))
    pair.forward.recompile()
    pair.backward.recompile()
    x = torch.randn(4, 16, 8)
    _, copy = pair.forward(x)
    assert copy.untyped_storage().nbytes() == 8 * 8 * 4
    assert torch.equal(pair.backward(copy, torch.tensor(2.0))[0], forward(x)[1] * 2)


@pytest.mark.parametrize("is_repeated", [False, True])
@pytest.mark.parametrize(("tokens", "is_kept"), [(12, True), (16, False)])
def test_attention_biases_keep_their_aligned_rows(tokens: int, is_kept: bool, is_repeated: bool) -> None:
    """The attention of CUDA, which refuses rows of 12 elements; traced on tensors without values."""
    shape = (2, 4, tokens, tokens)

    def forward(x: Tensor) -> list[Tensor]:
        y, bias = x.sin(), F.pad(x[: 1 if is_repeated else 2], (0, 8))[..., :tokens]
        output, *rest = aten._scaled_dot_product_efficient_attention(y, y, y, bias.expand(shape), True)
        return [output, y, bias, output, *rest]

    def backward(y: Tensor, bias: Tensor, *given: Any) -> list[Tensor]:
        *results, tangent = given
        inputs = tangent, y, y, y, bias.expand(shape), *results, 0.0, [True, True, True, False]
        return [aten._scaled_dot_product_efficient_attention_backward(*inputs)[0]]

    with FakeTensorMode():
        pair = partitioned(forward, backward, torch.randn(shape), torch.randn(shape))
        (row,) = (row for row in analyze(pair) if row.op == "slice")
        assert (row.obstacle == "attention's kernel needs the padding of its rows") == is_kept
        insert_codecs(pair, keep(pair))
    (slot,) = (slot for slot in pair.slots if slot.key == row.key)
    assert (slot.outputs[0].target is aten.slice.Tensor) == is_kept


def test_looking_for_attention_biases_guards_no_sizes() -> None:
    graph = make_fx(lambda x: x.sin(), tracing_mode="symbolic")(torch.randn(6, 12)).graph
    (placeholder,) = graph.find_nodes(op="placeholder")
    assert not is_unaligned_bias(placeholder)
    assert not placeholder.meta["val"].fake_mode.shape_env.guards
