"""Every private name of torch that this package uses outside of its passes, with the versions it was seen in."""

import copy
import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.codegen.common as codegen_common
import torch._inductor.config as inductor_config
from torch import fx

# 2.11 to 2.15.
from torch._dynamo import trace_rules
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import preserve_rng_state
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
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves, tree_map

from .errors import CompileError, ConfigError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# Says whether a forward's saved tensors are still there.
Held = Callable[[], bool]
# Makes a function, of a list that it empties, of a graph and whether it is the backward.
Interpret = Callable[[fx.GraphModule, bool], Callable[[list[Any]], Any]]

__all__ = [
    "NEEDS_VALUES",
    "TRAINING_SETTINGS",
    "CustomPartitionerFn",
    "Held",
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
    "hands_on",
    "has_saved_tensor_hooks",
    "held_by",
    "interpret_plainly",
    "is_fake",
    "is_made_inside",
    "is_part_of_model",
    "is_skipped_at_the_top",
    "isolated_compile",
    "mark_dynamic_batch",
    "memory_of",
    "min_cut_rematerialization_partition",
    "mode_options",
    "num_in_memory",
    "own_code",
    "parameters_in_use",
    "preserve_rng_state",
    "random_settings",
    "reentrant_tracing",
    "traced_inputs",
    "tree_leaves",
    "tree_map",
    "untraced_reasons",
    "unwrapped",
]

# What Inductor's settings are for graphs that this package rewrote, unless a user says otherwise.
TRAINING_SETTINGS: dict[str, Any] = {
    # Buffers that wait for their next use keep the memory that compression frees.
    "allow_buffer_reuse": False,
    # Copies of images and kernels in channels_last would be saved, and codes made of a copy back.
    "layout_optimization": False,
}

_NO_AUTOGRAD_CACHE = {"enable_autograd_cache": False, "enable_remote_autograd_cache": False}

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


def is_made_inside(placeholder: fx.Node) -> bool:
    """Whether an input of Dynamo's graph, no part of a module, was computed in the call that is being compiled.

    Where Dynamo breaks a call into several graphs, local variables and results of what ran in between are inputs of the
    later ones. Whatever lies in the memory of an argument of the call is the caller's; in doubt it is, too.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        # Where DDP cuts a graph into parts, what one hands to the next comes from nowhere.
        return is_part_of_model()
    name = source.name() if callable(source.name) else source.name
    if not re.fullmatch(r"L\['\w+'\](\[[^\[\]]+\])*", name):
        return False
    while hasattr(source, "base"):
        source = source.base
    given = getattr(placeholder.meta.get("grapharg"), "example", None)
    if getattr(source, "is_derefed_cell_contents", False) or not isinstance(given, torch.Tensor):
        return False
    arguments = _compiled_arguments()
    return arguments is not None and memory_of(given) not in {memory_of(value) for value in _tensors_in(arguments)}


def _compiled_arguments() -> tuple[Any, Any] | None:
    """What the compiled function that is running was called with; to be called while Dynamo compiles."""
    frame = sys._getframe()
    while frame is not None:
        # Seen in 2.11 to 2.15.
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            return frame.f_locals.get("args"), frame.f_locals.get("kwargs")
        frame = frame.f_back  # type: ignore[assignment]
    return None


# How deep tensors may lie in the arguments of a call, and how many objects are looked at.
_ARGUMENT_DEPTH, _ARGUMENT_OBJECTS = 5, 10_000


def _tensors_in(arguments: object) -> Iterator[torch.Tensor]:
    """The tensors in a call's arguments, their items and attributes, modules left out."""
    level, seen = [arguments], 0
    for _ in range(_ARGUMENT_DEPTH):
        inside: list[Any] = []
        for value in level:
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, Mapping):
                inside.extend(value.values())
            elif isinstance(value, list | tuple | set | frozenset):
                inside.extend(value)
            elif not isinstance(value, torch.nn.Module | type) and hasattr(value, "__dict__"):
                inside.extend(vars(value).values())
        seen += len(inside)
        level = inside if seen < _ARGUMENT_OBJECTS else []


def memory_of(value: torch.Tensor) -> object:
    """What stands for the memory of a tensor: equal for tensors in the same one, and keeps none of it."""
    if value.layout != torch.strided:
        return id(value)
    return StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]


def hands_on(graph: fx.GraphModule) -> bool:
    """Whether what Dynamo's graph returns goes to other graphs of the same call: at a break, or a cut of DDP's."""
    reason = getattr(graph, "compile_subgraph_reason", None)
    return reason is not None and bool(reason.graph_break)


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
    # Where Dynamo's inputs come from: without it AOTAutograd takes none of them for a parameter, which is there anyway.
    if hasattr(graph, "_param_name_to_source"):
        result._param_name_to_source = graph._param_name_to_source
        pairs = zip(*(g.graph.find_nodes(op="placeholder") for g in (graph, result)), strict=True)
        for node, twin in pairs:
            twin._dynamo_source = getattr(node, "_dynamo_source", None)  # type: ignore[attr-defined]
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

    autocast = _autocast()

    @contextmanager
    def reenter() -> Iterator[None]:
        context.fw_metadata = None
        # As Dynamo does, inside of which this is not any more: compilers draw random numbers.
        with preserve_rng_state(), tracing(context), torch.enable_grad(), autocast():
            yield

    return reenter


