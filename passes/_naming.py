"""What nodes are called where people read or write about them: reports, plans, patterns."""

import operator
import re
from collections.abc import Container, Iterator, Sequence

import torch
from torch import fx

# What Dynamo calls for .T, .mT, .H and .mH, from 2.14 on; before, getattr.
_ATTRIBUTES = frozenset({"numpy_T", "mT", "matrix_H", "mH"})

# Our own frames around the user's model.
_WRAPPERS = ("actcompile/_isolated.py", "actcompile/_torch.py")


def module_path(node: fx.Node) -> str:
    """Dotted path of the module that computed ``node``, or an empty string for the model itself."""
    # What autograd made, carries the module of the operator that it belongs to.
    stack = list((node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}).values())
    if not stack:
        return ""
    # "L['self'].layers.0.fc", "L['self']._modules['layers']._modules['0']" and the like.
    names = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", str(stack[-1][0])).split(".")
    return ".".join(name for name in names[2:] if name and name != "_modules")


def operator_name(node: fx.Node) -> str:
    """Short name of what computed ``node``: "addmm", "gelu", "placeholder"."""
    if node.op != "call_function":
        return node.op
    if node.target is operator.getitem:
        (above, *_) = node.all_input_nodes
        return operator_name(above)
    name = getattr(node.target, "__name__", str(node.target))
    return name.split(".")[0]


def source_line(node: fx.Node) -> str:
    """``file.py:line`` of the user's code that made ``node``, or an empty string."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    found = [(path, line) for path, line in frames if not path.endswith(_WRAPPERS)]
    return f"{found[-1][0].rsplit('/', 1)[-1]}:{found[-1][1]}" if found else ""


def call_sites(graph: fx.Graph) -> tuple[str, ...]:
    """What a graph of Dynamo's computes, without sizes: module and function of every node that yields tensors."""
    calls = (node for node in graph.nodes if node.op in ("call_function", "call_method", "call_module"))
    return tuple(f"{module_path(node)}/{called(node)}" for node in calls if _yields_tensors(node))


def called(node: fx.Node) -> str:
    """Short name of what a node of Dynamo's graph calls, the same under every version of torch."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    return "getattr" if name in _ATTRIBUTES and not isinstance(node.target, str) else name


def _yields_tensors(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    # Sizes, and the tuples that pass between parts of a graph, come and go with the batch and the bucket.
    first = value[0] if isinstance(value, tuple | list) and value else value
    return node.target is not operator.getitem and isinstance(first, torch.Tensor)


def saved_keys(nodes: Sequence[fx.Node], parameters: Container[fx.Node] = ()) -> Iterator[str]:
    """One key per saved tensor that survives other batch sizes, ranks and restarts: module, operator, number.

    Inputs of the graph are called after the first module that uses them: parts of one model each have their own.
    ``parameters`` among them take no numbers of others, whichever of them a graph saves.
    """
    seen: dict[str, int] = {}
    for node in nodes:
        named = next((user for user in node.users if module_path(user)), node) if node.op == "placeholder" else node
        stem = f"{module_path(named)}/{'parameter' if node in parameters else operator_name(node)}"
        seen[stem] = seen.get(stem, 0) + 1
        yield stem if seen[stem] == 1 else f"{stem}#{seen[stem]}"
