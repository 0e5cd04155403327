"""What computes a saved tensor from other saved tensors, and whether the backward may do that again."""

import math
import operator
from collections.abc import Container

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ._fx import argument, draws_random_numbers, hint
from ._noise import Demands, Noise

aten = torch.ops.aten

# Operators in a cone; longer ones would keep more alive in the backward than they save.
_MOST_NODES = 24

_USER_SAVES = (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)

# Fused attention's operators, to begin with.
_ATTENTION = "_scaled_dot_product"

# Matrix products -> the position of the operand whose last dimension is summed over.
_PRODUCTS = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}


def cone(source: fx.Node, given: Container[fx.Node]) -> list[fx.Node] | None:
    """The forward nodes that compute ``source`` from ``given`` nodes, in order.

    Args:
        source: A node of the forward; may be among ``given``.
        given: What may be read: the sources of all slots, and what else the backward can have.

    Returns:
        None when there is an operator among them that must not run again: it draws random numbers, changes its inputs,
        turns small noise into large errors, was tagged by the user to be saved, or is none of PyTorch's own.
    """
    seen: set[fx.Node] = set()
    ordered: list[fx.Node] = []

    def visit(node: fx.Node) -> bool:
        if node in seen or (node in given and node is not source) or isinstance(node.meta.get("val"), torch.SymInt):
            return True
        seen.add(node)
        if len(seen) > _MOST_NODES or not _may_run_again(node) or not all(map(visit, node.all_input_nodes)):
            return False
        ordered.append(node)
        return True

    return ordered if visit(source) and not _makes_more_of_noise(source, ordered) else None


def cone_inputs(nodes: list[fx.Node]) -> list[fx.Node]:
    """The tensors that ``nodes`` read and do not compute."""
    inside = set(nodes)
    read = dict.fromkeys(above for node in nodes for above in node.all_input_nodes)
    return [node for node in read if node not in inside and isinstance(node.meta["val"], torch.Tensor)]


def num_flops(nodes: list[fx.Node]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention among ``nodes``."""
    return sum(map(_flops, nodes))


def _flops(node: fx.Node) -> int:
    if node.target is aten.convolution.default:
        weight = node.args[1].meta["val"]  # type: ignore[union-attr]
        return 2 * hint(node.meta["val"].numel()) * math.prod(map(hint, weight.shape[1:]))
    if getattr(node.target, "__name__", "").startswith(_ATTENTION):
        query, key, value = (argument(node, name).meta["val"] for name in ("query", "key", "value"))
        # Scores of all queries and keys, whatever a mask leaves out, and as many products with the values.
        scores = hint(query.numel() // query.shape[-1]) * hint(key.shape[-2])
        return 2 * scores * (hint(query.shape[-1]) + hint(value.shape[-1]))
    if node.target not in _PRODUCTS:
        return 0
    operand = node.args[_PRODUCTS[node.target]].meta["val"]  # type: ignore[union-attr]
    return 2 * hint(node.meta["val"].numel()) * hint(operand.shape[-1])


def _makes_more_of_noise(source: fx.Node, nodes: list[fx.Node]) -> bool:
    """Whether noise in what ``nodes`` read may come out of ``source`` much larger."""
    found, noise = Demands(), Noise(nodes, (), sources=cone_inputs(nodes))
    noise.demand(source, found)
    return bool(found.cuts)


def _may_run_again(node: fx.Node) -> bool:
    if node.op != "call_function" or node.meta.get("recompute") in _USER_SAVES:
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace not in ("aten", "prims"):
        return False
    return not draws_random_numbers(node) and not node.target._schema.is_mutable
