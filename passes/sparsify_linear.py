"""Stores the largest elements of saved tensors alone. Changes numerics: those that are not stored count as zero.

    forward:   x = ...;  return ..., x
    backward:  def backward(x, g): gw = mm(permute(g), x);  gx = mm(g, w)
becomes
    forward:   x = ...;  index, values, scale, zero = sparsify(x, keep, block, bits, seed, salt);  return ..., index, ..
    backward:  def backward(index, ..., g): gw = sparse_weight_grad(g, index, ...);  gx = mm(g, w)

    1. products       as above, and in the other forms that ``_weight_grads`` lists: the gradient of a weight reads what
                      is stored, a few rows at a time; all layers with the same input read the same
    2. samples        a product for each sample whose results are summed becomes one: there are no gradients of samples
    3. convolutions   and whatever else reads x, or reads it in another order than it lies in memory: it is decoded
                      right before, densify(index, ...)

Never touches: what reads no pruned tensor, such as the gradients of layer inputs.
"""

import functools
from collections.abc import Sequence

import torch
from torch import fx

from actcompile.plan import Action, Decision, Plan

from ._fx import ROW_KEY, GraphPair, Slot, body_anchor, call, first_user, size_args, unpack_call
from ._views import dense_base
from ._weight_grads import WeightGrad, WeightGrads

aten = torch.ops.aten
actcompile = torch.ops.actcompile


def sparsify_linear(pair: GraphPair, plan: Plan) -> None:
    """Rewrites every slot that ``plan`` sparsifies.

    Raises:
        KeyError: When the plan has no decision for a slot.
    """
    for salt, slot in enumerate(list(pair.slots)):
        decision = plan[slot.key]
        if decision.action is Action.SPARSIFY:
            _sparsify(pair, slot, decision, salt)
    pair.sync()


def _sparsify(pair: GraphPair, slot: Slot, decision: Decision, salt: int) -> None:
    assert pair.seed is not None, "a plan with lossy codecs needs the seed"
    source, placeholder = slot.source, slot.placeholder
    stored = dense_base(pair.forward.graph, source)
    with pair.forward.graph.inserting_after(body_anchor(stored)):
        codec = call(pair.forward.graph, actcompile.sparsify.default, stored, *decision.pruning, pair.seed, salt)
    received = pair.replace(slot, unpack_call(pair.forward.graph, codec))
    codec.meta[ROW_KEY] = slot.key
    parts = (*received, *decision.pruning)
    if stored is source:
        for reader in WeightGrads(pair.backward.graph, pair.input_roles).of(placeholder):
            if reader.reads_rows_of(placeholder):
                reader.replace(functools.partial(_read_sparse, reader, parts))
    if placeholder.users:
        with pair.backward.graph.inserting_before(first_user(placeholder)):
            placeholder.replace_all_uses_with(_decode(pair, slot, source, stored, parts))
    pair.backward.graph.erase_node(placeholder)


def _decode(pair: GraphPair, slot: Slot, source: fx.Node, stored: fx.Node, parts: Sequence[object]) -> fx.Node:
    value = stored.meta["val"]
    layout = (*(size_args(pair, sizes) for sizes in (value.shape, value.stride())), value.dtype)
    decoded = call(pair.backward.graph, actcompile.densify.default, *parts, *layout)
    decoded.meta[ROW_KEY] = slot.key
    if stored is source:
        return decoded
    return call(pair.backward.graph, aten.expand.default, decoded, size_args(pair, source.meta["val"].shape))


def _read_sparse(reader: WeightGrad, parts: Sequence[object], grad_out: fx.Node) -> fx.Node:
    return call(grad_out.graph, actcompile.sparse_weight_grad.default, grad_out, *parts, reader.in_features)
