"""Stores bool tensors at one bit per element. Lossless.

    forward:   mask = gt(random, p);  return ..., mask
    backward:  def backward(mask, ...): y = mul(grad, mask)
becomes
    forward:   mask = gt(random, p);  packed = pack_bool(mask);  return ..., packed
    backward:  def backward(packed, ...): y = mul(grad, unpack_bool(packed, shape, stride))

Never touches: masks that the plan keeps.
"""

import torch

from actcompile.plan import Action, Plan

from ._fx import GraphPair, Slot, body_anchor, call, first_user, retire, size_args


def pack_masks(pair: GraphPair, plan: Plan) -> None:
    """Rewrites every slot that ``plan`` packs."""
    for slot in pair.slots:
        decision = plan.get(slot.key)
        if decision is not None and decision.action is Action.PACK:
            _pack(pair, slot)
    pair.sync()


def _pack(pair: GraphPair, slot: Slot) -> None:
    source, placeholder = slot.source, slot.placeholder
    with pair.forward.graph.inserting_after(body_anchor(source)):
        packed = call(pair.forward.graph, torch.ops.actcompile.pack_bool.default, source)
    (received,) = pair.replace(slot, [packed])
    value = source.meta["val"]
    with pair.backward.graph.inserting_before(first_user(placeholder)):
        shape, stride = size_args(pair, value.shape), size_args(pair, value.stride())
        mask = call(pair.backward.graph, torch.ops.actcompile.unpack_bool.default, received, shape, stride)
    retire(placeholder, mask)
