"""Computes saved tensors again in the backward. Changes numerics only where what it computes from is noisy.

    forward:   y = addmm(b, x, w);  ...;  return ..., x, y, w
    backward:  def backward(x, y, w, ...): gy = f(grad, y)
becomes
    forward:   y = addmm(b, x, w);  ...;  return ..., x, w, b
    backward:  def backward(x, w, b, ...): y = addmm(b, x, w);  gy = f(grad, y)

    1. sources       other saved tensors, as they come back, and graph inputs, which ``offer_inputs`` lets cross
    2. neighbours    tensors that are read close to each other share the operators that compute them
    3. inputs        that were offered and that nothing reads cross no longer

Never touches: what draws random numbers; comparisons, exponentials and the like, which the forward alone computes; what
the user tagged to be saved.
"""

from collections.abc import Container, Sequence

import torch
from torch import fx

from actcompile.plan import Action, Plan, Role

from ._cones import cone, cone_inputs
from ._fx import GraphPair, Slot, first_user, retire, size_args
from ._views import storage
from .place_codecs import NEARBY
from .snapshot_inputs import may_change


def recompute_saved(pair: GraphPair, plan: Plan) -> None:
    """Drops every slot that ``plan`` recomputes.

    Raises:
        KeyError: When the plan has no decision for a slot.
    """
    order = {node: position for position, node in enumerate(pair.backward.graph.nodes)}
    chosen = [slot for slot in pair.slots if plan[slot.key].action is Action.RECOMPUTE]
    chosen.sort(key=lambda slot: order[first_user(slot.placeholder)])
    dropped = {slot.source for slot in chosen}
    received = {slot.source: slot.placeholder for slot in pair.slots if slot.source not in dropped}
    cones = [_cone(slot, {*received, *dropped}, dropped) for slot in chosen]
    values = dict(received)
    last = 0
    for slot, nodes in zip(chosen, cones, strict=True):
        user = first_user(slot.placeholder)
        if order[user] - last > NEARBY:
            values = dict(received)
        last = order[user]
        _copy(pair, nodes, values, user)
        retire(slot.placeholder, values[slot.source])
        slot.outputs, slot.placeholders = [], []
    _drop_unread(pair)
    pair.sync()


def _cone(slot: Slot, given: Container[fx.Node], chosen: Container[fx.Node]) -> list[fx.Node]:
    nodes = cone(slot.source, given)
    assert nodes is not None, f"{slot.key} cannot be computed again"
    lost = [node for node in cone_inputs(nodes) if node in chosen]
    assert not lost, f"{slot.key} would be computed from {lost}, which do not cross either"
    return nodes


def _copy(pair: GraphPair, nodes: Sequence[fx.Node], values: dict[fx.Node, fx.Node], user: fx.Node) -> None:
    """Adds copies of ``nodes`` before ``user``, and to ``values``, where they are not there yet."""
    graph = pair.backward.graph

    def argument(node: fx.Node) -> fx.Node:
        value = node.meta.get("val")
        return size_args(pair, [value])[0] if isinstance(value, torch.SymInt) else values[node]

    with graph.inserting_before(user):
        for node in nodes:
            if node not in values:
                values[node] = graph.node_copy(node, argument)


def _drop_unread(pair: GraphPair) -> None:
    for slot in pair.slots:
        if slot.outputs and slot.source.op == "placeholder" and not slot.placeholder.users:
            pair.backward.graph.erase_node(slot.placeholder)
            slot.outputs, slot.placeholders = [], []


def offer_inputs(pair: GraphPair) -> None:
    """Lets graph inputs cross that some saved tensor could be computed from; ``recompute_saved`` takes back the rest.

    They are parameters, and inputs of the caller's of which a view crosses already: no others need stay as they are
    until the backward, and of these not what the step writes.
    """
    inputs = pair.forward.graph.find_nodes(op="placeholder")
    held = {storage(slot.source) for slot in pair.slots}
    offered = {node for node in inputs if not may_change(node) and (pair.roles[node] is Role.PARAMETER or node in held)}
    crossing = {slot.source for slot in pair.slots}
    given = crossing | offered
    wanted: set[fx.Node] = set()
    for slot in pair.slots:
        if slot.source.op == "call_function":
            wanted.update(cone_inputs(cone(slot.source, given) or []))
    for position, node in enumerate(inputs):
        if node in wanted and node not in crossing:
            let_cross(pair, node, f"/input#{position}")
    pair.sync()


def let_cross(pair: GraphPair, node: fx.Node, key: str) -> Slot:
    """Adds a slot for a graph input; there is another slot."""
    other = pair.slots[-1]
    with pair.backward.graph.inserting_after(other.placeholder):
        placeholder = pair.backward.graph.placeholder(f"{node.name}_offered")
    # The argument's name; only the node's own name is made unique when it is taken.
    placeholder.target = placeholder.name
    placeholder.meta["val"] = node.meta["val"]
    if other.source in pair.descriptors:
        pair.descriptors[node] = pair.descriptors[other.source]
    slot = Slot(key, [node], [placeholder])
    pair.slots.append(slot)
    return slot
