"""Operators that move values without changing them, and the chains that they form."""

import operator

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from ._fx import body_anchor, call

aten = torch.ops.aten

# Operators whose result holds the values of their first argument, rearranged or repeated.
VIEW_OPS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.alias.default,
        aten.expand.default,
    }
)
VALUE_PRESERVING_OPS = VIEW_OPS | {aten.clone.default}

# Operators whose result lies in the memory of their first argument.
ALIAS_OPS = VIEW_OPS | {aten.slice.Tensor, aten.select.int, aten.diagonal.default, aten.as_strided.default}

# Operators whose results, taken out of a list, all lie in the memory of their first argument.
ALIAS_LIST_OPS = frozenset(
    {
        aten.unbind.int,
        aten.split.Tensor,
        aten.split.sizes,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default,
        aten.unsafe_chunk.default,
        aten.tensor_split.sections,
        aten.tensor_split.indices,
    }
)


def value_chain(node: fx.Node) -> list[fx.Node]:
    """``node`` and the nodes above it that hold the same values, up to the first that computes them."""
    chain = [node]
    while chain[-1].target in VALUE_PRESERVING_OPS and len(chain[-1].all_input_nodes) == 1:
        chain.extend(chain[-1].all_input_nodes)
    return chain


def storage(node: fx.Node) -> fx.Node:
    """The node whose memory ``node`` is a view of, or ``node`` itself."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` lies in the memory of its first argument; a list of views, in that of what it was made from."""
    producer = node.all_input_nodes[0] if node.target is operator.getitem else node
    return bool(node.all_input_nodes) and (node.target in ALIAS_OPS or producer.target in ALIAS_LIST_OPS)


def dense_base(graph: fx.Graph, source: fx.Node) -> fx.Node:
    """``source`` with every expanded dimension cut to one element, or ``source`` itself."""
    value, base = source.meta["val"], source
    for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if guard_or_false(stride == 0) and not guard_or_false(size == 1):
            with graph.inserting_after(body_anchor(base)):
                base = call(graph, aten.slice.Tensor, base, dim, 0, 1)
    return base
