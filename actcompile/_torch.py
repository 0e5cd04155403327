"""Every private name of torch that this package uses outside of its passes, with the versions it was seen in."""

import copy
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.codegen.common as codegen_common
import torch._inductor.config as inductor_config
from torch import fx

# 2.11 to 2.13.
from torch._dynamo import trace_rules
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.source import ConstantSource
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import CompileContext, TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves, tree_map

from .errors import CompileError, ConfigError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# Makes a function, of a list that it empties, of a graph and whether it is the backward.
Interpret = Callable[[fx.GraphModule, bool], Callable[[list[Any]], Any]]

__all__ = [
    "NEEDS_VALUES",
    "TRAINING_SETTINGS",
    "CustomPartitionerFn",
    "HigherOrderOperator",
    "Interpret",
    "add_scalar_input",
    "argument_name",
    "belongs_to_module",
    "check_cpp_compiler",
    "compile_in_place",
    "compile_pair",
    "copied",
    "count_in_signed_integers",
    "current_frame",
    "default_store",
    "fake_mode_for",
    "get_hash_for_files",
    "has_saved_tensor_hooks",
    "interpret_plainly",
    "is_fake",
    "is_part_of_model",
    "isolated_compile",
    "mark_dynamic_batch",
    "min_cut_rematerialization_partition",
    "mode_options",
    "num_in_memory",
    "own_code",
    "random_settings",
    "reentrant_tracing",
    "traced_inputs",
    "tree_leaves",
    "tree_map",
    "unwrapped",
]

# What Inductor's settings are for graphs that this package rewrote, unless a user says otherwise.
TRAINING_SETTINGS: dict[str, Any] = {
    # Buffers that wait for their next use keep the memory that compression frees.
    "allow_buffer_reuse": False,
    # Copies of images and kernels in channels_last would be saved, and codes made of a copy back.
    "layout_optimization": False,
}

# What fake tensors raise where a model branches on the values of real ones.
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


def unwrapped(error: ConfigError | CompileError) -> Exception:
    """``error`` as one that Dynamo hands to the user as it is, instead of inside BackendCompilerFailed."""
    kind = type(error)
    plain = type(kind.__name__, (ShortenTraceback, kind), {"__module__": kind.__module__})
    return plain(*error.args, first_useful_frame=None)  # type: ignore[no-any-return]


def add_scalar_input(graph: fx.GraphModule, name: str, example: torch.Tensor) -> tuple[fx.GraphModule, torch.Tensor]:
    """A copy of ``graph`` with one more input, a tensor that changes from call to call, and its fake example."""
    result = copied(graph)
    source = ConstantSource(name)
    fake_mode = TracingContext.get().fake_mode
    assert fake_mode is not None
    fake = fake_mode.from_tensor(example, static_shapes=True, source=source)
    with result.graph.inserting_after(result.graph.find_nodes(op="placeholder")[-1]):
        placeholder = result.graph.placeholder(name)
    placeholder.meta["example_value"] = fake
    placeholder._dynamo_source = source  # type: ignore[attr-defined]
    result.recompile()
    return result, fake


def belongs_to_module(placeholder: fx.Node) -> bool:
    """Whether an input of Dynamo's graph is a parameter, buffer or other attribute of a module."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return False
    # A method until 2.12.
    kind = source.guard_source() if callable(source.guard_source) else source.guard_source
    return bool(kind.is_specialized_nn_module() or kind.is_unspecialized_nn_module() or kind.is_fsdp_module())


def argument_name(placeholder: fx.Node) -> str:
    """The name of the argument or local variable that an input of Dynamo's graph comes from, or an empty string."""
    source = getattr(placeholder, "_dynamo_source", None)
    # A property since 2.10.
    name = "" if source is None else source.name() if callable(source.name) else source.name
    found = re.search(r"\['(\w+)'\]$", name)
    return found.group(1) if found else ""


