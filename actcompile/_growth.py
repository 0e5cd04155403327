"""Both graphs of a pair on meta tensors, with a batch several times as large as the traced one.

Traced graphs hold sizes as numbers. Numbers that are sizes grow with the batch

    view         the dimension that starts at the same element as the batch of what is viewed
    expand       the dimension of the batch of what is expanded
    full, ...    the first dimension, where it is as long as some batch dimension before
    iota         likewise: the numbers of the samples; in the backward only where it picks every sample in turn

Whatever mixes up the order of the samples, or picks some of them, is refused, and so is what does not fit together.
"""

import math
import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ._seeded import RANDOM
from .passes._fx import GraphPair, Slot, graph_outputs, hint, is_tensor
from .passes._views import VIEW_OPS, value_chain
from .passes.place_codecs import DECODERS, ENCODERS
from .plan import Role

aten = torch.ops.aten

# A batch this many times as large fits nothing but itself, nor can it be taken for a dimension of one element.
_GROWTH = 3

_IOTA = torch.ops.prims.iota.default
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
# Arguments that hold the sizes of a result or of an input.
_SIZES = ("size", "shape", "input_sizes")
# Operators that may treat the batch as they do any dimension they are given: they sum over it, or leave it as it is.
_HARMLESS_ALONG = ("sum", "mean", "var", "var_mean", "amax", "amin", "any", "squeeze", "unsqueeze", "expand")
# Operators that are given tensors of positions, for all dimensions of what they index or for those given.
_INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put", "take")


class NotSeparableError(Exception):
    """A graph that does not work on one sample after the other, or not visibly so."""


class WrongGuessError(NotSeparableError):
    """Constants that must not have grown."""

    def __init__(self, message: str, names: frozenset[str]) -> None:
        super().__init__(message)
        self.names = names


