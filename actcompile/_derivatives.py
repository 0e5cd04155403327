"""Operators of a backward graph under autograd: some have a derivative only in other terms, some have none."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from ._attention import ATTENTION_BACKWARD, ATTENTION_FORWARD, attention_backward
from ._tiles import call_node

# Names of the autograd functions of operators without a derivative; those of prims only raise.
_OPAQUE = ("NotImplemented", "GeneratedBackwardFor_prims")

# Operators of prims without a derivative, in terms of those that have one.
_DIFFERENTIABLE: Mapping[str, Callable[..., Tensor]] = {
    "prims::convert_element_type": Tensor.to,
    "prims::fma": lambda a, b, c: a * b + c,
}


def call_differentiable(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """What ``node`` computes from ``values``, by an operator with a derivative where there is one."""
    if torch.is_grad_enabled() and isinstance(node.target, torch._ops.OpOverload):
        args: Any
        kwargs: Any
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        name = node.target._schema.name
        if name in _DIFFERENTIABLE:
            return _DIFFERENTIABLE[name](*args)
        if node.target in ATTENTION_BACKWARD:
            return attention_backward(node.target, args, kwargs)
        if node.target in ATTENTION_FORWARD:
            # Its results are functions of the operands that the backward's derivative accounts for.
            with torch.no_grad():
                return node.target(*args, **kwargs)
    return call_node(node, values)


def is_opaque(value: Any) -> bool:
    """Whether a result was computed under autograd by an operator that has no derivative."""
    tensors = value if isinstance(value, tuple | list) else [value]
    return any(
        isinstance(tensor, Tensor)
        and tensor.grad_fn is not None
        and any(mark in tensor.grad_fn.name() for mark in _OPAQUE)
        for tensor in tensors
    )
