"""What a legal pair of graphs is, checked after every pass."""

from torch import fx

from actcompile.plan import Plan

from ._fx import GraphPair, graph_outputs
from .place_codecs import DECODERS, ENCODERS, OFFLOAD, RELOAD


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
            assert sent.device == got.device, f"{slot.key}: it is sent on {sent.device}, expected on {got.device}"
    _check_sides(pair.forward.graph, DECODERS | {RELOAD}, "forward decodes")
    _check_sides(pair.backward.graph, ENCODERS | {OFFLOAD}, "backward encodes")
    _check_reloads(pair)


def _check_sides(graph: fx.Graph, forbidden: frozenset[object], rule: str) -> None:
    for node in graph.nodes:
        assert node.target not in forbidden, f"the {rule} nothing, found {node}"


def _check_reloads(pair: GraphPair) -> None:
    """Reloads read what ``offload`` sent, and each the ticket of the one before, so that no other order is possible."""
    copies = {
        placeholder
        for slot in pair.slots
        for output, placeholder in zip(slot.outputs, slot.placeholders, strict=True)
        if any(source.target is OFFLOAD for source in output.all_input_nodes)
    }
    before: fx.Node | None = None
    for node in pair.backward.graph.find_nodes(op="call_function", target=RELOAD, sort=True):
        hosts, _, ticket, ahead = node.args
        assert copies.issuperset([*hosts, *ahead]), f"{node} reads what no offload sent"  # type: ignore[misc]
        read = ticket.args[0] if isinstance(ticket, fx.Node) else None
        assert read is before, f"{node} follows {read}, not the reload before it, {before}"
        before = node