def copied(graph: fx.GraphModule) -> fx.GraphModule:
    """``graph`` with nodes of its own: Dynamo's must not change, and compilers change what they get."""
    result = copy.copy(graph)
    result.graph = copy.deepcopy(graph.graph)
    # The copy has taken the graph from its owner, which passes would add submodules to.
    graph.graph.owning_module = graph
    result.recompile()
    return result


def traced_inputs(graph: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """``inputs`` with every tensor as the fake one that Dynamo traced; to be called while Dynamo compiles."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    return [
        _traced(node, value) if isinstance(value, torch.Tensor) else value
        for node, value in zip(placeholders, inputs, strict=True)
    ]


def _traced(placeholder: fx.Node, value: torch.Tensor) -> Any:
    context = TracingContext.get()
    if not _is_number(value) or value not in context.tensor_to_context:
        return placeholder.meta["example_value"]
    # A number that Dynamo passes as a tensor, such as a momentum under dynamic shapes. AOTAutograd asks for its symbol,
    # which Dynamo's own fake tensor does not hand over to the mode that AOTAutograd traces in.
    assert context.fake_mode is not None
    known = context.tensor_to_context[value]
    return context.fake_mode.from_tensor(value, symbolic_context=known, source=known.tensor_source, trace=False)


def _is_number(value: torch.Tensor) -> bool:
    return value.dim() == 0 and value.dtype == torch.float64 and value.is_cpu and not is_fake(value)


def reentrant_tracing() -> Callable[[], AbstractContextManager[object]]:
    """Enters what Dynamo traced under when this was called once more, to compile the same graph again."""
    # A context of its own: that of the first time keeps what its backwards, compiled when they first run, still need.
    context = copy.copy(TracingContext.get())
    # Where DDP cut a model into parts, these count them, and answer the first call of each with fake tensors.
    context.ddp_optimizer_ctx, context.fakify_first_call = None, False

    @contextmanager
    def reenter() -> Iterator[None]:
        context.fw_metadata = None
        with tracing(context):
            yield

    return reenter


def compile_pair(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    partitioner: CustomPartitionerFn | None,
    interpret: Interpret | None,
    settings: dict[str, Any],
) -> Callable[..., Any]:
    """Compiles ``graph`` with Inductor, or what ``interpret`` makes of it, after ``partitioner`` split it."""
    patches = dict(settings)
    options: dict[str, Any] = {}
    if partitioner is not None:
        patches = {"custom_partitioner_fn": partitioner, **TRAINING_SETTINGS, **patches}
    if interpret is not None:
        # Inductor's random numbers would be drawn anew where the backward repeats them.
        patches = {"fallback_random": True, **patches}
        options["inner_compile"] = functools.partial(_inner_compile, interpret)
    # A warm AOTAutograd cache never calls the partitioner: plans and reports would be empty.
    caching = functorch_config.enable_autograd_cache and partitioner is None
    with functorch_config.patch(enable_autograd_cache=caching), _rules_of_dtypes_made_once():
        return compile_fx(graph, list(inputs), config_patches=patches, **options)  # type: ignore[return-value]


@contextmanager
def _rules_of_dtypes_made_once() -> Iterator[None]:
    """Lets Inductor make its rules of operators' dtypes once instead of for every operator that it writes code for.

    That takes a tenth of what compiling a graph with codecs takes. The object is a singleton all the same.
    """
    with mock.patch.object(codegen_common, "DtypePropagationOpsHandler", functools.cache(DtypePropagationOpsHandler)):
        yield


def _inner_compile(
    interpret: Interpret, graph: fx.GraphModule, inputs: Sequence[Any], is_backward: bool = False, **kwargs: Any
) -> Callable[..., Any]:
    count_in_signed_integers(graph)
    return interpret(graph, is_backward)


def count_in_signed_integers(graph: fx.GraphModule) -> None:
    """Lets ranges that Inductor counts in uint16, such as those of ``eye``, be interpreted: no kernel makes them."""
    for node in graph.graph.find_nodes(op="call_function", target=torch.ops.prims.iota.default):
        if node.kwargs["dtype"] in (torch.uint16, torch.uint32, torch.uint64):
            node.update_kwarg("dtype", torch.int64)


def interpret_plainly(graph: fx.GraphModule, is_backward: bool) -> Callable[[list[Any]], Any]:
    """``graph`` as a function of a list of arguments, which it empties."""

    def run(args: list[Any]) -> Any:
        return fx.Interpreter(graph).boxed_run(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def fake_mode_for(values: Sequence[Any]) -> FakeTensorMode:
    """A mode under which no operator computes: that of ``values`` if they are fake already, else a new one."""
    return torch._guards.detect_fake_mode(list(values)) or FakeTensorMode(allow_non_fake_inputs=True)


def has_saved_tensor_hooks() -> bool:
    """Whether tensors that autograd saves right now go through hooks, as inside of a checkpoint."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def is_fake(value: object) -> bool:
    """Whether ``value`` is a tensor without data."""
    return isinstance(value, FakeTensor)


def default_store() -> "Store":
    """The store that the ranks met at, under a prefix of this package."""
    # Without distributed support, torch has none of these.
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    return PrefixStore("actcompile", _get_default_store())


def is_part_of_model() -> bool:
    """Whether DDP cuts the model that is compiled right now into several graphs."""
    if not torch.distributed.is_available():
        return False
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module() is not None  # type: ignore[no-untyped-call]


def own_code(function: FunctionType) -> FunctionType:
    """``function`` with a code object of its own: Dynamo keeps there what it compiled, and counts how often."""
    return FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)


