"""Lets weight gradients and attention's backward read the largest elements of each sample. Changes gradients.

    before                                      after
    y = linear(x, w, b)                         y = operators.linear(x, w, b)
    s = matmul(q, k);  p = softmax(s / 8)       s = operators.matmul(q, k)
    o = matmul(p, v)                            o = operators.attend(s / 8, v)

    1. linear, layer_norm, conv2d, gelu         by the operators of the same names
    2. scaled_dot_product_attention,            by their single steps
       multi_head_attention_forward
    3. matmul with a weight, addmm              as a linear layer
    4. matmul whose result leads to a softmax   both operands pruned; on the way may be scales, masks and views
    5. matmul of a softmax's result             fused with the softmax, where nothing else reads that; else, as with
                                                dropout in between, softmax and matmul each prune what they read

It rewrites a graph of Dynamo's, which autograd differentiates afterwards, and not a pair. Other operators are never
touched: ``einsum``, ``baddbmm``, nn.MultiheadAttention that returns its weights or has parameters besides the usual,
what is inside of a checkpoint, convolutions of images without a batch, or with other padding on one side, and whatever
needs no gradient.

Source: Jiang et al., "Back Razor", NeurIPS 2022; the operators that its models replace.
"""

import inspect
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ._naming import called, module_path
from ._sample_operators import SampleOperators, named_padding

# Calls that are replaced one by one, with their arguments as they are.
_REPLACED: Mapping[Any, str] = {
    F.linear: "linear",
    F.gelu: "gelu",
    F.layer_norm: "layer_norm",
    F.conv2d: "conv2d",
    F.scaled_dot_product_attention: "attention",
}
_MATMULS = frozenset({torch.matmul, operator.matmul, torch.bmm, "matmul", "bmm"})
# Softmax -> the position of its dtype.
_SOFTMAXES: Mapping[Any, int] = {F.softmax: 3, torch.softmax: 2, "softmax": 2}

# What may lie between attention's products and its softmax, by name.
_SCALES = {"add", "sub", "mul", "div", "truediv", "iadd", "isub", "imul", "itruediv", "tanh", "clamp", "clamp_min"}
_MASKS = {"where", "masked_fill", "max", "maximum", "dropout"}
_VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "transpose", "permute"}
# What keeps a softmax's result as it is, up to its dtype, when there is no dropout.
_CASTS = {"to", "float", "half", "bfloat16", "type_as", "contiguous"}
_BETWEEN = _SCALES | _MASKS | _VIEWS | _CASTS | {"getattr", "getitem"}
# What makes a weight of a weight.
_OF_WEIGHTS = _VIEWS | _CASTS | {"getattr", "getitem", "t"}


def prune_samples(graph: fx.Graph, operators: SampleOperators, skip: Sequence[str] = ()) -> None:
    """Rewrites ``graph`` in place; see the module docstring.

    Args:
        graph: A graph of Dynamo's, with "example_value" in its nodes' meta.
        operators: What it calls afterwards.
        skip: Patterns of module names whose operators stay as they are.
    """
    nodes = [node for node in graph.nodes if _is_differentiable(node) and not _is_skipped(node, skip)]
    softmaxes = {node for node in nodes if node.target in _SOFTMAXES and isinstance(_dim_and_dtype(node)[0], int)}
    scores = {found for node in softmaxes for found in _sources(node, _MATMULS)}
    read = {node: _sources(node, _SOFTMAXES) & softmaxes for node in nodes if _is_product(node)}
    separate: set[fx.Node] = set()
    for node, found in read.items():
        softmax = _read_directly(node, found)
        if softmax is not None:
            _attend(node, softmax, operators)
        elif node in scores or found:
            _call(node, operators.matmul, *_operands(node))
            separate |= found
    for node in separate:
        _call(node, operators.softmax, _first(node), *_dim_and_dtype(node))
    for node in nodes:
        _replace(node, operators)
    graph.lint()


def _replace(node: fx.Node, operators: SampleOperators) -> None:
    """Cases 1 to 3: one call for another."""
    if node.target in _REPLACED:
        replacement = getattr(operators, _REPLACED[node.target])
        if _is_supported(node, inspect.signature(replacement).bind(*node.args, **node.kwargs).arguments):
            _call(node, replacement, *node.args, **node.kwargs)
    elif node.target in _MATMULS:
        first, second = _operands(node)
        if _is_weight(second) and not _is_weight(first):
            _call(node, operators.matmul_weight, first, second)
    elif node.target is torch.addmm and not node.kwargs and _is_weight(node.args[2]):
        _call(node, operators.addmm_weight, *node.args)
    elif node.target is F.multi_head_attention_forward:
        _attend_with_heads(node, operators)


