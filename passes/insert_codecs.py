"""Stores codes in place of saved tensors. Changes numerics: unbiased rounding noise in what the backward reads.

    forward:   x = ...;  return ..., x
    backward:  def backward(x, ...): y = f(x)
becomes
    forward:   x = ...;  codes, scale, zero = quantize(x, bits, group_size, seed, salt);  return ..., codes, scale, zero
    backward:  def backward(codes, scale, zero, ...): y = f(dequantize(codes, scale, zero, ...))

    1. QUANTIZE   as above
    2. expanded   a dimension of stride 0 is stored once and expanded again
    3. NARROW     integers are cast down in the forward and up again in the backward
    4. KEEP       of parts of a larger tensor copies cross, so that the rest is freed, unless they are all of it

Never touches: other rows that the plan keeps, graph inputs and outputs that the caller holds, attention
biases whose rows would no longer be aligned.
"""

import math

import torch
from torch import fx

from actcompile.plan import Action, Decision, Plan

from ._attention_bias import is_unaligned_bias
from ._fx import (
    ROW_KEY,
    GraphPair,
    Slot,
    body_anchor,
    call,
    first_user,
    hint,
    hint_nbytes,
    is_tensor,
    retire,
    size_args,
    unpack_call,
)
from ._views import dense_base, storage

aten = torch.ops.aten
convert = torch.ops.prims.convert_element_type.default


def insert_codecs(pair: GraphPair, plan: Plan) -> None:
    """Rewrites every slot that ``plan`` quantizes or narrows.

    Raises:
        KeyError: When the plan has no decision for a slot.
    """
    parts = _lone_parts(pair, plan)
    for salt, slot in enumerate(list(pair.slots)):
        decision = plan[slot.key]
        if slot.key in parts:
            _copy(pair, slot)
        elif decision.action is Action.QUANTIZE:
            _quantize(pair, slot, decision, salt)
        elif decision.action is Action.NARROW:
            _narrow(pair, slot, decision)
    pair.sync()


def _lone_parts(pair: GraphPair, plan: Plan) -> set[str]:
    """Keys of what is kept of larger tensors that nobody else holds, where it is less than all of them."""
    held = {storage(node) for node in pair.user_outputs if isinstance(node, fx.Node)}
    kept: dict[fx.Node, list[Slot]] = {}
    for slot in pair.slots:
        root = storage(slot.source)
        is_free = root not in held and root.op != "placeholder" and is_tensor(root)
        if plan[slot.key].action is Action.KEEP and is_free and not is_unaligned_bias(slot.placeholder):
            kept.setdefault(root, []).append(slot)
    return {
        slot.key
        for root, slots in kept.items()
        if sum(_copied_nbytes(slot.source) for slot in slots) < hint_nbytes(root)
        for slot in slots
    }


def _copied_nbytes(part: fx.Node) -> int:
    value = part.meta["val"]
    repeats = math.prod(
        hint(size) for size, stride in zip(value.shape, value.stride(), strict=True) if hint(stride) == 0
    )
    return hint_nbytes(part) // max(1, repeats)


def _quantize(pair: GraphPair, slot: Slot, decision: Decision, salt: int) -> None:
    assert pair.seed is not None, "a plan with lossy codecs needs the seed"
    source, placeholder = slot.source, slot.placeholder
    bits, group_size = decision.bits, decision.group_size
    stored = dense_base(pair.forward.graph, source)
    with pair.forward.graph.inserting_after(body_anchor(stored)):
        codec = call(
            pair.forward.graph, torch.ops.actcompile.quantize.default, stored, bits, group_size, pair.seed, salt
        )
    received = pair.replace(slot, unpack_call(pair.forward.graph, codec))
    value = stored.meta["val"]
    with pair.backward.graph.inserting_before(first_user(placeholder)):
        layout = (*(size_args(pair, sizes) for sizes in (value.shape, value.stride())), value.dtype)
        decoded = call(
            pair.backward.graph, torch.ops.actcompile.dequantize.default, *received, bits, group_size, *layout
        )
        codec.meta[ROW_KEY] = decoded.meta[ROW_KEY] = slot.key
    retire(placeholder, decoded if stored is source else _repeat(pair, decoded, source, placeholder))


def _repeat(pair: GraphPair, base: fx.Node, source: fx.Node, placeholder: fx.Node) -> fx.Node:
    """``base``, which has one element along each dimension that ``source`` expands, expanded as ``source`` is."""
    with pair.backward.graph.inserting_before(first_user(placeholder)):
        return call(pair.backward.graph, aten.expand.default, base, size_args(pair, source.meta["val"].shape))


def _copy(pair: GraphPair, slot: Slot) -> None:
    source, placeholder = slot.source, slot.placeholder
    part = dense_base(pair.forward.graph, source)
    with pair.forward.graph.inserting_after(part):
        # Dense, with dimensions in the order of their strides.
        copy = call(pair.forward.graph, aten.clone.default, part)
    (received,) = pair.replace(slot, [copy])
    retire(placeholder, received if part is source else _repeat(pair, received, source, placeholder))


def _narrow(pair: GraphPair, slot: Slot, decision: Decision) -> None:
    source, placeholder = slot.source, slot.placeholder
    with pair.forward.graph.inserting_after(source):
        narrow = call(pair.forward.graph, convert, source, decision.dtype)
    (received,) = pair.replace(slot, [narrow])
    with pair.backward.graph.inserting_before(first_user(placeholder)):
        wide = call(pair.backward.graph, convert, received, source.meta["val"].dtype)
    retire(placeholder, wide)