def _autocast() -> Callable[[], AbstractContextManager[object]]:
    """Enters the autocast that is on when this is called: graphs are traced under it."""
    accelerator = torch.accelerator.current_accelerator()
    devices = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    is_cached = torch.is_autocast_cache_enabled()
    states = [(name, torch.get_autocast_dtype(name), torch.is_autocast_enabled(name)) for name in devices]

    @contextmanager
    def enter() -> Iterator[None]:
        with ExitStack() as stack:
            for name, dtype, is_enabled in states:
                stack.enter_context(torch.autocast(name, dtype, is_enabled, is_cached))
            yield

    return enter


def compile_pair(
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    partitioner: CustomPartitionerFn | None,
    interpret: Interpret | None,
    settings: dict[str, Any],
) -> Callable[..., Any]:
    """Compiles ``graph`` with Inductor, or what ``interpret`` makes of it, after ``partitioner`` split it.

    Code from AOTAutograd's cache comes without a call of ``partitioner``.
    """
    patches = dict(settings)
    options: dict[str, Any] = {}
    if partitioner is not None:
        patches = {"custom_partitioner_fn": partitioner, **TRAINING_SETTINGS, **patches}
    if interpret is not None:
        # Inductor's random numbers would be drawn anew where the backward repeats them.
        patches = {"fallback_random": True, **patches}
        options["inner_compile"] = functools.partial(_inner_compile, interpret)
    # Code that Inductor made must not be taken where the graph is to be interpreted.
    caches = {} if interpret is None else _NO_AUTOGRAD_CACHE
    with functorch_config.patch(caches), _rules_of_dtypes_made_once():
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


def held_by(outputs: Any) -> Held | None:
    """Whether what was saved for the backward of ``outputs`` is still there, whenever that is asked; None where nothing
    of them has a backward.
    """
    tensors = (value for value in tree_leaves(outputs) if isinstance(value, torch.Tensor))
    functions: list[Any] = [value.grad_fn for value in tensors if value.grad_fn is not None]
    for function in functions:
        # Outputs that are views of others are made outside of the graph.
        while function is not None and not isinstance(function, torch.autograd.function.BackwardCFunction):
            function = function.next_functions[0][0] if function.next_functions else None
        if function is not None:
            return functools.partial(_has_saved, weakref.ref(function))
    return _until_backward(functions[0]) if functions else None


def _has_saved(reference: "weakref.ref[Any]") -> bool:
    function = reference()
    try:
        return function is not None and function._raw_saved_tensors is not None
    # It says so where a backward has freed them.
    except RuntimeError:
        return False


def _until_backward(function: Any) -> Held:
    """Whether ``function``, one of torch's own, is still there and has not run."""
    token = _Token()
    # What a function of C++ lives by cannot be seen from here, but its hooks live as long.
    function.register_prehook(token.mark)
    reference = weakref.ref(token)
    return lambda: (alive := reference()) is not None and not alive.has_run


class _Token:
    has_run = False

    def mark(self, gradients: Any) -> None:
        self.has_run = True


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


def parameters_in_use(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The parameters of ``module``, and those that forwards see in their place where FSDP2 has sharded them."""
    yield from module.parameters()
    for part in module.modules():
        # A method of FSDP's modules alone; several groups of parameters since 2.13.
        find_state = getattr(part, "_get_fsdp_state", None)
        state = find_state() if find_state is not None else None
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for sharded in (one for group in groups if group is not None for one in group.fsdp_params):
            whole = getattr(sharded, "_unsharded_param", None)
            if whole is not None:
                yield whole


def untraced_reasons() -> dict[str, int]:
    """Dynamo's reasons for skipping code, and for breaking graphs, with how often it did so."""
    from torch._dynamo.utils import counters

    reasons = {**counters["unimplemented"], **counters["graph_break"]}
    # Code is resumed behind each break; those by a user's error, as a guard on data, are not counted with a reason.
    num_unknown = sum(counters["resumes"].values()) - sum(counters["graph_break"].values())
    if num_unknown > 0:
        reasons["Graph break\n  Hint: TORCH_LOGS=graph_breaks says why"] = num_unknown
    return reasons


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


def is_skipped_at_the_top(module: torch.nn.Module) -> bool:
    """Whether ``module`` was compiled in place to no effect, being one of torch's own."""
    compiled = getattr(module._compiled_call_impl, "__wrapped__", None)
    return inspect.ismethod(compiled) and bool(trace_rules.check(module.forward))


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
    # Seen in 2.11 to 2.15; one more is the object that stands for the memory here.
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
