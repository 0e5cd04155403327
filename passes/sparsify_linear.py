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

import math
from collections.abc import Sequence

import torch
from torch import fx

from actcompile.plan import Action, Decision, Plan

from ._fx import ROW_KEY, GraphPair, Slot, body_anchor, call, first_user, size_args, unpack_call
from ._views import VIEW_OPS, dense_base
from ._weight_grads import WeightGrad, WeightGrads

aten = torch.ops.aten
actcompile = torch.ops.actcompile

# Operators whose result surely lies in the memory of their argument; others copy where they must.
_VIEWS = VIEW_OPS - {aten.reshape.default, aten.expand.default}


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
            if _is_row_by_row(reader, placeholder):
                _read_sparse(pair.backward.graph, reader, parts)
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


def _is_row_by_row(reader: WeightGrad, placeholder: fx.Node) -> bool:
    """Whether ``reader`` is one product of a matrix whose rows lie one after the other in the memory of the tensor."""
    node = reader.x
    while node is not placeholder:
        if node.target not in _VIEWS:
            return False
        (node,) = node.all_input_nodes
    x, result = reader.x.meta["val"], reader.node.meta["val"]
    rows = x.transpose(-1, -2) if reader.is_left else x
    # Of a product that is batched, all results are summed, or there is one.
    is_one = reader.is_product and math.prod(result.shape[:-2]) == 1
    return is_one and isinstance(x.shape[-2 if reader.is_left else -1], int) and bool(rows.is_contiguous())


def _read_sparse(graph: fx.Graph, reader: WeightGrad, parts: Sequence[object]) -> None:
    result = reader.node.meta["val"]
    in_features = reader.x.meta["val"].shape[-2 if reader.is_left else -1]
    with graph.inserting_before(reader.node):
        grad_out = _rows_of_gradient(graph, reader)
        gradient = call(graph, actcompile.sparse_weight_grad.default, grad_out, *parts, in_features)
        if reader.is_left:
            gradient = call(graph, aten.permute.default, gradient, [1, 0])
            # Views of the product's result follow.
            gradient = call(graph, aten.clone.default, gradient, memory_format=torch.contiguous_format)
        if result.dim() != 2:
            gradient = call(graph, aten.reshape.default, gradient, [*result.shape[:-2], *gradient.meta["val"].shape])
    reader.node.replace_all_uses_with(gradient)
    _erase_unused(reader.node)


def _erase_unused(node: fx.Node) -> None:
    """Erases ``node`` and what was computed for it alone."""
    if not node.users and node.op != "placeholder":
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            _erase_unused(source)


def _rows_of_gradient(graph: fx.Graph, reader: WeightGrad) -> fx.Node:
    """The gradient of the layer's output, [M, N]."""
    grad_out, num_dims = reader.grad_out, reader.grad_out.meta["val"].dim()
    swapped = [*range(num_dims - 2), num_dims - 1, num_dims - 2]
    if not reader.is_left:
        is_swapped = grad_out.target is aten.permute.default and list(grad_out.args[1]) == swapped  # type: ignore[arg-type]
        grad_out = grad_out.all_input_nodes[0] if is_swapped else call(graph, aten.permute.default, grad_out, swapped)
    if num_dims == 2:
        return grad_out
    return call(graph, aten.reshape.default, grad_out, [-1, grad_out.meta["val"].shape[-1]])
