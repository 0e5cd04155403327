"""Stores some rows of layer inputs, those of tokens. Changes numerics: unbiased, and exact where the rest is padding.

    forward:   x = ...;  return ..., x
    backward:  def backward(x, g): gw = mm(permute(g), x);  gx = mm(g, w)
becomes
    forward:   x = ...;  rows, position, weight = sample_rows(x, valid, num_rows, seed, salt)
               return ..., rows, position, weight, pack_bool(valid)
    backward:  def backward(rows, ..., g): gw = sampled_weight_grad(g, rows, position, weight, valid);  gx = mm(g, w)

    1. SAMPLE    as above: the product of the weight's gradient has fewer rows, too; all layers with the same input read
                 the same
    2. bits      rows may be stored in codes: quantize(rows, ...)
    3. padding   an input that marks padding says which rows are valid; only these are sampled from, and where they are
                 fewer than what is stored, all of them are

Never touches: the gradients of layer inputs, and what reads other rows than those of one matrix.
"""

import functools
import operator
from collections.abc import Sequence

import torch
from torch import fx

from actcompile.plan import Action, Decision, Plan, Role

from ..triton_kernels._layout import storage_permutation
from ..triton_kernels.rows import num_kept_rows
from ._fx import ROW_KEY, GraphPair, Slot, body_anchor, call, first_user, size_args, unpack_call
from ._weight_grads import WeightGrads

aten = torch.ops.aten
actcompile = torch.ops.actcompile


def sample_rows(pair: GraphPair, plan: Plan) -> None:
    """Rewrites every slot of which ``plan`` samples rows.

    Raises:
        KeyError: When the plan has no decision for a slot.
    """
    valid = _valid_rows(pair) if any(plan[slot.key].action is Action.SAMPLE for slot in pair.slots) else None
    for salt, slot in enumerate(list(pair.slots)):
        decision = plan[slot.key]
        if decision.action is Action.SAMPLE:
            _sample(pair, slot, decision, salt, valid)
    pair.sync()


def _valid_rows(pair: GraphPair) -> fx.Node | None:
    """Bool [M], from the input that marks padding, if there is one."""
    graph = pair.forward.graph
    mask = next((node for node, role in pair.roles.items() if role is Role.PADDING), None)
    if mask is None:
        return None
    with graph.inserting_after(body_anchor(mask)):
        flat = call(graph, aten.reshape.default, mask, [-1])
    with graph.inserting_after(flat):
        return call(graph, aten.ne.Scalar, flat, 0)


def _sample(pair: GraphPair, slot: Slot, decision: Decision, salt: int, valid: fx.Node | None) -> None:
    assert pair.seed is not None and decision.rows is not None, "a plan that samples needs the seed and a share"
    graph, placeholder = pair.forward.graph, slot.placeholder
    readers = WeightGrads(pair.backward.graph, pair.input_roles).of(placeholder)
    matrix = _matrix(graph, slot.source, readers[0].in_features)
    if valid is not None and valid.meta["val"].shape[0] != matrix.meta["val"].shape[0]:
        valid = None
    with graph.inserting_before(body_anchor(_later(matrix, valid)).next):
        num_rows = _num_kept(graph, matrix, decision.rows)
        sampled = call(graph, actcompile.sample_rows.default, matrix, valid, num_rows, pair.seed, salt)
    rows, *rest = unpack_call(graph, sampled)
    parts = [rows]
    if decision.bits is not None:
        # The noise of rounding has a salt of its own.
        numbers = decision.bits, decision.group_size, pair.seed, salt + len(pair.slots)
        with graph.inserting_after(rest[-1]):
            codec = call(graph, actcompile.quantize.default, rows, *numbers)
        codec.meta[ROW_KEY] = slot.key
        parts = unpack_call(graph, codec)
    if valid is not None:
        with graph.inserting_after(valid):
            rest.append(call(graph, actcompile.pack_bool.default, valid))
    received = pair.replace(slot, [*parts, *rest])
    decoded = received[0]
    if decision.bits is not None:
        with pair.backward.graph.inserting_before(first_user(placeholder)):
            value = rows.meta["val"]
            layout = (*(size_args(pair, sizes) for sizes in (value.shape, value.stride())), value.dtype)
            codes, width = received[: len(parts)], (decision.bits, decision.group_size)
            decoded = call(pair.backward.graph, actcompile.dequantize.default, *codes, *width, *layout)
            decoded.meta[ROW_KEY] = slot.key
    for reader in readers:
        reader.replace(functools.partial(_read_rows, decoded, received[len(parts) :]))
    pair.backward.graph.erase_node(placeholder)


def _matrix(graph: fx.Graph, source: fx.Node, in_features: int) -> fx.Node:
    """``source`` as [M, in_features], row by row as it lies in memory."""
    value = source.meta["val"]
    order = storage_permutation(value.shape, value.stride())
    if order != sorted(order):
        with graph.inserting_after(body_anchor(source)):
            source = call(graph, aten.permute.default, source, order)
    if value.dim() == 2 and source.meta["val"].shape[1] == in_features:
        return source
    with graph.inserting_after(body_anchor(source)):
        return call(graph, aten.reshape.default, source, [-1, in_features])


def _num_kept(graph: fx.Graph, matrix: fx.Node, share: float) -> fx.Node | int:
    """``num_kept_rows`` in the forward, where the number of rows may be a symbol."""
    rows = matrix.meta["val"].shape[0]
    if isinstance(rows, int):
        return num_kept_rows(share, rows)
    size = call(graph, aten.sym_size.int, matrix, 0)
    scaled = call(graph, operator.mul, size, max(1, round(share * 1024)))
    return call(graph, operator.floordiv, call(graph, operator.add, scaled, 1023), 1024)


def _later(first: fx.Node, second: fx.Node | None) -> fx.Node:
    nodes = list(first.graph.nodes)
    return first if second is None or nodes.index(second) < nodes.index(first) else second


def _read_rows(rows: fx.Node, rest: Sequence[fx.Node], grad_out: fx.Node) -> fx.Node:
    return call(grad_out.graph, actcompile.sampled_weight_grad.default, grad_out, rows, *rest)
