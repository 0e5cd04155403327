"""Makes the forward, where values are exact, compute what turns small noise into large errors. Lossless.

The backward recomputes from saved tensors, and those may come back with rounding noise. Recomputing a smooth function
of them passes the noise on; recomputing a comparison flips it where the value is near the threshold, which is an error
of the size of the gradient; recomputing an exponential multiplies by that of the noise, which is biased and has no
bound. The exponential itself (in cross-entropy, the probability) takes the same bytes and enters linearly.

    joint:     y = relu(x);            ...;  gx = where(le(y, 0), 0, gy)
becomes
    joint:     m = le(x, 0);  y = where(m, 0, x);  ...;  gx = where(m, 0, gy)      m is an output of the forward

    1. relu           split into comparison and selection, so that a noisy x passes through it unbiased
    2. comparisons    and everything else that turns floating-point values into bools or integers, and what rounds
                      them (sign, floor): an output of the forward until the partition is done
    3. exponentials   likewise, unless their argument is a negative square
    4. tuples         operators that return such a result beside others (max-pooling's indices) are never run again

Never touches: operators that a checkpoint of the user's recomputes; what depends on a tangent.
"""

import operator

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ._fx import call, graph_outputs, is_tensor, tangent_dependent

aten = torch.ops.aten

# Operators that jump, or grow without bound, and yield floating-point values.
_UNSTABLE = frozenset(
    {
        aten.sign.default,
        aten.sgn.default,
        aten.floor.default,
        aten.ceil.default,
        aten.round.default,
        aten.trunc.default,
        aten.exp.default,
        aten.exp2.default,
        aten.expm1.default,
    }
)

_USER_RECOMPUTES = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def pin_unstable(joint: fx.GraphModule, num_forward_outputs: int) -> int:
    """Rewrites ``joint`` in place and returns how many outputs its forward has now."""
    graph = joint.graph
    for node in graph.find_nodes(op="call_function", target=aten.relu.default):
        if node.meta.get("recompute") not in _USER_RECOMPUTES:
            _split_relu(node)
    dependent = tangent_dependent(graph)
    pinned = [node for node in graph.nodes if node not in dependent and is_unstable(node)]
    for node in pinned:
        if node.target is operator.getitem:
            node.all_input_nodes[0].meta["recompute"] = CheckpointPolicy.MUST_SAVE
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    output = graph.output_node()
    values = graph_outputs(graph)
    output.args = ([*values[:num_forward_outputs], *pinned, *values[num_forward_outputs:]],)
    if "desc" in output.meta:
        desc = output.meta["desc"]
        output.meta["desc"] = [*desc[:num_forward_outputs], *(None for _ in pinned), *desc[num_forward_outputs:]]
    graph.lint()
    joint.recompile()
    return num_forward_outputs + len(pinned)


def _split_relu(node: fx.Node) -> None:
    """Case 1. Not-a-number is not below 0 and stays."""
    graph, (value,) = node.graph, node.all_input_nodes
    with graph.inserting_before(node):
        mask = call(graph, aten.le.Scalar, value, 0)
        zero = call(
            graph, aten.scalar_tensor.default, 0.0, dtype=value.meta["val"].dtype, device=value.meta["val"].device
        )
        selected = call(graph, aten.where.self, mask, zero, value)
    for new in (mask, zero, selected):
        new.meta = {**{k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta")}, "val": new.meta["val"]}
    for user in list(node.users):
        if user.target is aten.le.Scalar and user.args[1] == 0:
            user.replace_all_uses_with(mask)
            graph.erase_node(user)
    node.replace_all_uses_with(selected)
    graph.erase_node(node)


def is_unstable(node: fx.Node) -> bool:
    """Whether noise in the floating-point values that ``node`` reads may come out much larger."""
    if node.op != "call_function" or not is_tensor(node) or node.meta.get("recompute") in _USER_RECOMPUTES:
        return False
    if node.meta["val"].dtype.is_floating_point:
        return node.target in _UNSTABLE and not _is_below_zero(node.all_input_nodes[0])
    sources = node.all_input_nodes
    if node.target is operator.getitem:
        sources = sources[0].all_input_nodes
    return any(is_tensor(source) and source.meta["val"].dtype.is_floating_point for source in sources)


def _is_below_zero(node: fx.Node) -> bool:
    """Whether ``node`` is minus a square, as in GELU: its exponential stays below 1 with any noise."""
    if node.target is aten.neg.default:
        return _is_square(node.args[0])
    if node.target is not aten.mul.Tensor or not isinstance(node.args[1], float | int):
        return False
    return bool(node.args[1] < 0) and _is_square(node.args[0])


def _is_square(node: object) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.pow.Tensor_Scalar:
        return bool(node.args[1] == 2)
    return node.target is aten.mul.Tensor and node.args[0] is node.args[1]
