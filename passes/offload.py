"""Keeps what crosses to the backward in the host's memory meanwhile. Lossless.

    forward:   codes, scale, zero = quantize(x, ...);  ...;  return ..., codes, scale, zero
    backward:  def backward(codes, scale, zero, ...): y = f(dequantize(codes, scale, zero, ...))
becomes
    forward:   codes, scale, zero = quantize(x, ...);  hosts = offload([codes, scale, zero]);  ...;  return ..., *hosts
    backward:  def backward(*hosts, ...):
                   *(codes, scale, zero), ticket = reload(hosts, device, ticket of the reload before, next hosts)
                   y = f(dequantize(codes, scale, zero, ...))

    1. forward    a copy out starts as soon as its source exists
    2. backward   a copy comes back right before its first user, and again for users that come much later
    3. ahead      each reload names what the next ones will ask for, so that it is under way in time; through the ticket
                  they run in the order in which they are written
    4. strides    an exact tensor comes back in the layout that it had, a part of one without its gaps; an expanded
                  dimension crosses once

Never touches: rows that the plan leaves on the device. Runs last: encoders and decoders are in their places by then.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from actcompile.plan import Plan

from ..triton_kernels._layout import storage_permutation
from ._fx import GraphPair, Slot, body_anchor, call, hint, size_args, unpack_call
from ._views import dense_base
from .place_codecs import NEARBY, OFFLOAD, RELOAD, hoist_encoders

aten = torch.ops.aten

# Bytes that are under way ahead of their use, and the least number of tensors.
_AHEAD_NBYTES = 2**26
_AHEAD_COUNT = 2


@dataclass(frozen=True)
class _Stay:
    """One stretch of the backward that reads an offloaded tensor.

    ``olds`` are what its nodes read so far, ``stored`` the traced values that were copied, ``reads`` the pairs of a
    node and what it reads, in order.
    """

    slot: Slot
    olds: Sequence[fx.Node]
    stored: Sequence[torch.Tensor]
    reads: Sequence[tuple[fx.Node, fx.Node]]

    @property
    def start(self) -> fx.Node:
        """The first node that reads it."""
        return self.reads[0][0]


def offload_stored(pair: GraphPair, plan: Plan) -> None:
    """Moves every slot that ``plan`` offloads.

    Raises:
        KeyError: When the plan has no decision for a slot.
    """
    moved = [slot for slot in pair.slots if plan[slot.key].offload]
    order = _positions(pair.backward.graph)
    stays: list[_Stay] = []
    replaced: list[fx.Node] = []
    for slot in moved:
        olds = list(slot.placeholders)
        replaced.extend(olds)
        stored = _copy_out(pair, slot)
        stays.extend(_Stay(slot, olds, stored, reads) for reads in _stretches(olds, order))
    hoist_encoders(pair)
    _copy_back(pair, sorted(stays, key=lambda stay: order[stay.start]))
    for old in replaced:
        pair.backward.graph.erase_node(old)
    pair.sync()


def _copy_out(pair: GraphPair, slot: Slot) -> list[torch.Tensor]:
    """Lets copies of what ``slot`` holds cross instead, and returns the traced values that they are made of."""
    graph, sources = pair.forward.graph, list(slot.outputs)
    assert not any(above.target is OFFLOAD for node in sources for above in node.all_input_nodes), slot
    if len(sources) == 1:
        sources = [dense_base(graph, sources[0])]
    # Several are the results of one operator: the last of them to be taken out ends it.
    with graph.inserting_after(body_anchor(sources[-1])):
        copies = call(graph, OFFLOAD, sources)
    pair.replace(slot, unpack_call(graph, copies))
    return [node.meta["val"] for node in sources]


def _stretches(olds: Sequence[fx.Node], order: Mapping[fx.Node, int]) -> list[list[tuple[fx.Node, fx.Node]]]:
    """What reads ``olds``, in order, split where users lie far apart."""
    stretches: list[list[tuple[fx.Node, fx.Node]]] = []
    last = None
    reads = [(user, old) for old in olds for user in old.users]
    for user, old in sorted(reads, key=lambda read: order[read[0]]):
        if last is None or order[user] - last > NEARBY:
            stretches.append([])
        stretches[-1].append((user, old))
        last = order[user]
    return stretches


def _copy_back(pair: GraphPair, stays: Sequence[_Stay]) -> None:
    """Inserts a reload before every stretch, and lets its nodes read that."""
    graph = pair.backward.graph
    ticket: fx.Node | None = None
    for position, stay in enumerate(stays):
        device, ahead = stay.stored[0].device, _ahead(stay, stays[position + 1 :])
        with graph.inserting_before(stay.start):
            *flats, ticket = unpack_call(graph, call(graph, RELOAD, stay.slot.placeholders, device, ticket, ahead))
            values = [_in_shape(pair, *parts) for parts in zip(flats, stay.stored, stay.olds, strict=True)]
        for user, old in stay.reads:
            user.replace_input_with(old, values[stay.olds.index(old)])
    if ticket is not None:
        graph.erase_node(ticket)


def _ahead(stay: _Stay, following: Sequence[_Stay]) -> list[fx.Node]:
    """What the next stretches read, as much as shall be under way while ``stay`` lasts."""
    hosts: dict[fx.Node, None] = {}
    nbytes = 0
    for count, other in enumerate(following):
        nbytes += sum(hint(value.numel()) * value.element_size() for value in other.stored)
        if count >= _AHEAD_COUNT and nbytes > _AHEAD_NBYTES:
            break
        if other.slot is not stay.slot:
            hosts.update(dict.fromkeys(other.slot.placeholders))
    return list(hosts)


def _in_shape(pair: GraphPair, flat: fx.Node, stored: torch.Tensor, old: fx.Node) -> fx.Node:
    """``flat``, [numel] in storage order, as a view in the layout of ``stored``, expanded to the shape of ``old``."""
    graph, shape = pair.backward.graph, stored.shape
    if len(shape) == 1:
        return flat
    order = storage_permutation(shape, stored.stride())
    value = call(graph, aten.view.default, flat, size_args(pair, [shape[dim] for dim in order]))
    if order != sorted(order):
        value = call(graph, aten.permute.default, value, [order.index(dim) for dim in range(len(order))])
    if shape != old.meta["val"].shape:
        value = call(graph, aten.expand.default, value, size_args(pair, old.meta["val"].shape))
    return value


def _positions(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: position for position, node in enumerate(graph.nodes)}