class Growth:
    """Both graphs on meta tensors, the batch ``_GROWTH`` times as large.

    Args:
        pair: The graphs, with codecs.
        size: The batch of the traced call.
        grown: Whether constants whose first dimension has the length of a batch dimension grow with it.
        held: Names of those that do not.
    """

    def __init__(self, pair: GraphPair, size: int, grown: bool, held: frozenset[str] = frozenset()) -> None:
        # Of the graph that is being run.
        self.dims: dict[str, int] = {}
        self._pair = pair
        self._size = size
        self._grown = grown
        self._held = held
        self._guessed: set[fx.Node] = set()
        self._is_forward = True
        self._lengths = {size}
        self._values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self._run_forward()
            self._run_backward()

    def _run_forward(self) -> None:
        roles = self._pair.roles
        for node in self._pair.forward.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            is_batch = roles[node] in (Role.INPUT, Role.PADDING, Role.BOUNDARY) and is_tensor(node) and value.dim()
            self._enter(node, 0 if is_batch and hint(value.shape[0]) == self._size else None)
        for node in self._pair.forward.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._visit(node)

    def _run_backward(self) -> None:
        pair = self._pair
        forward, self.dims, self._is_forward = self.dims, {}, False
        decoded: dict[fx.Node, int | None] = {}
        for slot in pair.slots:
            source = _encoded(slot)
            dim = forward.get(source.name)
            for placeholder in slot.placeholders:
                if source is slot.outputs[0]:
                    self._enter(placeholder, dim)
                decoded[placeholder] = dim
        for node in pair.symbol_placeholders:
            self._enter(node, None)
        outputs = [
            (node, forward.get(node.name))
            for node in pair.user_outputs
            if isinstance(node, fx.Node) and is_tensor(node)
        ]
        for node in pair.backward.graph.find_nodes(op="placeholder"):
            if node not in decoded and node not in pair.symbol_placeholders:
                self._enter(node, self._tangent_dim(node, outputs))
        for node in pair.backward.graph.nodes:
            if node.target in DECODERS:
                self._enter(node, decoded[node.all_input_nodes[0]])
            elif node.op not in ("placeholder", "output"):
                self._visit(node)
        inputs = pair.forward.graph.find_nodes(op="placeholder")
        for gradient, node in zip(graph_outputs(pair.backward.graph), inputs, strict=False):
            if isinstance(gradient, fx.Node) and self.dims.get(gradient.name) != forward.get(node.name):
                message = f"{gradient} is the gradient of {node}, and the batch lies elsewhere in it"
                guesses = frozenset(source.name for source in gradient.all_input_nodes if source in self._guessed)
                raise WrongGuessError(message, guesses) if guesses else NotSeparableError(message)

    def _tangent_dim(self, tangent: fx.Node, outputs: list[tuple[fx.Node, int | None]]) -> int | None:
        """That of the first output left which has the shape of ``tangent``; tangents come in the order of outputs."""
        while outputs:
            output, dim = outputs.pop(0)
            if output.meta["val"].shape == tangent.meta["val"].shape:
                return dim
        raise NotSeparableError(f"{tangent} belongs to no output")

    def _enter(self, node: fx.Node, dim: int | None) -> None:
        """Gives ``node``, whose value comes from outside, one without data."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            grows = isinstance(value, torch.SymInt) and hint(value) == self._size
            self._values[node] = hint(value) * (_GROWTH if grows else 1) if value is not None else None
            return
        shape = [hint(length) for length in value.shape]
        if dim is not None:
            shape[dim] *= _GROWTH
            self._note(node, dim)
        order = sorted(range(len(shape)), key=lambda d: (-hint(value.stride(d)), d))
        self._values[node] = torch.empty_permuted(shape, order, dtype=value.dtype, device="meta")

    def _note(self, node: fx.Node, dim: int) -> None:
        self.dims[node.name] = dim
        self._lengths.add(hint(node.meta["val"].shape[dim]))

    def _visit(self, node: fx.Node) -> None:
        """Runs ``node`` and notes which dimension of its result grew."""
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(node.graph.owning_module)
            self._values[node] = value.to("meta")
            return
        if node.target in ENCODERS or any(self._values.get(source) is _CODES for source in node.all_input_nodes):
            self._values[node] = _CODES
            return
        self._check_order(node)
        try:
            self._run(node)
        except RuntimeError:
            # A constant may have to grow whose length says nothing.
            constants = [source for source in node.all_input_nodes if self._may_grow(source)]
            if not constants:
                raise
            for source in constants:
                self._run(source, grow=True)
            self._run(node)

    def _run(self, node: fx.Node, grow: bool = False) -> None:
        args: list[Any] = list(fx.node.map_arg(node.args, self._values.__getitem__))
        kwargs: dict[str, Any] = dict(fx.node.map_arg(node.kwargs, self._values.__getitem__))
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        position = sizes_position(node)
        if position is not None:
            args[position] = self._sizes(node, grow)
        elif node.target is _IOTA and self._grown and args[0] in self._lengths and self._may_number(node):
            args[0] *= _GROWTH
        value = self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(value, torch.Tensor):
            old = [hint(length) for length in node.meta["val"].shape]
            changed = [dim for dim, length in enumerate(value.shape) if length != old[dim]]
            if len(changed) > 1 or any(value.shape[dim] != _GROWTH * old[dim] for dim in changed):
                raise NotSeparableError(f"{node.format_node()} has {list(value.shape)} in place of {old}")
            for dim in changed:
                self._note(node, dim)

    def _is_all(self, index: Any) -> bool:
        """Whether ``index`` holds the numbers of all samples, in order."""
        return isinstance(index, fx.Node) and index.name in self.dims and _counts(index)

    def _may_number(self, node: fx.Node) -> bool:
        """Whether ``node`` holds the numbers of samples; of some samples alone, they are positions among these."""
        return self._is_forward or all(map(_is_picked_by, _ends_of_views(node)))

    def _may_grow(self, node: fx.Node) -> bool:
        """Whether ``node`` is a constant that has not grown yet."""
        is_constant = not any(source.name in self.dims for source in node.all_input_nodes)
        if node.name in self.dims or not is_constant or sizes_position(node) is None:
            return False
        shape = node.meta["val"].shape
        return len(shape) > 0 and hint(shape[0]) % self._size == 0

    def _sizes(self, node: fx.Node, grow: bool) -> list[int]:
        """The sizes that ``node`` is given, grown."""
        sizes = [hint(length) for length in node.meta["val"].shape]
        sources = node.all_input_nodes
        if node.target in _VIEWS or node.target is aten.expand.default:
            dim = self.dims.get(sources[0].name)
            if dim is not None:
                sizes[_moved(sources[0], dim, node)] *= _GROWTH
                return sizes
        is_guess = self._grown and sizes and sizes[0] in self._lengths and node.target not in _VIEWS
        if node.name not in self._held and (grow or is_guess):
            self._guessed.add(node)
            sizes[0] *= _GROWTH
        return sizes

    def _check_order(self, node: fx.Node) -> None:
        """Raises when ``node`` mixes up the samples, or picks some of them."""
        if not node.all_input_nodes or not isinstance(node.target, torch._ops.OpOverload):
            return
        if not self._is_forward and node.target._schema.name in RANDOM:
            raise NotSeparableError(f"{node.format_node()} draws other numbers for fewer samples")
        first = node.all_input_nodes[0]
        dim, name = self.dims.get(first.name), node.target._schema.name.split("::")[1]
        if dim is None:
            return
        if dim in _dims_along(node, name, first) and name not in _HARMLESS_ALONG:
            raise NotSeparableError(f"{node.format_node()} works along the batch")
        if name in _INDEXED:
            indices = node.args[1]
            picked = indices[dim : dim + 1] if isinstance(indices, Sequence) else [indices]
            if not all(index is None or self._is_all(index) for index in picked):
                raise NotSeparableError(f"{node.format_node()} picks samples")


# Stands for results of encoders, which have no dimensions.
_CODES = object()


def _encoded(slot: Slot) -> fx.Node:
    """What ``slot`` stores: its encoder's operand, or what crosses as it is."""
    node = slot.outputs[0]
    if node.target is operator.getitem:
        (above,) = node.all_input_nodes
        node = above if above.target in ENCODERS else node
    return node.all_input_nodes[0] if node.target in ENCODERS else node


