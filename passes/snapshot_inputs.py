"""Copies, in the forward, graph inputs that may hold something else by the time of the backward. Lossless.

    forward:   y = sin(buffer);  ...;  copy_(buffer, ...);  return ..., buffer
    backward:  def backward(buffer, ...): y = sin(buffer);  gw = mm(y, grad)
becomes
    forward:   seen = clone(buffer);  y = sin(buffer);  ...;  copy_(buffer, ...);  return ..., seen
    backward:  def backward(seen, ...): y = sin(seen);  gw = mm(y, grad)

An input is copied where it crosses for the backward to read, and

    1. the step writes it   by an operator of the graph, or by what AOTAutograd runs behind the forward
    2. autograd lets go     no formula of autograd's reads it, only what is computed again does: others may write it
                            before the backward (a codebook's moving average, the next batch in the same memory), and
                            eager gradients are right

Never touches: parameters that the step does not write, the seed, and what autograd's own formulas read, since it checks
that nobody wrote these. An input that the backward writes crosses itself, too.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from actcompile.plan import Role

from ._fx import GraphPair, Slot, body_anchor, call, graph_outputs, roles_of_inputs, tangent_dependent
from ._views import is_view, storage

aten = torch.ops.aten

# Inputs that may have changed by the time of the backward carry this in their meta, and copies of them that cross.
_MAY_CHANGE = "actcompile_may_change"

# The same, of inputs that AOTAutograd writes behind the forward; from 2.15 on.
_WRITTEN_BEHIND = "aot_runtime_epilogue_input_mutation"

# What others write as they please, as far as autograd allows it.
_OTHERS_WRITE = frozenset({Role.INPUT, Role.PADDING, Role.BUFFER, Role.BOUNDARY})


def mark_changing_inputs(joint: fx.GraphModule, input_roles: Sequence[Role]) -> None:
    """Marks the inputs of ``joint`` that the backward must not read as they are then."""
    written = {*_written_in(joint.graph), *_written_behind(joint.graph)}
    dependent = tangent_dependent(joint.graph)
    for node, role in roles_of_inputs(joint.graph, input_roles).items():
        is_let_go = role in _OTHERS_WRITE and not _is_read_by_autograd(node, dependent)
        node.meta[_MAY_CHANGE] = node in written or is_let_go


def snapshot_inputs(pair: GraphPair) -> None:
    """Lets copies cross in place of marked inputs, and of views of them."""
    for slot in list(pair.slots):
        if may_change(storage(slot.source)):
            _snapshot(pair, slot)
    pair.sync()


def may_change(node: fx.Node) -> bool:
    """Whether ``node`` is a graph input that may hold something else by the time of the backward."""
    return node.op == "placeholder" and bool(node.meta.get(_MAY_CHANGE, False))


def is_snapshot(node: fx.Node) -> bool:
    """Whether ``node`` of the forward is a copy that was made of an input for the backward."""
    return node.op == "call_function" and bool(node.meta.get(_MAY_CHANGE, False))


def _snapshot(pair: GraphPair, slot: Slot) -> None:
    source, placeholder = slot.source, slot.placeholder
    is_written = any(placeholder in written_by(user) for user in placeholder.users)
    # A backward that writes the input works on it as it is then; only what is computed again reads the copy.
    readers = [user for user in placeholder.users if not is_written or user.meta.get("partitioner_tag") == "is_forward"]
    if not readers:
        return
    with pair.forward.graph.inserting_after(body_anchor(source)):
        copy = call(pair.forward.graph, aten.clone.default, source)
    copy.meta[_MAY_CHANGE] = True
    crossing = slot
    if is_written:
        crossing = Slot(f"{slot.key}/seen", [source], [placeholder])
        pair.slots.append(crossing)
    (received,) = pair.replace(crossing, [copy])
    for reader in readers:
        reader.replace_input_with(placeholder, received)
    if not is_written:
        pair.backward.graph.erase_node(placeholder)


def _written_in(graph: fx.Graph) -> Iterator[fx.Node]:
    """What operators of the forward or the backward write into."""
    for node in graph.nodes:
        yield from map(storage, written_by(node))


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that ``node`` writes into."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    given: list[tuple[Any, Any]] = list(zip(arguments, node.args, strict=False))
    given += [(argument, node.kwargs[argument.name]) for argument in arguments if argument.name in node.kwargs]
    written: list[fx.Node] = []
    for argument, value in given:
        if argument.alias_info is not None and argument.alias_info.is_write:
            fx.node.map_arg(value, written.append)
    return written


def _written_behind(graph: fx.Graph) -> Iterator[fx.Node]:
    """Inputs whose new values the forward returns, for AOTAutograd to copy into them."""
    described = graph.output_node().meta.get("desc", [None] * len(graph_outputs(graph)))
    written = {getattr(desc, "mutated_input", None) for desc in described} - {None}
    for node in graph.find_nodes(op="placeholder"):
        if node.meta.get("desc") in written or node.meta.get(_WRITTEN_BEHIND, False):
            yield node


def _is_read_by_autograd(node: fx.Node, dependent: set[fx.Node]) -> bool:
    """Whether a formula of autograd's reads ``node`` or a view of it; these have not been merged with the forward's."""
    for user in node.users:
        is_formula = user in dependent or user.meta.get("partitioner_tag") == "is_backward"
        if user.op != "output" and (is_formula or (is_view(user) and _is_read_by_autograd(user, dependent))):
            return True
    return False
