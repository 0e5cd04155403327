"""place_codecs: encoders early, decoders and recomputation late."""

import torch
from torch import fx

from actcompile.passes import PIPELINE, run_passes
from actcompile.passes._fx import tangent_dependent
from actcompile.passes.insert_codecs import insert_codecs
from actcompile.passes.place_codecs import DECODERS, ENCODERS, place_codecs
from actcompile.plan import Action, Decision, Plan

from .pairs import Traced, text, trace

QUANTIZE = Decision(Action.QUANTIZE, "test", bits=4, group_size=32)


def stack(depth: int = 4) -> Traced:
    def function(w: torch.Tensor, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for _ in range(depth):
            x = x + ((x @ w) * gate) @ w
        return x

    return trace(
        function,
        (torch.randn(16, 16) / 4).requires_grad_(),
        torch.ones(16, requires_grad=True),
        torch.randn(8, 16),
        recompute="cheap",
    )


def quantized(traced: Traced, *ops: str) -> Traced:
    plan = traced.keep_all(**dict.fromkeys(ops, QUANTIZE))
    insert_codecs(traced.pair, plan)
    place_codecs(traced.pair, plan)
    return traced


def positions(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: position for position, node in enumerate(graph.nodes)}


def test_encoders_follow_what_they_read() -> None:
    traced = quantized(stack(), "mm")
    encoders = [node for node in traced.pair.forward.graph.nodes if node.target in ENCODERS]
    assert len(encoders) > 3
    for encoder in encoders:
        assert encoder.prev is encoder.args[0]


def test_what_is_computed_for_an_encoder_comes_early_too() -> None:
    """Autograd transposes what it saves for a matrix product at the end of the forward."""

    def function(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(torch.sin(x @ w).exp() @ w) @ w

    traced = trace(function, (torch.randn(16, 16) / 4).requires_grad_(), torch.randn(8, 16))
    plan = Plan({**traced.keep_all(), "/permute": QUANTIZE})
    insert_codecs(traced.pair, plan)
    names = [node.name for node in traced.pair.forward.graph.nodes]
    assert names.index("quantize_default") > names.index("mm_2")
    before = traced.run()
    place_codecs(traced.pair, plan)
    names = [node.name for node in traced.pair.forward.graph.nodes]
    start = names.index("sin_1")
    assert names[start + 1 : start + 3] == ["permute", "quantize_default"]
    torch.testing.assert_close(traced.run(), before, rtol=0, atol=0)


def test_decoders_come_right_before_their_first_user() -> None:
    traced = quantized(stack(), "mm")
    graph = traced.pair.backward.graph
    order, gradients = positions(graph), tangent_dependent(graph)
    decoders = [node for node in graph.nodes if node.target in DECODERS]
    assert len(decoders) == 4
    for decoder in decoders:
        chain = decoder.next
        while chain not in gradients:
            chain = chain.next
        # What lies between a decoding and the next operator on a gradient feeds that operator.
        between = [node for node in graph.nodes if order[decoder] < order[node] < order[chain]]
        assert {decoder, *between} & set(chain.all_input_nodes), decoder
        assert len(between) <= 2, decoder


def test_numbers_are_the_same() -> None:
    traced = stack()
    plan = traced.keep_all(mm=QUANTIZE)
    insert_codecs(traced.pair, plan)
    before = traced.run()
    place_codecs(traced.pair, plan)
    torch.testing.assert_close(traced.run(), before, rtol=0, atol=0)


def test_far_users_get_a_decoding_of_their_own() -> None:
    def function(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = x @ w
        z = y.square()
        for _ in range(8):
            z = torch.tanh(z @ w)
        # The backward reads y at its beginning, and again at its end.
        return z * y

    traced = quantized(trace(function, torch.randn(16, 16, requires_grad=True), torch.randn(8, 16)), "mm")
    graph = traced.pair.backward.graph
    order = positions(graph)
    codes = next(node for node in graph.nodes if node.name == "mm_part0")
    early, late = sorted(codes.users, key=order.__getitem__)
    assert order[late] - order[early] > 20
    (user,) = late.users
    assert user.target is torch.ops.aten.pow.Tensor_Scalar


def test_untouched_graph_is_unchanged() -> None:
    traced = trace(lambda w, x: torch.tanh(x @ w), torch.randn(8, 8, requires_grad=True), torch.randn(4, 8))
    before = text(traced.pair.forward), text(traced.pair.backward)
    place_codecs(traced.pair, traced.keep_all())
    assert (text(traced.pair.forward), text(traced.pair.backward)) == before


def test_running_twice_equals_once() -> None:
    traced = quantized(stack(), "mm")
    once = text(traced.pair.forward), text(traced.pair.backward)
    place_codecs(traced.pair, Plan())
    assert (text(traced.pair.forward), text(traced.pair.backward)) == once


def test_whole_pipeline_keeps_the_numbers_close() -> None:
    traced = stack()
    exact = traced.run()
    run_passes(traced.pair, traced.keep_all(mm=QUANTIZE), PIPELINE)
    outputs, gradients = traced.run()
    torch.testing.assert_close(outputs, exact[0], rtol=0, atol=0)
    for noisy, gradient in zip(gradients, exact[1], strict=True):
        assert 0 < (noisy - gradient).norm() < 0.2 * gradient.norm()
