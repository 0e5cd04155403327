"""The gradient of one batch under rounding noise in chosen tensors, without doing again what the noise does not reach.

A model is interpreted once, for one step, with codecs for every saved tensor that can be rounded. Of its two graphs,
what the forward encodes is kept as it was, and so is every value of the backward, computed from exact tensors. Noise in
some tensors then takes their codecs and the part of the backward that reads them: the same graph and the same codecs
as in training, and so the same gradient.
"""

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx

import actcompile
from actcompile import backend, records
from actcompile.passes._fx import ROW_KEY, graph_outputs
from actcompile.plan import Pruning, Role
from actcompile.triton_kernels._hash import mix_seed

from .models import Batch, Workload

quantize = torch.ops.actcompile.quantize.default
dequantize = torch.ops.actcompile.dequantize.default
sparsify = torch.ops.actcompile.sparsify.default
densify = torch.ops.actcompile.densify.default

# Bits of codes, or what is kept of each block.
Way = int | Pruning

# Gradients by their position among the results of the backward; those that noise does not reach are left out.
Gradients = Mapping[int, Tensor]


class _Encoded(NamedTuple):
    """What the forward encoded: the exact tensor, and the salt of its rounding noise."""

    value: Tensor
    group_size: int
    salt: int


class Replay:
    """One step of a model on one batch.

    Args:
        workload: The model, without dropout.
        batch: What it is called with.
    """

    def __init__(self, workload: Workload, batch: Batch) -> None:
        self._encoded: dict[str, _Encoded] = {}
        self._backward: _Backward
        actcompile.reset()
        # What the package calls for lowering="eager".
        with mock.patch.object(backend, "interpret_plainly", self._interpret):
            call = torch.compile(workload.model, backend="act", options={"bits": 4, "lowering": "eager"})
            workload.model.zero_grad(set_to_none=True)
            workload.loss(call, batch).backward()
        (record,) = records.finished()
        self.rows = [row for row in record.rows if row.key in self._encoded]
        outputs = zip(graph_outputs(self._backward.module.graph), record.roles, strict=False)
        self._counted = {
            position: node
            for position, (node, role) in enumerate(outputs)
            if isinstance(node, fx.Node) and role is Role.PARAMETER
        }
        self.start_from({}, 0)

    def start_from(self, ways: Mapping[str, Way], draw: int) -> None:
        """From now on, tensors have this noise wherever ``gradients`` is not told otherwise; at first none has any."""
        exact = {key: encoded.value for key, encoded in self._encoded.items()}
        self._backward.start_from(self._decoded({**exact, **self._rounded(ways, draw)}))

    def value(self, key: str) -> Tensor:
        """The exact tensor of a row."""
        return self._encoded[key].value

    def gradients(self, ways: Mapping[str, Way], draw: int) -> Gradients:
        """Of the parameters, with the tensors that are named rounded to so many bits, or pruned."""
        values = self._backward.changed(self._decoded(self._rounded(ways, draw)), self._counted.values())
        return {position: values[node] for position, node in self._counted.items() if node in values}

    def distance(self, one: Gradients, other: Gradients | None = None) -> float:
        """|one - other|^2 over all parameters; ``other`` is what was started from when left out."""
        other = other or {}
        differences = (self._at(one, p) - self._at(other, p) for p in one.keys() | other.keys())
        return sum(float(difference.double().square().sum()) for difference in differences)

    def exact(self) -> dict[int, Tensor]:
        """The gradients that were started from."""
        return {position: self._at({}, position) for position in self._counted}

    def noise(self, ways: Mapping[str, Way], draws: Iterable[int]) -> list[float]:
        """|g' - g|^2 in each of ``draws`` of the rounding noise."""
        return [self.distance(self.gradients(ways, draw)) for draw in draws]

    def _at(self, gradients: Gradients, position: int) -> Tensor:
        return gradients[position] if position in gradients else self._backward.base[self._counted[position]]

    def _decoded(self, values: Mapping[str, Tensor]) -> dict[fx.Node, Tensor]:
        return {node: values[node.meta[ROW_KEY]] for node in self._backward.decoders if node.meta[ROW_KEY] in values}

    def _rounded(self, ways: Mapping[str, Way], draw: int) -> dict[str, Tensor]:
        found, seed = {}, torch.tensor(mix_seed(draw))
        for key, way in ways.items():
            x, group_size, salt = self._encoded[key]
            layout = x.shape, x.stride(), x.dtype
            if isinstance(way, Pruning):
                found[key] = densify(*sparsify(x, *way, seed, salt), *way, *layout)
            else:
                found[key] = dequantize(*quantize(x, way, group_size, seed, salt), way, group_size, *layout)
        return found

    def _interpret(self, graph: fx.GraphModule, is_backward: bool) -> Callable[[list[Any]], Any]:
        if is_backward:
            self._backward = _Backward(graph)
            run = self._backward.run_noting_arguments
        else:
            run = _Forward(graph, self._encoded).boxed_run

        def call(args: list[Any]) -> Any:
            return run(args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call


class _Forward(fx.Interpreter):
    """Notes what is encoded."""

    def __init__(self, graph: fx.GraphModule, encoded: dict[str, _Encoded]) -> None:
        super().__init__(graph)
        self._encoded = encoded

    def run_node(self, n: fx.Node) -> Any:
        if n.target is quantize:
            (x, _, group_size, _, salt), _ = self.fetch_args_kwargs_from_env(n)
            self._encoded[n.meta[ROW_KEY]] = _Encoded(x, group_size, salt)
        return super().run_node(n)


class _Backward(fx.Interpreter):
    """Keeps the values of all nodes, and computes those anew that depend on what changes."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.base: dict[fx.Node, Any] = {}
        self.decoders = graph.graph.find_nodes(op="call_function", target=dequantize)
        self._nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
        self._arguments: dict[fx.Node, Any] = {}

    def run_noting_arguments(self, args: list[Any]) -> Any:
        """The results of a first call, whose arguments are those of all that follow."""
        placeholders = self.module.graph.find_nodes(op="placeholder")  # type: ignore[union-attr, operator]
        self._arguments = dict(zip(placeholders, args, strict=True))
        return self.boxed_run(args)

    def start_from(self, decoded: Mapping[fx.Node, Tensor]) -> None:
        """Values of all nodes, given those of all decoders."""
        self.base = dict(self._arguments)
        self._compute(self._nodes, decoded, self.base)

    def changed(self, decoded: Mapping[fx.Node, Tensor], wanted: Iterable[fx.Node]) -> dict[fx.Node, Any]:
        """Values of the nodes that depend on ``decoded``, the values of some decoders, and that ``wanted`` need."""
        reached, needed = set(decoded), set(wanted)
        for node in self._nodes:
            if not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        for node in reversed(self._nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        values: dict[fx.Node, Any] = {}
        self._compute([node for node in self._nodes if node in reached & needed], decoded, values)
        return values

    @torch.no_grad()
    def _compute(self, nodes: Iterable[fx.Node], decoded: Mapping[fx.Node, Tensor], values: dict[fx.Node, Any]) -> None:
        self.env = ChainMap(values, self.base)  # type: ignore[assignment, arg-type]
        for node in nodes:
            values[node] = decoded[node] if node in decoded else self.run_node(node)
