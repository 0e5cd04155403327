"""The pair of graphs that the passes rewrite, and what they share to do so."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from actcompile import triton_kernels as _operators  # noqa: F401  defines them
from actcompile.plan import Role

from ._naming import saved_keys

# Forward outputs carry this flag when autograd must not check their version; what replaces them carries it too.
NO_VERSION_CHECK = "saved_tensor_with_no_vc_check"

# Encoders and decoders of saved tensors carry the key of their row under this name.
ROW_KEY = "actcompile_row"


@dataclass
class Slot:
    """What crosses from the forward to the backward for one saved tensor.

    ``outputs`` are nodes of the forward, ``placeholders`` the nodes of the backward that receive them, pairwise.
    """

    key: str
    outputs: list[fx.Node]
    placeholders: list[fx.Node]

    @property
    def source(self) -> fx.Node:
        """The saved tensor's forward node, as long as nothing replaced it."""
        assert len(self.outputs) == 1, self
        return self.outputs[0]

    @property
    def placeholder(self) -> fx.Node:
        """The saved tensor's backward node, as long as nothing replaced it."""
        assert len(self.placeholders) == 1, self
        return self.placeholders[0]


@dataclass
class GraphPair:
    """Forward and backward after the partition; saved tensors are matched by position, once, here.

    ``input_roles`` are those of the graph's inputs, whose gradients the backward returns in this order. ``is_part``
    says that its outputs go to other graphs of the same call, and nobody else needs to keep them.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    user_outputs: list[Any]
    slots: list[Slot]
    trailing_outputs: list[Any]
    symbol_placeholders: list[fx.Node]
    seed: fx.Node | None
    roles: dict[fx.Node, Role]
    input_roles: Sequence[Role]
    descriptors: dict[Any, Any] = field(default_factory=dict)
    user_descriptors: Sequence[Any] = ()
    is_part: bool = False

    @classmethod
    def from_partition(
        cls,
        forward: fx.GraphModule,
        backward: fx.GraphModule,
        num_user_outputs: int,
        num_pinned: int,
        input_roles: Sequence[Role],
        is_part: bool = False,
    ) -> "GraphPair":
        """Matches the outputs of ``forward`` with the placeholders of ``backward``.

        The forward ends with saved tensors, opaque objects and symbolic sizes; the backward begins with the symbolic
        sizes and the saved tensors.

        Args:
            forward: The forward's graph.
            backward: The backward's graph.
            num_user_outputs: Outputs of the forward that the model returns.
            num_pinned: Outputs behind them that were there for the partition alone; dropped.
            input_roles: Roles of the graph's inputs; a seed is the last of them.
            is_part: Whether other graphs of the same call read what it returns.
        """
        output = forward.graph.output_node()
        outputs = graph_outputs(forward.graph)
        saved = list(outputs[num_user_outputs + num_pinned :])
        tensors = [node for node in saved if isinstance(node.meta.get("val"), torch.Tensor)]
        assert saved[: len(tensors)] == tensors, saved
        trailing = saved[len(tensors) :]
        num_symbols = sum(isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | int) for node in trailing)
        placeholders = backward.graph.find_nodes(op="placeholder")
        received = placeholders[num_symbols : num_symbols + len(tensors)]
        descriptors = dict(zip(outputs, output.meta["desc"], strict=True)) if "desc" in output.meta else {}
        roles = roles_of_inputs(forward.graph, input_roles)
        parameters = {node for node, role in roles.items() if role is Role.PARAMETER}
        pair = cls(
            forward,
            backward,
            user_outputs=list(outputs[:num_user_outputs]),
            slots=[
                Slot(key, [node], [placeholder])
                for key, node, placeholder in zip(saved_keys(tensors, parameters), tensors, received, strict=True)
            ],
            trailing_outputs=trailing,
            symbol_placeholders=placeholders[:num_symbols],
            seed=_find_seed(forward) if Role.SEED in input_roles else None,
            roles=roles,
            input_roles=input_roles,
            descriptors=descriptors,
            # What is saved, too, is known by its last place.
            user_descriptors=output.meta.get("desc", ())[:num_user_outputs],
            is_part=is_part,
        )
        pair.sync()
        return pair

    def sync(self) -> None:
        """Writes the slots into both graphs: the forward's outputs and the order of the backward's placeholders."""
        self.slots = [slot for slot in self.slots if slot.outputs]
        # Autograd slices its saved tensors into those under version check and those without.
        self.slots.sort(key=lambda slot: bool(slot.outputs[0].meta.get(NO_VERSION_CHECK, False)))
        output = self.forward.graph.output_node()
        saved = [node for slot in self.slots for node in slot.outputs]
        outputs = [*self.user_outputs, *saved, *self.trailing_outputs]
        output.args = (tuple(outputs),)
        if "desc" in output.meta:
            output.meta["desc"] = [self.descriptors.get(node) for node in outputs]
        placeholders = self.backward.graph.find_nodes(op="placeholder")
        received = [*self.symbol_placeholders, *(node for slot in self.slots for node in slot.placeholders)]
        rest = [node for node in placeholders if node not in set(received)]
        anchor = self.backward.graph._root
        for node in [*received, *rest]:
            anchor.append(node)
            anchor = node

    def replace(self, slot: Slot, outputs: Sequence[fx.Node]) -> list[fx.Node]:
        """Lets ``outputs`` cross in place of what ``slot`` holds; returns their new placeholders.

        The old placeholders stay until ``drop`` removes them, so that their users can be moved first.
        """
        source = slot.outputs[0]
        anchor = slot.placeholders[-1]
        created = []
        for position, node in enumerate(outputs):
            node.meta[NO_VERSION_CHECK] = source.meta.get(NO_VERSION_CHECK, False)
            if source in self.descriptors:
                self.descriptors[node] = self.descriptors[source]
            with self.backward.graph.inserting_after(anchor):
                anchor = self.backward.graph.placeholder(f"{slot.placeholders[0].name}_part{position}")
            # The argument's name; only the node's own name is made unique when it is taken.
            anchor.target = anchor.name
            anchor.meta["val"] = node.meta["val"]
            created.append(anchor)
        slot.outputs, slot.placeholders = list(outputs), created
        return created


def roles_of_inputs(graph: fx.Graph, input_roles: Sequence[Role]) -> dict[fx.Node, Role]:
    """Roles of the placeholders of a forward or joint graph; what cannot be told apart counts as the caller's."""
    roles = {}
    for node in graph.find_nodes(op="placeholder"):
        index = input_index(node)
        roles[node] = input_roles[index] if index is not None and index < len(input_roles) else Role.INPUT
    return roles


