"""Trains with Back Razor's rule, for comparison: ``pruning="samples"``.

The graph is interpreted and differentiated by autograd, not traced any further: how many elements of a sample are kept
is known once it ran. What a forward stored is measured, and reported until the next.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import records, steps
from ._saved import grad_fns, saved_by
from ._torch import (
    CustomPartitionerFn,
    HigherOrderOperator,
    compile_pair,
    copied,
    has_saved_tensor_hooks,
    interpret_plainly,
    is_fake,
    min_cut_rematerialization_partition,
    random_settings,
    reentrant_tracing,
    traced_inputs,
    tree_leaves,
)
from .config import Config
from .passes._naming import called, module_path, source_line
from .passes._sample_operators import SampleOperators
from .passes._sample_storage import VALUE_DTYPE, Stored
from .passes.partition import baseline
from .passes.prune_samples import prune_samples
from .plan import Action, Decision, Plan, Role, SavedTensor

log = logging.getLogger(__name__)

_REASONS = {
    Action.PRUNE: "{what} of {op}: the largest elements of each sample",
    Action.NARROW: "{what} of {op}: in 16 bits",
    Action.KEEP: "for the backward of {op}",
}


def prune_by_samples(
    graph: fx.GraphModule, inputs: Sequence[Any], config: Config, record: records.GraphRecord
) -> Callable[..., Any]:
    """Makes a function of a training graph whose backward reads pruned tensors.

    Args:
        graph: A graph of Dynamo's.
        inputs: Fake tensors and sizes, one per placeholder.
        config: Settings with a sparsity.
        record: Gets what each forward stored.
    """
    assert config.sparsity is not None
    _count_baseline(graph, inputs, record)
    operators = SampleOperators(config.sparsity)
    pruned = copied(graph)
    prune_samples(pruned.graph, operators, config.skip)

    def run(*args: Any) -> Any:
        record.see_parameters(args)
        # Where DDP cuts a model into parts, each is called with fake tensors first: those have no largest elements.
        if any(is_fake(value) for value in args):
            return graph(*args)
        forward = _Forward(pruned, operators, _held(args, record.roles))
        steps.begin()
        outputs = forward.run(*args)
        record.measure(forward.rows, Plan(forward.decisions))
        steps.note(record, args, outputs)
        if log.isEnabledFor(logging.INFO):
            log.info("%s", record.summary())
        return outputs

    return run


def _held(args: Sequence[Any], roles: Sequence[Role]) -> dict[int, Role]:
    """Address of the memory of each argument -> who holds it."""
    pairs = zip(args, roles, strict=True)
    return {value.untyped_storage().data_ptr(): role for value, role in pairs if isinstance(value, Tensor)}


def _count_baseline(graph: fx.GraphModule, inputs: Sequence[Any], record: records.GraphRecord) -> None:
    """Lets AOTAutograd trace the graph as torch.compile does, for what that saves alone."""
    with reentrant_tracing()():
        compile_pair(
            copied(graph),
            traced_inputs(graph, inputs),
            partitioner=_Baseline(record),
            interpret=interpret_plainly,
            settings=random_settings("eager"),
        )


class _Baseline(CustomPartitionerFn):  # type: ignore[misc]
    """Splits a joint graph as torch.compile does, and remembers what that saves."""

    def __init__(self, record: records.GraphRecord) -> None:
        self._record = record

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Called by AOTAutograd with the joint graph."""
        self._record.count_baseline = baseline(gm, joint_inputs, self._record.roles, **kwargs)
        return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

    def uuid(self) -> object:
        """Nothing: what it makes is not cached."""
        return None


class _Forward(fx.Interpreter):
    """One forward, operator by operator, and what it stored.

    Args:
        graph: The rewritten graph.
        operators: What it calls.
        held: Who holds the memory of the graph's inputs, by its address.
    """

    def __init__(self, graph: fx.GraphModule, operators: SampleOperators, held: Mapping[int, Role]) -> None:
        super().__init__(graph)
        self.rows: list[SavedTensor] = []
        self.decisions: dict[str, Decision] = {}
        self._storage = operators.storage
        self._held = held
        self._counted: set[int] = set()
        self._seen: set[Any] = set()
        # Unpacking what another hook packed, as a checkpoint around the model does, would have effects.
        self._is_blind = has_saved_tensor_hooks()

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node, and lists what autograd keeps for it."""
        self._storage.stored.clear()
        result = super().run_node(n)
        if n.op == "placeholder":
            self._seen.update(grad_fns(result))
            return result
        for stored in self._storage.stored:
            self._counted.update(stored.parts)
            self._list_pruned(n, stored)
        for value in self._kept(n, result):
            self._list_kept(n, value)
        return result

    def _kept(self, node: fx.Node, result: Any) -> list[Tensor]:
        """What autograd saved for ``node``."""
        functions = list(self._new(grad_fns(result)))
        if self._is_blind:
            return []
        if isinstance(node.target, HigherOrderOperator):
            # A checkpoint, which keeps what it was called with and would run again if asked for more.
            values = tree_leaves(self.map_nodes_to_values(node.args, node))
            return [value for value in values if isinstance(value, Tensor)]
        return [value for function in functions for value in saved_by(function)]

    def _new(self, functions: list[Any]) -> Iterator[Any]:
        """Functions that were not there before this node ran."""
        while functions:
            function = functions.pop()
            if function not in self._seen:
                self._seen.add(function)
                functions += [above for above, _ in function.next_functions if above is not None]
                yield function

    def _list_pruned(self, node: fx.Node, stored: Stored) -> None:
        nbytes = math.prod(stored.shape) * stored.dtype.itemsize
        row = self._row(node, stored.shape, stored.dtype, nbytes=nbytes, kind=stored.kind)
        reason = _REASONS[stored.action].format(what=stored.what, op=row.op)
        dtype = VALUE_DTYPE if stored.action is Action.NARROW else None
        self._decide(row, Decision(stored.action, reason, dtype=dtype, nbytes=stored.nbytes))

    def _list_kept(self, node: fx.Node, value: Tensor) -> None:
        """Lists memory that is kept as it is, once, with all of its bytes: a view keeps what it looks at."""
        memory = value.untyped_storage()
        place = memory.data_ptr()
        role = self._held.get(place, Role.ACTIVATION)
        if place in self._counted or role not in (Role.ACTIVATION, Role.BOUNDARY):
            return
        self._counted.add(place)
        row = self._row(node, tuple(value.shape), value.dtype, nbytes=memory.nbytes(), role=role)
        self._decide(row, Decision(Action.KEEP, _REASONS[Action.KEEP].format(op=row.op)))

    def _row(self, node: fx.Node, shape: tuple[int, ...], dtype: torch.dtype, **known: Any) -> SavedTensor:
        op, module = called(node), module_path(node)
        number = 1 + sum(row.key.partition("#")[0] == f"{module}/{op}" for row in self.rows)
        return SavedTensor(
            key=f"{module}/{op}" + (f"#{number}" if number > 1 else ""),
            name=node.name,
            op=op,
            module=module,
            source=source_line(node),
            shape=shape,
            symbolic_shape=tuple(map(str, shape)),
            dtype=dtype,
            numel=math.prod(shape),
            **known,
        )

    def _decide(self, row: SavedTensor, decision: Decision) -> None:
        self.rows.append(row)
        self.decisions[row.key] = decision
