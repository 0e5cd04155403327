"""verify, and the runner that calls it after every pass."""

from collections.abc import Callable

import pytest
import torch

from actcompile.passes import PassError, run_passes
from actcompile.passes._fx import GraphPair, call
from actcompile.passes.insert_codecs import insert_codecs
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


BREAKS = [
    (drop_an_output, "the forward's outputs are not what the slots say"),
    (swap_placeholders, "the backward's placeholders are not what the slots say"),
    (change_dtype, "is sent, torch.float64 expected"),
    (change_shape, "expected"),
    (decode_in_the_forward, "the forward decodes nothing"),
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