def input_index(placeholder: fx.Node) -> int | None:
    """Which input of Dynamo's graph a placeholder of the forward is; None where that is not known."""
    index: int | None = getattr(placeholder.meta.get("desc"), "idx", None)
    return index


def _find_seed(forward: fx.GraphModule) -> fx.Node:
    """The placeholder of the rounding seed, the last input of the graph: the last 0-d int64 among the primals."""
    return [
        node
        for node in forward.graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
        and node.meta["val"].dtype == torch.int64
        and node.meta["val"].dim() == 0
    ][-1]


def graph_outputs(graph: fx.Graph) -> list[Any]:
    """What ``graph`` returns: nodes and constants."""
    (outputs,) = graph.output_node().args
    return list(outputs)  # type: ignore[arg-type]


def is_tensor(node: fx.Node) -> bool:
    """Whether ``node`` yields one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def argument(node: fx.Node, name: str) -> Any:
    """What the operator of ``node`` was given for a parameter, or that parameter's default; None where it has none."""
    assert isinstance(node.target, torch._ops.OpOverload), node
    for position, parameter in enumerate(node.target._schema.arguments):
        if parameter.name == name:
            given = node.kwargs.get(name, parameter.default_value)
            return node.args[position] if position < len(node.args) else given
    return None


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether running ``node`` again may give another result: attention without dropout, for all its tag, does not."""
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else ()
    return torch.Tag.nondeterministic_seeded in tags and argument(node, "dropout_p") != 0.0


def tangent_dependent(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of a joint or backward graph that a tangent reaches, the tangents included."""
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
        if is_tangent or not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    return dependent


