"""What is computed from parameters and buffers alone: copies of them, parts of weights, or activations.

    copy         w.to(bfloat16), permute(w), g * v / norm(v), sin(x):  no matrix product lies above it. From parameters
                 alone the backward makes it again (``remake_copies``)
    weight       w + b @ a, the weight of a network that a network makes:  it ends as the weight of a product with data,
                 so it is exact
    constant     cos(positions * frequencies):  nothing that is trained is above it, so it is exact; but not what layers
                 read as their input, as features in a buffer
    activation   relu(x @ w) where x is a parameter or a buffer: images, node features, latents.  All others

A weight is an operand of a matrix product whose other one depends on data, one matrix for all samples: either one of
two matrices, the right one of batched matrices, the left one where it is expanded, and the second one of a convolution.
"""

import torch
from torch import fx

from actcompile.plan import Role

from ._fx import GraphPair, graph_outputs, input_index
from ._views import value_chain

aten = torch.ops.aten

# Matrix products -> the positions of their operands.
_MATRICES = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}
_BATCHES = {aten.bmm.default: (0, 1), aten.baddbmm.default: (1, 2)}
_ATTENTION = "_scaled_dot_product"

HELD = frozenset({Role.PARAMETER, Role.BUFFER})


class HeldValues:
    """What the forward of ``pair`` computes from parameters and buffers alone."""

    def __init__(self, pair: GraphPair) -> None:
        outputs = graph_outputs(pair.backward.graph)
        self._held: set[fx.Node] = set()
        self._multiplied: set[fx.Node] = set()
        self._trained: set[fx.Node] = set()
        for node in pair.forward.graph.nodes:
            above = [source for source in node.all_input_nodes if is_value(source)]
            if node.op == "placeholder":
                if pair.roles[node] in HELD:
                    self._held.add(node)
                    if needs_gradient(node, outputs):
                        self._trained.add(node)
            elif node.op == "call_function" and above and self._held.issuperset(above):
                self._held.add(node)
                if not self._trained.isdisjoint(above):
                    self._trained.add(node)
                if is_product(node) or not self._multiplied.isdisjoint(above):
                    self._multiplied.add(node)
        self._weights: set[fx.Node] = set()
        for node in reversed(pair.forward.graph.nodes):
            if node in self._held and any(self._leads_to_weight(user, node) for user in node.users):
                self._weights.add(node)

    def _leads_to_weight(self, user: fx.Node, node: fx.Node) -> bool:
        return user in self._weights if user in self._held else _is_weight_of(user, node)

    def is_held(self, node: fx.Node) -> bool:
        """Whether only parameters and buffers are above ``node``, and there is one."""
        return node in self._held

    def is_activation(self, node: fx.Node, is_layer_input: bool) -> bool:
        """Whether ``node``, of which ``is_held`` is true, is an activation like those computed from a batch.

        Args:
            node: A node of the forward.
            is_layer_input: Whether the backward reads it in gradients of weights alone.
        """
        # What is saved may be a view of its own of what the product reads.
        is_weight = not self._weights.isdisjoint(value_chain(node))
        return not is_weight and (is_layer_input or (node in self._multiplied and node in self._trained))


def needs_gradient(placeholder: fx.Node, gradients: list[object]) -> bool:
    """Whether the backward, which returns ``gradients``, has one for an input."""
    index = input_index(placeholder)
    return index is not None and index < len(gradients) and isinstance(gradients[index], fx.Node)


def is_value(node: fx.Node) -> bool:
    """Whether ``node`` is more than a size."""
    return not isinstance(node.meta.get("val"), torch.SymInt | int)


def is_product(node: fx.Node) -> bool:
    """Whether ``node`` multiplies matrices, or convolves."""
    is_attention = getattr(node.target, "__name__", "").startswith(_ATTENTION)
    return (
        is_attention or node.target in _MATRICES or node.target in _BATCHES or node.target is aten.convolution.default
    )


def _is_weight_of(product: fx.Node, node: fx.Node) -> bool:
    """Whether ``product``, which depends on data, reads ``node`` as its weight."""
    if product.target is aten.convolution.default:
        return product.args[1] is node
    if product.target in _MATRICES:
        return any(product.args[position] is node for position in _MATRICES[product.target])
    if product.target not in _BATCHES:
        return False
    left, right = (product.args[position] for position in _BATCHES[product.target])
    return right is node or (left is node and _is_expanded(node))


def _is_expanded(node: fx.Node) -> bool:
    return any(link.target is aten.expand.default for link in value_chain(node))
