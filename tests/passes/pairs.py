"""Pairs of graphs traced from small functions, printed as text and run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_function
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes

from actcompile.analysis import analyze
from actcompile.passes._fx import GraphPair
from actcompile.passes._naming import operator_name
from actcompile.passes.partition import partition
from actcompile.plan import Action, Decision, Plan, Role, SavedTensor


@dataclass
class Traced:
    """A pair of graphs with the inputs it was traced on; the seed is the last of them."""

    pair: GraphPair
    inputs: tuple[Tensor, ...]
    outputs: list[Tensor]

    def rows(self) -> list[SavedTensor]:
        """What analysis says of every slot."""
        return analyze(self.pair)

    def keep_all(self, **decisions: Decision) -> Plan:
        """A plan that keeps everything but the rows of the operators named."""
        kept = Decision(Action.KEEP, "test")
        return Plan({row.key: decisions.get(row.op, kept) for row in self.rows()})

    def run(self, tangents: Sequence[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and gradients of the two graphs, run one after the other."""
        for module in (self.pair.forward, self.pair.backward):
            module.recompile()
        results = self.pair.forward(*(value.detach() for value in self.inputs))
        num_outputs = len(self.pair.user_outputs)
        outputs, saved = list(results[:num_outputs]), results[num_outputs:]
        num_symbols = len(self.pair.symbol_placeholders)
        saved = [*saved[len(saved) - num_symbols :], *saved[: len(saved) - num_symbols]]
        given = [torch.ones_like(value) for value in outputs] if tangents is None else tangents
        return outputs, [grad for grad in self.pair.backward(*saved, *given) if grad is not None]


def trace(function: Callable[..., Any], *inputs: Tensor, recompute: str = "none") -> Traced:
    """The forward and backward of ``function(*inputs)``, partitioned, with the last input as the seed."""
    roles = [*map(_role, inputs), Role.SEED]
    found: list[GraphPair] = []

    def split(joint: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        joint_graph_passes(joint)
        pair = partition(joint, joint_inputs, recompute=recompute, lossy=True, input_roles=roles, **kwargs)
        found.append(pair)
        # What is returned here runs as its code says, which ``sync`` left as it was.
        for module in (pair.forward, pair.backward):
            module.recompile()
        return pair.forward, pair.backward

    seed = torch.tensor(1234)
    outputs = _traced(function, split)(*inputs, seed)
    return Traced(found[0], (*inputs, seed), [outputs] if isinstance(outputs, Tensor) else list(outputs))


def trace_joint(function: Callable[..., Any], *inputs: Tensor) -> tuple[fx.GraphModule, int]:
    """The joint graph of ``function(*inputs)`` and the number of its forward outputs."""

    def stop(joint: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        joint_graph_passes(joint)
        raise _JointGraph(joint, kwargs["num_fwd_outputs"])

    with pytest.raises(_JointGraph) as found:
        _traced(function, stop)(*inputs, torch.tensor(1234))
    return found.value.joint, found.value.num_outputs


class _JointGraph(Exception):  # noqa: N818  carries a result
    def __init__(self, joint: fx.GraphModule, num_outputs: int) -> None:
        self.joint, self.num_outputs = joint, num_outputs


def _role(value: Tensor) -> Role:
    if not value.requires_grad:
        return Role.INPUT
    return Role.PARAMETER if value.is_leaf else Role.BOUNDARY


def _traced(function: Callable[..., Any], split: Callable[..., Any]) -> Callable[..., Any]:
    return aot_function(
        lambda *args: function(*args[:-1]),
        fw_compiler=lambda graph, _: graph,
        bw_compiler=lambda graph, _: graph,
        partition_fn=split,
        decompositions=select_decomp_table(),
    )


def text(module: fx.GraphModule) -> str:
    """One line per node; ``[i]`` takes an element of a tuple."""
    return "\n".join(_line(node) for node in module.graph.nodes)


def _line(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"{node.name} = input"
    arguments = ", ".join(map(_argument, (*node.args, *node.kwargs.values())))
    return f"return {arguments}" if node.op == "output" else f"{node.name} = {_name(node)}({arguments})"


def _name(node: fx.Node) -> str:
    return "getitem" if "getitem" in str(node.target) else operator_name(node)


def _argument(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_argument, value))}]"
    return str(value).removeprefix("torch.")