def retire(placeholder: fx.Node, replacement: fx.Node) -> None:
    """Lets the users of a placeholder read ``replacement`` and removes it."""
    placeholder.replace_all_uses_with(replacement)
    placeholder.graph.erase_node(placeholder)


def body_anchor(node: fx.Node) -> fx.Node:
    """The node to insert behind, so that what reads ``node`` comes after all placeholders."""
    return node if node.op != "placeholder" else node.graph.find_nodes(op="placeholder")[-1]


def size_args(pair: "GraphPair", sizes: Sequence[Any]) -> list[Any]:
    """Sizes as arguments of a backward node: ints, and nodes that compute the symbolic ones at the insertion point."""
    return [_size_arg(pair, size) if isinstance(size, torch.SymInt) else size for size in sizes]


def _size_arg(pair: "GraphPair", size: torch.SymInt) -> Any:
    expression = size.node.expr
    if expression.is_number:
        return int(expression)
    graph = pair.backward.graph
    bound = {node.meta["val"].node.expr: node for node in pair.symbol_placeholders if _is_symbolic(node)}
    if expression in bound:
        return bound[expression]
    before = set(graph.nodes)
    tracer = fx.proxy.GraphAppendingTracer(graph)
    environment = {symbol: fx.Proxy(node, tracer) for symbol, node in bound.items() if symbol.is_symbol}
    result = sympy_interp(PythonReferenceAnalysis, environment, expression)
    for node in graph.nodes:
        if node not in before:
            node.meta["val"] = node.target(*fx.node.map_arg(node.args, lambda n: n.meta["val"]))
    return result.node


def _is_symbolic(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.SymInt)


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Inserts a call at the graph's insertion point and gives it the ``val`` that its fake tensors say."""
    node = graph.call_function(target, args, kwargs)
    values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with fake_mode(graph):
        node.meta["val"] = target(*values[0], **values[1])
    # Inductor holds an operator to the strides it was traced with only where it finds them here.
    node.meta["eager_input_vals"] = values
    return node


def unpack_call(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Inserts the getitems of a node that returns a tuple, right behind it."""
    items, anchor = [], node
    for position in range(len(node.meta["val"])):
        with graph.inserting_after(anchor):
            anchor = graph.call_function(operator.getitem, (node, position))
        anchor.meta["val"] = node.meta["val"][position]
        items.append(anchor)
    return items


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode that the values of ``graph`` were traced in."""
    return next(
        node.meta["val"].fake_mode
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), FakeTensor)
    )


def first_user(node: fx.Node) -> fx.Node:
    """The user of ``node`` that comes first in its graph."""
    return next(user for user in node.graph.nodes if user in node.users)


def hint(value: Any) -> int:
    """A size as an int: of a symbolic size, the one of the traced call."""
    if isinstance(value, torch.SymInt):
        known = value.node.hint
        return 0 if known is None else int(known)
    return int(value)


def upper_bound(size: Any) -> int | None:
    """The largest value that a size can have in any call, as far as guards say so."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    # Only bounds that the user set are finite, and Dynamo guards these; the hint is that of one call.
    upper = size.node.shape_env.bound_sympy(size.node.expr).upper
    return int(upper) if upper.is_Integer else None


def hint_nbytes(node: fx.Node) -> int:
    """Bytes of a tensor at the sizes of the traced call."""
    value = node.meta["val"]
    return hint(value.numel()) * value.element_size()
