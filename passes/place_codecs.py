"""Orders both graphs so that stored bytes become peak memory. Lossless.

    forward:   x = f(a);  y = g(x);  ...;  codes = quantize(x);  return y, codes
    backward:  x = dequantize(codes);  ...;  gy = h(grad, x);  ...;  gw = mm(grad, x)
becomes
    forward:   x = f(a);  codes = quantize(x);  y = g(x);  ...;  return y, codes
    backward:  ...;  x = dequantize(codes);  gy = h(grad, x);  ...;  x2 = dequantize(codes);  gw = mm(grad, x2)

    1. encoders    move up, with what is computed for them alone, right behind what they read; copies to the host too
    2. decoders    move down to their first user, and run again for users that come much later
    3. recomputed  forward operators move down to their first user in the backward, the last ones first

The compiler's scheduler keeps this order where nothing cheaper in memory offers itself, because what it lowers late it
runs late; buffers must not be handed on from one use to the next across the graph (``allow_buffer_reuse`` off), or
freed ones stay allocated until then.

Never touches: the order of anything that reads a tangent.
"""

import operator

import torch
from torch import fx

from actcompile.plan import Plan

from ._fx import GraphPair, body_anchor, tangent_dependent

actcompile = torch.ops.actcompile

ENCODERS = frozenset(
    {
        actcompile.quantize.default,
        actcompile.sparsify.default,
        actcompile.sample_rows.default,
        actcompile.pack_bool.default,
    }
)
DECODERS = frozenset({actcompile.dequantize.default, actcompile.densify.default, actcompile.unpack_bool.default})
OFFLOAD, RELOAD = actcompile.offload.default, actcompile.reload.default
_EARLY = ENCODERS | {OFFLOAD}

# Users of a decoded tensor that lie further apart than this many nodes each get a decoding of their own.
NEARBY = 12


def place_codecs(pair: GraphPair, plan: Plan) -> None:
    """Moves encoders up, decoders and recomputed operators down."""
    hoist_encoders(pair)
    _sink_independent(pair.backward.graph)
    for node in [n for n in pair.backward.graph.nodes if n.target in DECODERS]:
        _split(node)


def hoist_encoders(pair: GraphPair) -> None:
    """Moves encoders and copies to the host up, and what is computed for them alone."""
    for node in _made_for_encoders(pair):
        _hoist(node)


def _made_for_encoders(pair: GraphPair) -> list[fx.Node]:
    """Encoders and what the forward computes for them alone, in its order: autograd's own views stand at its end."""
    nodes = list(pair.forward.graph.nodes)
    returned = {node for node in pair.user_outputs if isinstance(node, fx.Node)}
    encoded = {node for node in nodes if node.target in _EARLY}
    for node in reversed(nodes):
        for needed in (returned, encoded):
            if node in needed:
                needed.update(node.all_input_nodes)
    return [
        node for node in nodes if node in encoded - returned and node.op == "call_function" and node.all_input_nodes
    ]


def _hoist(moved: fx.Node) -> None:
    """Moves a node and its results right behind the last of its inputs."""
    order = {node: position for position, node in enumerate(moved.graph.nodes)}
    anchor = body_anchor(max(moved.all_input_nodes, key=order.__getitem__))
    # An operator with several results is only there once its getitems are.
    while anchor.next.target is operator.getitem:
        anchor = anchor.next
    for node in (moved, *(user for user in moved.users if user.target is operator.getitem)):
        anchor.append(node)
        anchor = node


def _sink_independent(graph: fx.Graph) -> None:
    """Moves every node that no tangent reaches to its first user; users are placed before what they read."""
    dependent = tangent_dependent(graph)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and node not in dependent and node.users and not node.is_impure():
            following = node.next
            while following not in node.users:
                following = following.next
            following.prepend(node)


def _split(decoder: fx.Node) -> None:
    """Gives users of ``decoder`` that lie far from the others a copy of it, so that nothing decoded waits for them."""
    graph = decoder.graph
    order = {node: position for position, node in enumerate(graph.nodes)}
    current, last = decoder, None
    for user in sorted(decoder.users, key=order.__getitem__):
        if last is not None and order[user] - order[last] > NEARBY:
            with graph.inserting_before(user):
                current = graph.node_copy(decoder)
        if current is not decoder:
            user.replace_input_with(decoder, current)
        last = user
