"""Makes the forward, where values are exact, compute what turns small noise into large errors. Lossless.

The backward recomputes from saved tensors, and those may come back with rounding noise. A linear operator passes the
noise on, and so does a bounded function (_noise.py); a comparison flips where the value is near the threshold, a square
root, a logarithm, a quotient or an operator that nobody listed may make anything of it. What these yield takes no more
bytes than what they read, and enters the gradient linearly.

    joint:     y = relu(x);            ...;  gx = where(le(y, 0), 0, gy)
becomes
    joint:     m = le(x, 0);  y = where(m, 0, x);  ...;  gx = where(m, 0, gy)      m is an output of the forward

    1. relu           split into comparison and selection, so that a noisy x passes through it unbiased
    2. gradients      that are multiplied by several factors are by one (factor_tangents.py)
    3. cuts           that gradients demand: outputs of the forward until the partition is done
    4. units          bounded functions of one node, in however many operators (1 / (1 + exp(-x))): one operator until
                      the partition is done, so that nothing between is saved
    5. tuples         operators that return a cut beside others (max-pooling's indices) are never run again

Never touches: operators that a checkpoint of the user's recomputes; what depends on a tangent.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from actcompile.plan import Role

from ._fx import call, graph_outputs, hint, roles_of_inputs, tangent_dependent
from ._noise import Noise, Unit
from .factor_tangents import factor_tangents
from .held import is_product

aten = torch.ops.aten

# Nodes that stand for a bounded function carry its graph and its value under this name.
_UNIT = "actcompile_unit"
# Under this name reductions carry what the user said about them.
_REDUCTION = "actcompile_reduction"
# Under this name what is pinned says why no codes may be stored of it, if so.
EXACT = "actcompile_exact"
# What reads more than this many times the bytes that it yields is a reduction to the partitioner.
_REDUCTION_RATIO = 4
_USER_RECOMPUTES = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
# Whose values, and what is made of them alone, are never noisy.
_EXACT_ROLES = (Role.PARAMETER, Role.BUFFER, Role.SEED)


def pin_unstable(joint: fx.GraphModule, num_forward_outputs: int, input_roles: Sequence[Role]) -> int:
    """Rewrites ``joint`` in place and returns how many outputs its forward has now; ``unfold`` ends what it begins."""
    graph = joint.graph
    for node in graph.find_nodes(op="call_function", target=aten.relu.default):
        if not _is_recomputed(node):
            _split_relu(node)
    factor_tangents(joint, _noise_in(joint, num_forward_outputs, input_roles))
    noise = _noise_in(joint, num_forward_outputs, input_roles)
    demands = noise.demands()
    exact = noise.exact_factors(demands)
    demanded, again = demands.cuts | demands.fixed.keys() | exact.keys(), _run_again(graph, num_forward_outputs)
    pinned = [node for node in graph.nodes if node in demanded and _may_pin(node) and node not in again]
    _ban_reductions(graph)
    _fold(graph, demands.units)
    for node in pinned:
        for one in (node, *(node.all_input_nodes if node.target is operator.getitem else ())):
            one.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            one.meta.pop(_REDUCTION, None)
        node.meta[EXACT] = exact.get(node, "")
    output = graph.output_node()
    values = graph_outputs(graph)
    output.args = ([*values[:num_forward_outputs], *pinned, *values[num_forward_outputs:]],)
    if "desc" in output.meta:
        desc = output.meta["desc"]
        output.meta["desc"] = [*desc[:num_forward_outputs], *(None for _ in pinned), *desc[num_forward_outputs:]]
    graph.eliminate_dead_code()
    graph.lint()
    joint.recompile()
    return num_forward_outputs + len(pinned)


def _noise_in(joint: fx.GraphModule, num_forward_outputs: int, input_roles: Sequence[Role]) -> Noise:
    graph, roles = joint.graph, roles_of_inputs(joint.graph, input_roles)
    dependent = tangent_dependent(graph)
    # What layers make of data is an activation, wherever the data comes from.
    products = [node for node in graph.nodes if node not in dependent and is_product(node)]
    return Noise(
        graph.nodes,
        dependent,
        sources=[*products, *(node for node, role in roles.items() if role not in _EXACT_ROLES)],
        exact={node for node, role in roles.items() if role is not Role.BOUNDARY},
        results=graph_outputs(graph)[num_forward_outputs:],
    )


def unfold(graph: fx.Graph) -> None:
    """Puts the operators of bounded functions in the place of the nodes that stand for them."""
    made: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if _REDUCTION in node.meta:
            node.meta["recompute"] = node.meta.pop(_REDUCTION)
        unit, value = node.meta.pop(_UNIT, (None, None))
        if node.op != "call_function" and value is not None:
            node.meta["val"] = value
        if unit is None or node.op != "call_function":
            continue
        values: dict[fx.Node, fx.Node] = {}
        with graph.inserting_before(node):
            for inner in unit.nodes:
                if inner.op == "placeholder":
                    values[inner] = node.all_input_nodes[0]
                elif inner.op == "output":
                    node.replace_all_uses_with(values[inner.all_input_nodes[0]])
                else:
                    # What several functions of one node share is computed once.
                    key = repr((inner.target, *fx.node.map_arg((inner.args, inner.kwargs), values.__getitem__)))
                    if key not in made:
                        made[key] = graph.node_copy(inner, values.__getitem__)
                    values[inner] = made[key]
        graph.erase_node(node)


def _run_again(graph: fx.Graph, num_forward_outputs: int) -> set[fx.Node]:
    """What a checkpoint of the user's recomputes, and what the backward alone makes of that."""
    needed = {node for node in graph_outputs(graph)[:num_forward_outputs] if isinstance(node, fx.Node)}
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_recomputed(node) or (node not in needed and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _may_pin(node: fx.Node) -> bool:
    return node.op == "call_function" and not _is_recomputed(node)


def _is_recomputed(node: fx.Node) -> bool:
    return node.meta.get("recompute") in _USER_RECOMPUTES


def _ban_reductions(graph: fx.Graph) -> None:
    """Marks what the partitioner would tell by its size: operators that yield far less than they read.

    Not by the sizes that stand for bounded functions: a product with one is no reduction.
    """
    dependent = tangent_dependent(graph)
    for node in graph.nodes:
        if _may_pin(node) and node not in dependent and node.target is not operator.getitem:
            read = sum(_nbytes(value) for value in node.args if isinstance(value, fx.Node))
            if _nbytes(node) * _REDUCTION_RATIO < read:
                node.meta[_REDUCTION] = node.meta.get("recompute")
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _nbytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    return sum(hint(one.numel()) * one.element_size() for one in values if isinstance(one, torch.Tensor))


def _fold(graph: fx.Graph, units: dict[fx.Node, Unit]) -> None:
    """Case 4."""
    folded = {node: _graph_of(unit) for node, unit in units.items() if not any(map(_is_recomputed, unit.nodes))}
    roots = {node: units[node].root for node in folded}
    stands_for: dict[fx.Node, fx.Node] = {}
    for node in [node for node in graph.nodes if node in folded]:
        with graph.inserting_before(node):
            # An operator that the partitioner knows as one to be run again.
            one = graph.call_function(aten.sigmoid.default, (stands_for.get(roots[node], roots[node]),))
        # The root is what to save: where the function is small, it says more. To the partitioner a value counts by its
        # bytes.
        one.meta = {**node.meta, _UNIT: (folded[node], node.meta["val"]), "val": node.meta["val"].to(torch.complex128)}
        node.replace_all_uses_with(one)
        stands_for[node] = one


def _graph_of(unit: Unit) -> fx.Graph:
    graph = fx.Graph()
    values = {unit.root: graph.placeholder("root")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in values:
            # A constant.
            values[node] = graph.node_copy(node)
        return values[node]

    for node in unit.nodes:
        values[node] = graph.node_copy(node, copied)
    graph.output(values[unit.nodes[-1]])
    return graph


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