def _attend_with_heads(node: fx.Node, operators: SampleOperators) -> None:
    """Case 2, of nn.MultiheadAttention with one matrix for all projections, where nobody reads the probabilities."""
    given = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
    given.apply_defaults()
    have = given.arguments
    beside = ("bias_k", "bias_v", "static_k", "static_v")
    unlike = [have[name] for name in ("add_zero_attn", "need_weights", "use_separate_proj_weight")]
    if any(unlike) or any(have[name] is not None for name in beside) or _value(have["query"]).dim() != 3:
        return
    _call(
        node,
        operators.multi_head_attention,
        (have["query"], have["key"], have["value"]),
        have["num_heads"],
        (have["in_proj_weight"], have["in_proj_bias"]),
        (have["out_proj_weight"], have["out_proj_bias"]),
        have["dropout_p"] if have["training"] else 0.0,
        (have["key_padding_mask"], have["attn_mask"]),
    )


def _is_supported(node: fx.Node, arguments: Mapping[str, Any]) -> bool:
    if node.target is F.linear:
        return _value(arguments["weight"]).dim() == 2
    if node.target is F.conv2d:
        padding, dilation, weight = arguments.get("padding", 0), arguments.get("dilation", 1), arguments["weight"]
        is_even = not isinstance(padding, str) or named_padding(padding, _value(weight), dilation) is not None
        return is_even and _value(arguments["input"]).dim() == 4
    return True


def _attend(node: fx.Node, softmax: fx.Node, operators: SampleOperators) -> None:
    """Case 5, fused; what lay between the two computes nothing any more and goes."""
    above, values = _operands(node)
    _call(node, operators.attend, _first(softmax), values, *_dim_and_dtype(softmax))
    while not above.users:
        idle, above = above, _first(above)
        node.graph.erase_node(idle)
        if idle is softmax:
            return


def _read_directly(node: fx.Node, softmaxes: Collection[fx.Node]) -> fx.Node | None:
    """The softmax whose result is the first operand of ``node`` and goes nowhere else, or None."""
    value = _operands(node)[0]
    while len(value.users) == 1 and value not in softmaxes:
        is_idle = value.target is F.dropout and _is_idle(*value.args[1:3], **value.kwargs)
        if not is_idle and not (value.op.startswith("call") and _name(value) in _CASTS):
            return None
        value = _first(value)
    return value if len(value.users) == 1 else None


def _is_idle(p: float = 0.5, training: bool = True, **kwargs: Any) -> bool:
    """Whether a dropout with these arguments drops nothing."""
    return not training or p == 0


def _sources(node: fx.Node, targets: Collection[Any]) -> set[fx.Node]:
    """Calls of ``targets`` whose results reach ``node`` through nothing but scales, masks and views."""
    found, open_nodes, seen = set(), list(node.all_input_nodes), set()
    while open_nodes:
        above = open_nodes.pop()
        if above in seen or not above.op.startswith("call"):
            continue
        seen.add(above)
        if above.target in targets:
            found.add(above)
        elif _name(above) in _BETWEEN:
            open_nodes += above.all_input_nodes
    return found


def _is_product(node: fx.Node) -> bool:
    """Whether ``node`` multiplies two activations of two or more dimensions."""
    if node.target not in _MATMULS:
        return False
    return all(_value(operand).dim() >= 2 and not _is_weight(operand) for operand in _operands(node))


def _is_weight(node: Any) -> bool:
    """Whether ``node`` is a matrix of parameters, or a rearranged one."""
    if not isinstance(node, fx.Node) or not isinstance(_value(node), torch.Tensor) or _value(node).dim() != 2:
        return False
    while node.op != "placeholder":
        if _name(node) not in _OF_WEIGHTS:
            return False
        node = _first(node)
    return isinstance(_value(node), torch.nn.Parameter) or getattr(_value(node), "_is_param", False)


def _is_differentiable(node: fx.Node) -> bool:
    value = _value(node)
    if node.target is F.multi_head_attention_forward:
        value, _ = value
    return node.op in ("call_function", "call_method") and isinstance(value, torch.Tensor) and value.requires_grad


def _is_skipped(node: fx.Node, skip: Sequence[str]) -> bool:
    return any(fnmatchcase(module_path(node), pattern) for pattern in skip)


def _operands(node: fx.Node) -> tuple[Any, Any]:
    first, second = (*node.args, *node.kwargs.values())[:2]
    return first, second


def _first(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs["input"]


def _dim_and_dtype(softmax: fx.Node) -> tuple[Any, Any]:
    position = _SOFTMAXES[softmax.target]
    named, args = softmax.kwargs, softmax.args
    dim = named["dim"] if "dim" in named else args[1] if len(args) > 1 else None
    return dim, args[position] if len(args) > position else named.get("dtype")


def _name(node: fx.Node) -> str:
    return called(node).removesuffix("_")


def _value(node: Any) -> Any:
    return node.meta.get("example_value")


def _call(node: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Lets ``node`` call ``target`` instead."""
    node.op, node.target, node.args, node.kwargs = "call_function", target, args, kwargs
