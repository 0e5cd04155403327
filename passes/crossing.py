"""What passes between the graphs of one call, where a graph break or DDP cuts it, and who saves it there.

A tensor that one graph returns and the next one reads is one tensor for autograd: what both save as it is, lies in
memory once. It is named by its place among the inputs or outputs of Dynamo's graph, ("in", 3) or ("out", 0).
"""

from collections.abc import Iterable, Sequence

from torch import fx

from actcompile.plan import Role

from ._fx import GraphPair, graph_outputs, hint_nbytes, input_index, is_tensor
from ._views import storage

Crossing = tuple[str, int]


def crossings(pair: GraphPair) -> dict[str, Crossing]:
    """Keys of the slots whose tensors cross to or from other graphs -> where."""
    places = _places(pair.roles.items(), pair.user_outputs, pair.user_descriptors)
    roots = {slot.key: storage(slot.source) for slot in pair.slots}
    return {key: places[root] for key, root in roots.items() if root in places}


def saved_nbytes(forward: fx.Graph, num_outputs: int, input_roles: Sequence[Role]) -> dict[Crossing | None, int]:
    """Bytes that ``forward``, as torch.compile splits it, saves for the backward, what others hold left out.

    Args:
        forward: The forward's graph; its outputs behind the first ``num_outputs`` are saved.
        num_outputs: Outputs that the model returns.
        input_roles: Roles of the graph's inputs.

    Returns:
        Bytes of what crosses to or from other graphs by its place, and under None of all else.
    """
    outputs = graph_outputs(forward)
    roles = {node: _role(node, input_roles) for node in forward.find_nodes(op="placeholder")}
    places = _places(roles.items(), outputs[:num_outputs], forward.output_node().meta.get("desc", ()))
    parts: dict[fx.Node, int] = {}
    for node in dict.fromkeys(node for node in outputs[num_outputs:] if isinstance(node, fx.Node) and is_tensor(node)):
        root = storage(node)
        if roles.get(root, Role.BOUNDARY) is Role.BOUNDARY:
            parts[root] = parts.get(root, 0) + hint_nbytes(node)
    found: dict[Crossing | None, int] = {None: 0}
    for root, nbytes in parts.items():
        # Views of one tensor keep it once.
        nbytes = min(nbytes, hint_nbytes(root)) if is_tensor(root) else nbytes
        found[places.get(root)] = found.get(places.get(root), 0) + nbytes
    return found


def _role(placeholder: fx.Node, input_roles: Sequence[Role]) -> Role:
    index = input_index(placeholder)
    return input_roles[index] if index is not None and index < len(input_roles) else Role.INPUT


def _places(
    roles: Iterable[tuple[fx.Node, Role]], outputs: Sequence[object], descriptors: Sequence[object]
) -> dict[fx.Node, Crossing]:
    """Where the memory of inputs that earlier graphs computed, and of outputs, crosses."""
    pairs = zip(outputs, descriptors, strict=False)
    returned = [(node, getattr(desc, "idx", None)) for node, desc in pairs if isinstance(node, fx.Node)]
    places: dict[fx.Node, Crossing] = {storage(node): ("out", idx) for node, idx in returned if idx is not None}
    for node, role in roles:
        index = input_index(node)
        if role is Role.BOUNDARY and index is not None:
            places[node] = ("in", index)
    return places
