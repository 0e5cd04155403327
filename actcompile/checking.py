"""The gradient of one step beside the exact one, where ``check=True`` asks for it.

    forward     interpreted; what it is called with is kept, and of what it rounds the exact values
    backward    interpreted; its results are those of the step, whatever is found
    exact       the joint graph as AOTAutograd traced it, before anything was rewritten, from the forward's inputs
    restored    the backward, rewritten, on the exact values of what was rounded
    predicted   what rounding adds to the gradient, to first order, by products through the restored backward

Exact and restored gradients differ by what floating-point arithmetic leaves alone, or a rewrite is wrong. Restored ones
and those of the step differ by rounding noise alone, whose size is predicted (_judging.py).
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ._gradients import Exact, Gradients
from ._judging import judge
from ._seeded import SeededInterpreter
from ._torch import Interpret, is_fake, preserve_rng_state, reentrant_tracing
from .passes._fx import ROW_KEY
from .plan import Plan, Role, SavedTensor

if TYPE_CHECKING:
    from .records import GraphRecord

log = logging.getLogger(__name__)

quantize = torch.ops.actcompile.quantize.default

Compile = Callable[[Plan | None, Interpret | None], Callable[..., Any]]


class Checked:
    """A graph that is interpreted until the backward of one step was checked, and then compiled.

    Args:
        record: Of the graph.
        compile_with: Compiles the graph with a plan, or what the interpreter given makes of it.
        interpret: That of the settings.
        plan: The plan, where it is not the partitioner's to make.
    """

    def __init__(
        self,
        record: "GraphRecord",
        compile_with: Compile,
        interpret: Interpret | None,
        plan: Plan | None,
    ) -> None:
        self._check = record.check = Check()
        self._reenter = reentrant_tracing()
        self._compile = functools.partial(compile_with, plan, interpret)
        self._interpreted = compile_with(plan, self._check.interpret)
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self._compiled is None and self._check.is_done:
            with self._reenter():
                self._compiled = self._compile()
        return (self._compiled or self._interpreted)(*args)


class Check:
    """Interprets a pair of graphs, and checks the gradient of its first backward."""

    def __init__(self) -> None:
        self.is_done = False
        self._joint: fx.GraphModule | None = None
        self._num_outputs = 0
        self._roles: Sequence[Role] = ()
        self._names: Sequence[str] = ()
        self._rows: Mapping[str, SavedTensor] = {}
        self._call: _Call | None = None

    def see_joint(self, joint: fx.GraphModule, num_outputs: int, roles: Sequence[Role], names: Sequence[str]) -> None:
        """Takes what is partitioned, before it is; the first ``num_outputs`` results are the forward's, the others the
        gradients of inputs with these roles and names.
        """
        if self._joint is None:
            graph = fx.Graph()
            graph.output(graph.graph_copy(joint.graph, {}))
            self._joint, self._num_outputs = fx.GraphModule(joint, graph), num_outputs
            self._roles, self._names = roles, names

    def see_rows(self, rows: Sequence[SavedTensor]) -> None:
        """Takes what is saved."""
        self._rows = {row.key: row for row in rows}

    def interpret(self, graph: fx.GraphModule, is_backward: bool) -> Callable[[list[Any]], Any]:
        """What is called in place of one of the two graphs, with its arguments in a list that it empties."""
        run = self._backward if is_backward else self._forward

        def call(args: list[Any]) -> Any:
            return SeededInterpreter(graph).boxed_run(args) if self.is_done else run(graph, args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def _forward(self, graph: fx.GraphModule, args: list[Any]) -> Any:
        if any(is_fake(value) for value in args):
            return SeededInterpreter(graph).boxed_run(args)
        names = [node.name for node in graph.graph.find_nodes(op="placeholder")]
        self._call = call = _Call(dict(zip(names, map(self._kept, args), strict=True)), _random_states(args))
        outputs = _Noting(graph, call.exact).boxed_run(args)
        call.stored = _pointers(outputs) - _pointers(call.inputs.values())
        return outputs

    def _kept(self, value: Any) -> Any:
        """Inputs as they are now: the forward may write buffers, and anybody its arguments."""
        return value.clone() if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter) else value

    def _backward(self, graph: fx.GraphModule, args: list[Any]) -> Any:
        arguments = dict(zip(graph.graph.find_nodes(op="placeholder"), args, strict=True))
        args.clear()
        results = SeededInterpreter(graph).boxed_run(list(arguments.values()))
        # Of several calls whose backwards are still to come, the last one is checked.
        call = self._call
        if call is None or (call.stored and call.stored.isdisjoint(_pointers(arguments.values()))):
            return results
        self._call = None
        exact = self._exact(call, arguments)
        if exact is None:
            return results
        gradients = Gradients(graph.graph, arguments, call.exact, self._roles, exact)
        self.is_done = judge(gradients, results, self._rows, self._names)
        return results

    def _exact(self, call: "_Call", arguments: Mapping[fx.Node, Any]) -> list[Any] | None:
        """The gradients that the joint graph computes; None where they cannot be told from what is there."""
        assert self._joint is not None
        known = {**call.inputs, **{node.name: value for node, value in arguments.items() if _is_tangent(node)}}
        placeholders = self._joint.graph.find_nodes(op="placeholder")
        missing = [node.name for node in placeholders if node.name not in known]
        if missing:
            log.warning("check=True checks nothing here: inputs of the graph are not known (%s)", ", ".join(missing))
            self.is_done = True
            return None
        with torch.no_grad(), _random(call.states):
            outputs = SeededInterpreter(self._joint).boxed_run([known[node.name] for node in placeholders])
        return list(outputs[self._num_outputs :])


class _Call:
    """One forward: its inputs by name, and the states of random number generators before it."""

    def __init__(self, inputs: dict[str, Any], states: list[tuple[Any, Tensor]]) -> None:
        self.inputs, self.states = inputs, states
        self.exact: dict[str, Exact] = {}
        # Where in memory lies what it stored; of its backward, this comes back.
        self.stored: set[int] = set()


class _Noting(SeededInterpreter):
    """Notes what is rounded."""

    def __init__(self, graph: fx.GraphModule, exact: dict[str, Exact]) -> None:
        super().__init__(graph)
        self._exact = exact

    def run_node(self, n: fx.Node) -> Any:
        """Runs one operator."""
        if n.target is quantize:
            (x, bits, group_size, _, salt), _ = self.fetch_args_kwargs_from_env(n)
            self._exact[n.meta[ROW_KEY]] = Exact(x, bits, group_size, salt)
        return super().run_node(n)


def _is_tangent(node: fx.Node) -> bool:
    return "tangents" in str(node.target)


def _pointers(values: Iterable[Any]) -> set[int]:
    return {value.data_ptr() for value in values if isinstance(value, Tensor) and value.numel()}


def _random_states(values: Iterable[Any]) -> list[tuple[Any, Tensor]]:
    """Of the devices of ``values``: their modules, and the states of their generators."""
    types = {value.device.type for value in values if isinstance(value, Tensor)} | {"cpu"}
    modules = [torch if name == "cpu" else torch.get_device_module(name) for name in types]
    return [(module, module.get_rng_state()) for module in modules]


@contextmanager
def _random(states: Sequence[tuple[Any, Tensor]]) -> Iterator[None]:
    """Random numbers are drawn from ``states`` on, inside."""
    with preserve_rng_state():
        for module, state in states:
            module.set_rng_state(state)
        yield
