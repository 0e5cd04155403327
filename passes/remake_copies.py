"""Makes copies of what is there anyway again in the backward. Lossless.

    forward:   c = convert(w, bfloat16);  y = mm(x, permute(c));  return y, x, c
    backward:  def backward(x, c, gy): gx = mm(gy, c)
becomes
    forward:   c = convert(w, bfloat16);  y = mm(x, permute(c));  return y, x, w
    backward:  def backward(x, w, gy): c = convert(w, bfloat16);  gx = mm(gy, c)

    1. sources     parameters, and inputs whose gradient the backward returns: autograd holds them until then. Its check
                   of versions finds whoever writes to them meanwhile
    2. operators   pointwise ones, views, concatenations and reductions: no matrix product runs twice

Never touches: what buffers and other inputs are above of, which may be written to or freed before the backward; what is
much smaller than what it was computed from; inputs that the graph writes to; what the user tagged to be saved.
"""

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from actcompile.plan import Role

from ._fx import (
    GraphPair,
    Slot,
    draws_random_numbers,
    first_user,
    graph_outputs,
    hint_nbytes,
    is_tensor,
    retire,
    size_args,
)
from ._views import ALIAS_OPS, VALUE_PRESERVING_OPS
from .held import is_value, needs_gradient
from .recompute import let_cross

aten = torch.ops.aten

# Operators in a chain; longer ones take more time than they save memory.
_MOST_NODES = 24
# What is this many times smaller than what it was computed from is stored.
_SMALL = 8

_MOVES = VALUE_PRESERVING_OPS | ALIAS_OPS | {aten.cat.default, aten.stack.default}
_REDUCTIONS = frozenset(
    {
        aten.sum.dim_IntList,
        aten.sum.default,
        aten.mean.dim,
        aten.mean.default,
        aten.amax.default,
        aten.amin.default,
        aten.linalg_vector_norm.default,
        aten.norm.ScalarOpt_dim,
    }
)
_CONVERT = torch.ops.prims.convert_element_type.default
_USER_SAVES = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


def remake_copies(pair: GraphPair) -> None:
    """Lets the backward make again what is computed from ``lasting_inputs`` alone."""
    lasting = lasting_inputs(pair)
    positions = {node: i for i, node in enumerate(pair.forward.graph.find_nodes(op="placeholder"))}
    crossing = {slot.source: slot.placeholder for slot in pair.slots}
    for slot in list(pair.slots):
        nodes = _chain(slot, lasting)
        if nodes is None:
            continue
        for node in nodes:
            if node in lasting and node not in crossing:
                crossing[node] = let_cross(pair, node, f"/input#{positions[node]}").placeholder
        retire(slot.placeholder, _again(pair, slot, nodes, dict(crossing)))
        slot.outputs, slot.placeholders = [], []
    pair.sync()


def lasting_inputs(pair: GraphPair) -> set[fx.Node]:
    """Inputs that are there, as they were, when the backward runs."""
    gradients = graph_outputs(pair.backward.graph)
    return {
        node
        for node, role in pair.roles.items()
        if role is Role.PARAMETER or (role is Role.INPUT and needs_gradient(node, gradients))
        if is_tensor(node) and all(user.target is not aten.copy_.default for user in node.users)
    }


def _chain(slot: Slot, lasting: set[fx.Node]) -> list[fx.Node] | None:
    """The nodes that compute a slot's tensor from lasting inputs, these first, or None."""
    seen: set[fx.Node] = set()
    ordered: list[fx.Node] = []

    def visit(node: fx.Node) -> bool:
        if node in seen or not is_value(node):
            return True
        seen.add(node)
        is_free = len(seen) <= _MOST_NODES and _is_cheap(node)
        if node not in lasting and not (is_free and all(map(visit, node.all_input_nodes))):
            return False
        ordered.append(node)
        return True

    if slot.source.op != "call_function" or not visit(slot.source):
        return None
    sources = [hint_nbytes(node) for node in ordered if node in lasting]
    return ordered if sources and hint_nbytes(slot.source) * _SMALL > max(sources) else None


def _is_cheap(node: fx.Node) -> bool:
    if node.op != "call_function" or node.meta.get("recompute") in _USER_SAVES or not is_tensor(node):
        return False
    if node.target in _MOVES or node.target in _REDUCTIONS or node.target is _CONVERT:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or draws_random_numbers(node):
        return False
    return torch.Tag.pointwise in node.target.tags and not node.target._schema.is_mutable


def _again(pair: GraphPair, slot: Slot, nodes: list[fx.Node], values: dict[fx.Node, fx.Node]) -> fx.Node:
    """Copies of ``nodes`` before the first user of the slot's placeholder; the last of them."""
    graph = pair.backward.graph

    def argument(node: fx.Node) -> fx.Node:
        value = node.meta.get("val")
        return size_args(pair, [value])[0] if isinstance(value, torch.SymInt) else values[node]

    with graph.inserting_before(first_user(slot.placeholder)):
        for node in nodes:
            if node.op == "call_function":
                values[node] = graph.node_copy(node, argument)
    return values[slot.source]
