"""What the code that Inductor makes of a graph allocates and frees, found without compiling that code.

Inductor lowers, fuses and schedules the graph as it would for a compilation, and writes the wrapper: the list of
allocations, kernel calls and releases in the order in which they run. Kernels are written, too, but never compiled.

Every private name of Inductor that this needs is in this file, as seen in torch 2.11 to 2.15.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch._inductor.config as inductor_config
from torch import fx
from torch._dynamo.utils import preserve_rng_state
from torch._guards import detect_fake_mode
from torch._inductor import ir
from torch._inductor.codegen import wrapper
from torch._inductor.compile_fx import _recursive_post_grad_passes as post_grad_passes
from torch._inductor.compile_fx import _recursive_record_original_output_strides as record_output_strides
from torch._inductor.compile_fx import fake_tensor_prop
from torch._inductor.debug import DebugContext
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V

from ._temporaries import Operand, temporary_nbytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """Bytes that come alive (or, negative, are freed) at one place of the generated code; ``label`` names it.

    ``temporary`` bytes are alive during the call alone, on top of the others.
    """

    label: str
    nbytes: sympy.Expr
    temporary: sympy.Expr = sympy.S.Zero


def planned_changes(
    graph: fx.GraphModule, is_backward: bool, owned: Collection[str], settings: Mapping[str, Any]
) -> list[Change]:
    """What running ``graph``, compiled, allocates and frees; in the end only what it returns is alive.

    Args:
        graph: Forward or backward, traced with fake tensors; it is changed.
        is_backward: Which of them.
        owned: Names of inputs that nothing else holds: the code frees them after their last use.
        settings: Of Inductor's.
    """
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    fake_mode = detect_fake_mode(inputs)
    assert fake_mode is not None
    with inductor_config.patch(dict(settings)), torch.no_grad(), preserve_rng_state(), DebugContext(), fake_mode:
        # Subgraphs are lowered by these.
        record_output_strides(graph)
        view_to_reshape(graph)  # type: ignore[no-untyped-call]
        fake_tensor_prop(graph, inputs)
        with V.set_fake_mode(fake_mode):
            post_grad_passes(graph, is_inference=False)
            lowering = GraphLowering(
                graph, example_inputs=inputs, shape_env=fake_mode.shape_env, is_backward=is_backward
            )
            lowering.freeze_runtime_asserts()
            with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
                lowering.run(*inputs)
                lowering.codegen()
                changes = _Ledger(lowering, owned).read(lowering.wrapper_code.lines)
    # Sizes that were found to be equal on the way are one symbol in the end.
    replace = fake_mode.shape_env.replace if fake_mode.shape_env is not None else sympy.sympify
    return [Change(change.label, replace(change.nbytes), replace(change.temporary)) for change in changes]


class _Ledger:
    """Which names of the generated code hold which memory, line by line."""

    def __init__(self, lowering: GraphLowering, owned: Collection[str]) -> None:
        self._lowering = lowering
        self._nbytes: dict[str, sympy.Expr] = {}
        # Name -> the allocations it holds, and allocation -> the names that hold it.
        self._held: dict[str, list[str]] = {}
        self._holders: dict[str, set[str]] = {}
        self.changes: list[Change] = []
        for name in owned:
            if name in lowering.graph_inputs:
                self._hold(name, name)
                self._nbytes[name] = self._size(lowering.graph_inputs[name])

    def read(self, lines: Sequence[Any]) -> list[Change]:
        """The changes that ``lines`` make, and the release of all that is not returned."""
        for line in lines:
            rule = _RULES.get(type(line))
            if isinstance(line, str):
                if found := _RUNS_SUBGRAPHS.fullmatch(line):
                    self._enter_subgraphs(found.group(1))
            elif rule is not None:
                rule(self, line)
            elif (unknown := type(line).__name__) not in _WITHOUT_MEMORY:
                log.warning(
                    "the predicted peak leaves out what %s allocates, which torch %s has", unknown, torch.__version__
                )
        returned = {
            root
            for output in self._lowering.graph_outputs
            if isinstance(output, ir.IRNode) and (name := output.maybe_get_name()) is not None
            for root in self._held.get(name, ())
        }
        for name in list(self._held):
            if not returned.issuperset(self._held[name]):
                self.release(name, "return")
        return self.changes

    def allocate(self, name: str, nbytes: sympy.Expr, holder: str | None = None) -> None:
        """New memory, held by ``name`` or by another ``holder``."""
        self._nbytes[name] = nbytes
        self._hold(holder or name, name)
        self.changes.append(Change(name, nbytes))

    def share(self, name: str, other: str) -> None:
        """``name`` holds what ``other`` holds, too."""
        for root in self._held.get(other, ()):
            self._hold(name, root)

    def take(self, name: str) -> None:
        """``name`` holds one of the results of an operator."""
        if name in self._nbytes:
            self._hold(name, name)
            return
        # What subgraphs return, and views of what went in.
        result = self._lowering.try_get_buffer(name)
        assert result is not None, name
        if aliased := result.get_inputs_that_alias_output():
            self.share(name, aliased[0])
        else:
            self.own_buffer(result)

    def _enter_subgraphs(self, operator: str) -> None:
        """What those take while they run: branches, the body of a loop, or a region that is compiled once."""
        node = self._lowering.try_get_buffer(operator)
        given = (value for value in vars(node).values())
        flat = (item for value in given for item in (value if isinstance(value, list | tuple) else (value,)))
        for graph in (item.graph for item in flat if isinstance(item, ir.Subgraph)):
            assert graph is not None, operator
            level, levels = sympy.S.Zero, [sympy.S.Zero]
            for change in _Ledger(graph, ()).read(graph.wrapper_code.lines):
                level += change.nbytes
                levels.append(level + change.temporary)
            self.changes.append(Change(operator, sympy.S.Zero, sympy.Max(*levels)))

    def release(self, name: str, label: str | None = None) -> None:
        """``name`` is gone; memory that nothing else holds is freed."""
        for root in self._held.pop(name, ()):
            self._holders[root].discard(name)
            if not self._holders[root]:
                self.changes.append(Change(label or f"del {name}", -self._nbytes[root]))

    def call(self, node: Any) -> None:
        """An operator outside of the generated kernels works."""
        device = node.get_device()
        if device is None or device.type != "cpu":
            return
        operands = [_operand(value) for value in node.inputs if isinstance(value, ir.IRNode)]
        arguments = {**dict(enumerate(node.constant_args)), **node.kwargs}
        temporary = temporary_nbytes(node.python_kernel_name or "", operands, arguments)
        if temporary != 0:
            self.changes.append(Change(node.python_kernel_name, sympy.S.Zero, temporary))

    def own_buffer(self, node: Any) -> None:
        """``node`` is allocated at its own size."""
        self.allocate(node.get_name(), self._size(node))

    def fallback(self, node: Any) -> None:
        """An operator that allocates its results itself."""
        self.call(node)
        if isinstance(node.get_output_spec(), ir.MultiOutputLayout):
            # The tuple holds all results until it is gone, those that nobody takes out of it, too.
            for result in _multi_outputs(node.outputs):
                if not result.get_inputs_that_alias_output():
                    self.allocate(result.get_name(), self._size(result), holder=node.get_name())
        elif aliased := node.get_inputs_that_alias_output():
            self.share(node.get_name(), aliased[0])
        elif not isinstance(node.get_output_spec(), ir.NoneLayout | ir.MutationLayoutSHOULDREMOVE):
            self.own_buffer(node)

    def _hold(self, name: str, root: str) -> None:
        self._held.setdefault(name, []).append(root)
        self._holders.setdefault(root, set()).add(name)

    def _size(self, node: Any) -> sympy.Expr:
        return sympy.sympify(self._lowering.get_allocation_storage_size(node)) * node.get_dtype().itemsize


def _operand(node: Any) -> Operand:
    return Operand(node.get_size(), node.get_stride(), node.get_dtype())


def _multi_outputs(outputs: Any) -> list[ir.MultiOutput]:
    if isinstance(outputs, list | tuple):
        return [result for output in outputs for result in _multi_outputs(output)]
    return [outputs] if isinstance(outputs, ir.MultiOutput) else []


def _reuse(ledger: _Ledger, line: Any) -> None:
    ledger.share(line.reused_as.get_name(), line.node.get_name())
    if line.delete_old:
        ledger.release(line.node.get_name())


# Line of the generated code -> what it does to memory; calls of kernels do nothing.
_RULES: Mapping[type, Callable[[_Ledger, Any], None]] = {
    wrapper.AllocateLine: lambda ledger, line: ledger.own_buffer(line.node),
    wrapper.ReuseLine: _reuse,
    wrapper.ReinterpretLine: lambda ledger, line: ledger.share(line.reused_as.get_name(), line.node.get_name()),
    wrapper.FreeIfNotReusedLine: lambda ledger, line: ledger.release(line.node.get_name()),
    wrapper.FreeLine: lambda ledger, line: ledger.release(line.node.get_name()),
    wrapper.ExternKernelAllocLine: lambda ledger, line: ledger.fallback(line.node),
    wrapper.ExternKernelOutLine: lambda ledger, line: ledger.call(line.node),
    wrapper.MultiOutputLine: lambda ledger, line: ledger.take(line.result_name),
}

# What the code of an operator with subgraphs begins with: the list that their results are put in.
_RUNS_SUBGRAPHS = re.compile(r"(\w+) = \[None\] \* \d+")

# Names of lines that do nothing to memory: not every version of torch has all.
_WITHOUT_MEMORY = frozenset(
    {
        *("LineContext", "DeferredLine", "CommentLine", "NullLine", "KernelDefinitionLine", "KernelCallLine"),
        *("AssertSizeStrideLine", "GroupedAssertSizeStrideLine", "AssertDivByZeroLine", "AssertAlignmentLine"),
        *("EnterSubgraphLine", "ExitSubgraphLine", "EnterKernelProfileScopeLine", "ExitKernelProfileScopeLine"),
        *("EnterDeviceContextManagerLine", "ExitDeviceContextManagerLine"),
        *("EnterDeviceContextManagerWithStreamInfoLine", "ExitDeviceContextManagerWithStreamInfoLine"),
        *("EnterCudaStreamContextLine", "ExitCudaStreamContextLine"),
        *("EnterCudaMemPoolContextLine", "ExitCudaMemPoolContextLine"),
        *("DynamicScalarLine", "SymbolicCallArgLine", "UnbackedSymbolDefsLine"),
        # These write into buffers that have lines of their own.
        *("IndexPutFallbackLine", "ScatterFallbackLine", "ExternKernelMultiOutLine"),
    }
)


def known_sizes(graph: fx.GraphModule) -> dict[sympy.Symbol, int]:
    """The symbolic sizes of the inputs of ``graph``, with those of the traced call."""
    sizes: dict[sympy.Symbol, int] = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        shape = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        for size in shape:
            if isinstance(size, torch.SymInt):
                known = size.node.shape_env.backed_var_to_val
                sizes |= {symbol: int(known[symbol]) for symbol in size.node.expr.free_symbols}
    return sizes
