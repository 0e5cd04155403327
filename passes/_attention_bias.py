"""Attention biases of CUDA kernels: these read whole vectors, and refuse rows that do not begin at aligned addresses.

What torch adds to the scores it pads first, so that rows begin at multiples of 8 elements; the backward's kernel relies
on the strides of what is saved. A copy or a decoded tensor, which are dense, have aligned rows only where their length
is such a multiple.
"""

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ._views import VIEW_OPS

aten = torch.ops.aten

_READERS = frozenset(
    {
        aten._scaled_dot_product_efficient_attention_backward.default,
        aten._scaled_dot_product_cudnn_attention_backward.default,
    }
)
# Of rows in elements, as in torch's preprocessing of masks.
_ALIGNMENT = 8


def is_unaligned_bias(placeholder: fx.Node) -> bool:
    """Whether the backward adds ``placeholder`` to attention's scores, and a dense copy might have unaligned rows."""
    pending = [placeholder]
    for node in pending:
        for user in node.users:
            if user.target in _READERS and _bias(user) is node:
                return not statically_known_true(node.meta["val"].shape[-1] % _ALIGNMENT == 0)
            if user.target in VIEW_OPS:
                pending.append(user)
    return False


def _bias(reader: fx.Node) -> object:
    assert isinstance(reader.target, torch._ops.OpOverload)
    names = [argument.name for argument in reader.target._schema.arguments]
    return {**dict(zip(names, reader.args, strict=False)), **reader.kwargs}.get("attn_bias")
