"""What a legal pair of graphs is, checked after every pass."""

from torch import fx

from actcompile.plan import Plan

from ._fx import GraphPair, graph_outputs
from .place_codecs import DECODERS, ENCODERS


def verify(pair: GraphPair, plan: Plan) -> None:
    """Checks that both sides of every slot agree.

    Raises:
        AssertionError: Naming the slot that is broken.
    """
    expected = [*pair.user_outputs, *(n for slot in pair.slots for n in slot.outputs), *pair.trailing_outputs]
    assert graph_outputs(pair.forward.graph) == expected, "the forward's outputs are not what the slots say"
    placeholders = pair.backward.graph.find_nodes(op="placeholder")
    received = [*pair.symbol_placeholders, *(node for slot in pair.slots for node in slot.placeholders)]
    assert placeholders[: len(received)] == received, "the backward's placeholders are not what the slots say"
    for slot in pair.slots:
        for output, placeholder in zip(slot.outputs, slot.placeholders, strict=True):
            sent, got = output.meta["val"], placeholder.meta["val"]
            assert sent.dtype == got.dtype, f"{slot.key}: {sent.dtype} is sent, {got.dtype} expected"
            assert sent.shape == got.shape, f"{slot.key}: {sent.shape} is sent, {got.shape} expected"
    _check_sides(pair.forward.graph, DECODERS, "forward decodes")
    _check_sides(pair.backward.graph, ENCODERS, "backward encodes")


def _check_sides(graph: fx.Graph, forbidden: frozenset[object], rule: str) -> None:
    for node in graph.nodes:
        assert node.target not in forbidden, f"the {rule} nothing, found {node}"
