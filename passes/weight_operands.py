"""Which inputs of Dynamo's graphs are weights, by the operators that read them."""

from torch import fx

from ._naming import called

# Operators of Dynamo's graphs that read weights -> their positions and names.
_LAYERS: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "linear": ((1, 2), ("weight", "bias")),
    "bilinear": ((2, 3), ("weight", "bias")),
    "embedding": ((1,), ("weight",)),
    "embedding_bag": ((1,), ("weight",)),
    "layer_norm": ((2, 3), ("weight", "bias")),
    "group_norm": ((2, 3), ("weight", "bias")),
    "rms_norm": ((2,), ("weight",)),
    "batch_norm": ((3, 4), ("weight", "bias")),
    "instance_norm": ((3, 4), ("weight", "bias")),
    "prelu": ((1,), ("weight",)),
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        ((1, 2), ("weight", "bias")),
    ),
}
# What may lie between a weight and the operator: it is the weight still, in other dimensions or another type.
_SAME = frozenset(
    {
        *("t", "transpose", "permute", "view", "reshape", "contiguous", "squeeze", "unsqueeze", "flatten", "T", "mT"),
        *("to", "type", "type_as", "float", "half", "bfloat16", "getitem", "getattr", "split", "chunk", "narrow"),
    }
)
_MATRIX = 2


def is_weight_operand(placeholder: fx.Node) -> bool:
    """Whether layers read an input of Dynamo's graph as their weight or bias, and nothing reads it as anything else.

    A matrix that multiplies batches of matrices from the right is one, too; two matrices may be anything.
    """
    pending, seen, found = [placeholder], {placeholder}, False
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.op == "output":
                return False
            name = called(user)
            if name in _SAME and user.args[:1] == (node,):
                if user not in seen:
                    seen.add(user)
                    pending.append(user)
            elif _reads_as_weight(user, name, node):
                found = True
            else:
                return False
    return found


def _reads_as_weight(user: fx.Node, name: str, node: fx.Node) -> bool:
    if name in ("matmul", "__matmul__"):
        return _num_dims(user.args[0]) > _MATRIX == _num_dims(node) and user.args[1:] == (node,)
    positions, names = _LAYERS.get(name, ((), ()))
    places = {position for position, value in enumerate(user.args) if value is node}
    keywords = {key for key, value in user.kwargs.items() if value is node}
    return bool(places | keywords) and places <= set(positions) and keywords <= set(names)


def _num_dims(value: object) -> int:
    example = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    return getattr(example, "ndim", 0)