def compile_in_place(module: torch.nn.Module, **options: Any) -> None:
    """``Module.compile``, which has no effect on modules of torch's own: Dynamo skips code of torch at the top."""
    if not trace_rules.check(module.forward):
        module.compile(**options)
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    module._compiled_call_impl = torch.compile(own_code(call), **options)  # type: ignore[arg-type]


def current_frame() -> int | None:
    """A number for the code that Dynamo compiles right now, the same each time it is compiled again."""
    compile_id = CompileContext.current_compile_id()
    return None if compile_id is None else compile_id.frame_id


def isolated_compile(function: Callable[..., Any], backend: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled by ``backend`` for one call's shapes, not counted among a user's recompilations."""
    options: dict[str, Any] = {"backend": backend, "dynamic": False}
    # From 2.13 on.
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    return torch.compile(function, **options)  # type: ignore[no-any-return]


def mark_dynamic_batch(value: torch.Tensor) -> None:
    """Lets Dynamo trace the first dimension of ``value`` as a symbol, where the model takes any size."""
    torch._dynamo.maybe_mark_dynamic(value, 0)


def num_in_memory(value: torch.Tensor) -> int:
    """Tensors that lie in the memory of ``value``, itself included."""
    memory = value.untyped_storage()
    # Seen in 2.11 to 2.13; one more is the object that stands for the memory here.
    return torch._C._storage_Use_Count(memory._cdata) - 1  # type: ignore[attr-defined, no-any-return]


def random_settings(lowering: str) -> dict[str, Any]:
    """The setting of Inductor that decides which operators draw random numbers, as ``lowering`` has it."""
    return {} if lowering == "eager" else {"fallback_random": inductor_config.fallback_random}


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's settings for a mode of torch.compile.

    Raises:
        ConfigError: For a mode that does not exist.
    """
    if mode is None:
        return {}
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise ConfigError(f"mode must be one of {', '.join(modes)}, got {mode!r}")
    return dict(modes[mode])


def check_cpp_compiler() -> None:
    """Looks for the C++ compiler that Inductor needs for the CPU.

    Raises:
        CompileError: When there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompileError(
            f"lowering='inductor' compiles C++ for the CPU, got no compiler ({inductor_config.cpp.cxx!r} was looked "
            "for): install g++ (on Debian and Ubuntu: apt install g++), or use lowering='eager', which works without"
        ) from error