def _dims_along(node: fx.Node, name: str, operand: fx.Node) -> list[int]:
    """The dimensions of ``operand`` that ``node`` works along."""
    given: dict[str, Any] = {a.name: v for a, v in zip(node.target._schema.arguments, node.args, strict=False)}  # type: ignore[union-attr]
    dims: Sequence[Any] = (
        given.get("dims", []) if name in ("flip", "rev", "roll") else [given.get("dim", 0 if name == "cat" else None)]
    )
    if name == "cat" and len(node.all_input_nodes) == 1:
        return []
    if name == "slice" and not given.get("start") and hint(given.get("end") or 0) in (0, sys.maxsize):
        return []
    return [dim % operand.meta["val"].dim() for dim in dims if isinstance(dim, int)]


def _ends_of_views(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Views of ``node``, itself among them, each with a user that is no view."""
    found, pending = [], [node]
    while pending:
        view = pending.pop()
        for user in view.users:
            if user.target in VIEW_OPS:
                pending.append(user)
            else:
                found.append((view, user))
    return found


def _is_picked_by(end: tuple[fx.Node, fx.Node]) -> bool:
    """Whether a view is an index of its user, and nothing else."""
    view, user = end
    if not isinstance(user.target, torch._ops.OpOverload) or user.target._schema.name.split("::")[1] not in _INDEXED:
        return False
    return view not in (user.args[0], *user.args[2:])


def _counts(index: fx.Node) -> bool:
    """Whether ``index`` holds 0, 1, 2, ... in this order."""
    root = value_chain(index)[-1]
    return root.target is _IOTA and (root.kwargs.get("start"), root.kwargs.get("step")) == (0, 1)


def sizes_position(node: fx.Node) -> int | None:
    """The position of the argument of ``node`` that holds sizes."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = [argument.name for argument in node.target._schema.arguments]
    return next((i for i, name in enumerate(names[: len(node.args)]) if name in _SIZES), None)


def _moved(source: fx.Node, dim: int, node: fx.Node) -> int:
    """The dimension of a view or expansion ``node`` of ``source`` that holds what its ``dim`` does."""
    before = [hint(length) for length in source.meta["val"].shape]
    after = [hint(length) for length in node.meta["val"].shape]
    if node.target is aten.expand.default:
        return dim + len(after) - len(before)
    start = math.prod(before[:dim])
    for candidate, length in enumerate(after):
        if length > 1 and math.prod(after[:candidate]) == start:
            return candidate
    raise NotSeparableError(f"{node.format_node()} cuts through the batch")
