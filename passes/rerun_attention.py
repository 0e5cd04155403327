"""Lets attention's backward work on probabilities that sum to one. Changes numerics: only where operands are noisy.

    backward:  dq, dk, dv = attention_backward(grad, q, k, v, out, logsumexp)
becomes
    backward:  out2, logsumexp2 = attention(q, k, v);  dq, dk, dv = attention_backward(grad, q, k, v, out2, logsumexp2)

The backward of fused attention computes the probabilities anew, as exp(q @ k - logsumexp). With noisy q and k and the
exact logsumexp they no longer sum to one: the errors are those of an exponential, biased and without bound (at 2 bits,
GPT's gradients were wrong by factors of millions once attention had sharpened). With the logsumexp and the output of
the same noisy operands the result is attention's exact gradient at a point nearby.

With dropout the output stays the saved one: the run in the backward could not drop the same probabilities. What then
nobody reads crosses no longer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ._fx import GraphPair, call, unpack_call

aten = torch.ops.aten

# backward -> forward
FORWARD: Mapping[Any, torch._ops.OpOverload] = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (
        aten._scaled_dot_product_flash_attention_for_cpu.default
    ),
    aten._scaled_dot_product_flash_attention_backward.default: aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention_backward.default: aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention_backward.default: aten._scaled_dot_product_cudnn_attention.default,
}
# Arguments of the forward that its backward does not have, or must not repeat.
_FIXED = {"compute_log_sumexp": True, "return_debug_mask": False, "dropout_p": 0.0}


def rerun_attention(pair: GraphPair) -> None:
    """Rewrites every backward of fused attention in ``pair`` and drops the slots that it read alone."""
    for node in list(pair.backward.graph.nodes):
        if node.target in FORWARD:
            _rerun(node, FORWARD[node.target])
    for slot in pair.slots:
        if not slot.placeholder.users:
            pair.backward.graph.erase_node(slot.placeholder)
            slot.outputs, slot.placeholders = [], []
    pair.sync()


def _rerun(node: fx.Node, forward: torch._ops.OpOverload) -> None:
    assert isinstance(node.target, torch._ops.OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in forward._schema.arguments:
        value = _FIXED.get(argument.name, given.get(argument.name, argument.default_value))
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    with node.graph.inserting_before(node):
        again = call(node.graph, forward, *args, **kwargs)
    output, logsumexp, *rest = unpack_call(node.graph, again)
    for unused in reversed(rest):
        node.graph.erase_node(unused)
    replaced = {"logsumexp": logsumexp} if given["dropout_p"] else {"logsumexp": logsumexp, "out": output}
    node.args = tuple(replaced.get(name, value) for name, value in zip(names, node.args, strict=False))
    if not output.users:
        node.graph.erase_node(output)
