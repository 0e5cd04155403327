"""verify, and the runner that calls it after every pass."""

from collections.abc import Callable

import pytest
import torch

from actcompile.passes import PassError, run_passes
from actcompile.passes._fx import GraphPair, call, unpack_call
from actcompile.passes.insert_codecs import insert_codecs
from actcompile.passes.offload import offload_stored
from actcompile.passes.verify import verify
from actcompile.plan import Action, Decision, Plan

from .pairs import Traced, trace

QUANTIZE = Decision(Action.QUANTIZE, "test", bits=4, group_size=32)


def pair_and_plan() -> tuple[Traced, Plan]:
    traced = trace(lambda w, x: (x @ w).sin(), torch.randn(8, 8, requires_grad=True), torch.randn(16, 8))
    return traced, traced.keep_all(mm=QUANTIZE)


def drop_an_output(pair: GraphPair) -> None:
    output = pair.forward.graph.output_node()
    output.args = (tuple(output.args[0][:-1]),)  # type: ignore[index]


def swap_placeholders(pair: GraphPair) -> None:
    first, second = pair.backward.graph.find_nodes(op="placeholder")[:2]
    second.append(first)


def change_dtype(pair: GraphPair) -> None:
    placeholder = pair.slots[0].placeholders[0]
    placeholder.meta["val"] = placeholder.meta["val"].double()


def change_shape(pair: GraphPair) -> None:
    placeholder = pair.slots[0].placeholders[0]
    placeholder.meta["val"] = placeholder.meta["val"].unsqueeze(0)


def decode_in_the_forward(pair: GraphPair) -> None:
    graph = pair.forward.graph
    packed = graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[0]
    with graph.inserting_after(packed):
        mask = call(graph, torch.ops.aten.gt.Scalar, packed, 0)
    with graph.inserting_after(mask):
        codes = call(graph, torch.ops.actcompile.pack_bool.default, mask)
    with graph.inserting_after(codes):
        call(graph, torch.ops.actcompile.unpack_bool.default, codes, [16, 8])


def reload_in_the_forward(pair: GraphPair) -> None:
    graph = pair.forward.graph
    source = graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[0]
    with graph.inserting_after(source):
        hosts = call(graph, torch.ops.actcompile.offload.default, [source])
    (host,) = unpack_call(graph, hosts)
    with graph.inserting_after(host):
        call(graph, torch.ops.actcompile.reload.default, [host], torch.device("cpu"), None, [])


def reload_what_is_on_the_device(pair: GraphPair) -> None:
    graph = pair.backward.graph
    with graph.inserting_before(next(node for node in graph.nodes if node.op == "call_function")):
        call(graph, torch.ops.actcompile.reload.default, pair.slots[0].placeholders, torch.device("cpu"), None, [])


def forget_a_ticket(pair: GraphPair) -> None:
    offload_stored(pair, Plan({slot.key: Decision(Action.KEEP, "test", offload=True) for slot in pair.slots}))
    _, second = pair.backward.graph.find_nodes(op="call_function", target=torch.ops.actcompile.reload.default)
    second.update_arg(2, None)


BREAKS = [
    (drop_an_output, "the forward's outputs are not what the slots say"),
    (swap_placeholders, "the backward's placeholders are not what the slots say"),
    (change_dtype, "is sent, torch.float64 expected"),
    (change_shape, "expected"),
    (decode_in_the_forward, "the forward decodes nothing"),
    (reload_in_the_forward, "the forward decodes nothing"),
    (reload_what_is_on_the_device, "reads what no offload sent"),
    (forget_a_ticket, "follows None, not the reload before it"),
]


def test_legal_pairs_pass() -> None:
    traced, plan = pair_and_plan()
    verify(traced.pair, plan)
    insert_codecs(traced.pair, plan)
    verify(traced.pair, plan)


@pytest.mark.parametrize(("damage", "message"), BREAKS)
def test_broken_pairs_do_not(damage: Callable[[GraphPair], None], message: str) -> None:
    traced, plan = pair_and_plan()
    with pytest.raises(AssertionError, match=message):
        damage(traced.pair)
        verify(traced.pair, plan)


def test_runner_names_the_pass_and_those_before_it() -> None:
    traced, plan = pair_and_plan()

    def break_it(pair: GraphPair, plan: Plan) -> None:
        drop_an_output(pair)

    with pytest.raises(PassError, match="pass break_it failed after insert_codecs"):
        run_passes(traced.pair, plan, (insert_codecs, break_it))


def test_verify_changes_nothing() -> None:
    traced, plan = pair_and_plan()
    before = str(traced.pair.forward.graph), str(traced.pair.backward.graph)
    verify(traced.pair, plan)
    assert (str(traced.pair.forward.graph), str(traced.pair.backward.graph)) == before
