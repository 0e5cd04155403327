"""The code that Inductor generates for CUDA: made, read, and run in Triton's interpreter, without a GPU.

Graphs are traced on the CPU and their values then said to be on CUDA. Inductor lowers, fuses and schedules such a graph
as on an H100 and writes the wrapper and the kernels; nothing is compiled.
"""

import contextlib
import itertools
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._inductor.config as inductor_config
import torch._inductor.fx_passes.post_grad as post_grad
import torch._inductor.scheduler as scheduler
import triton
from torch import Tensor, fx
from torch._dynamo.device_interface import CudaInterface
from torch._guards import detect_fake_mode
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

from actcompile._torch import TRAINING_SETTINGS

from .generated_code import GeneratedCode

CUDA = torch.device("cuda:0")
_H100 = types.SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    warp_size=32,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="",
)


def trace(function: Callable[..., Any], *inputs: Tensor, dynamic_batch: bool = False) -> fx.GraphModule:
    """The graph of ``function``, decomposed as for Inductor; with ``dynamic_batch``, for any size of its input."""
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        first, *rest = inputs
        if dynamic_batch:
            sizes = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (first.dim() - 1)]
            context = StatelessSymbolicContext(dynamic_sizes=sizes, constraint_sizes=[None] * len(sizes))
            fakes = [mode.from_tensor(first, symbolic_context=context)]
        else:
            fakes = [mode.from_tensor(first, static_shapes=True)]
        fakes += [mode.from_tensor(value, static_shapes=True) for value in rest]
        return make_fx(function, decomposition_table=select_decomp_table())(*fakes)


def generate(graph: fx.GraphModule, is_backward: bool = False, device: torch.device = CUDA) -> GeneratedCode:
    """What Inductor writes for ``graph`` on CUDA, or on the CPU, where it was traced; the graph is changed."""
    if device == CUDA:
        _move_to_cuda(graph)
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode(inputs)
    assert mode is not None
    with (
        _cuda() if device == CUDA else contextlib.nullcontext(),
        # Workers would compile what is written.
        inductor_config.patch({**TRAINING_SETTINGS, "compile_threads": 1}),
        torch.no_grad(),
        DebugContext(),
        mode,
        V.set_fake_mode(mode),
    ):
        post_grad.view_to_reshape(graph)  # type: ignore[no-untyped-call]
        post_grad.post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env, is_backward=is_backward)
        with V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
            lowering.run(*inputs)
            code, _ = lowering.codegen()
    return GeneratedCode(code.value)


def _move_to_cuda(graph: fx.GraphModule) -> None:
    mode = detect_fake_mode([node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")])
    assert mode is not None

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)

    for node in graph.graph.nodes:
        for key in {"val", "eager_input_vals"} & node.meta.keys():
            node.meta[key] = tree_map(moved, node.meta[key])
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": CUDA}


class _Driver:
    """What Inductor asks Triton's driver for while it writes code."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def _cuda() -> Iterator[None]:
    """Lets Inductor find an H100 where there is no CUDA device."""
    if torch.cuda.is_available():
        yield
        return
    answers: Mapping[str, Any] = {
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_properties": _H100,
        "get_device_capability": (9, 0),
        "get_compute_capability": 90,
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", _Driver()))
        for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
            for name in answers.keys() & vars(owner).keys():
                answer = staticmethod(lambda *_, name=name, **__: answers[name])
                stack.enter_context(
                    mock.patch.object(owner, name, answer if isinstance(owner, type) else answer.__func__)
                )
        stack.enter_context(mock.patch.object(scheduler, "has_triton", lambda *_: True))
        # Runs operators to compare shapes, which needs the device.
        stack.enter_context(mock.patch.object(post_grad, "reinplace_inplaceable_ops", lambda *_, **__: None))
        yield


def run(code: GeneratedCode, inputs: Sequence[Tensor], folder: Path) -> list[Tensor]:
    """Runs ``code`` on tensors of the CPU, kernels in Triton's interpreter; sources go to ``folder``."""
    source = code.source.replace("_empty_strided_cuda", "_empty_strided_cpu").replace(
        "torch.cuda.set_device(0)", "pass"
    )
    source = source.replace("from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = int")
    source = source.replace("with torch.cuda._DeviceGuard(0):", "if True:")
    wrapper = types.ModuleType("wrapper")
    with kernels_loaded(folder, _Interpreted):
        exec(compile(source, "wrapper", "exec"), vars(wrapper))
        return list(wrapper.call(list(inputs)))


class _Interpreted:
    """A kernel as the wrapper calls it, with some configuration that Inductor's heuristics might choose."""

    def __init__(self, function: Any, heuristic: str, options: Mapping[str, Any]) -> None:
        self._function = function
        blocks = {"pointwise": {"XBLOCK": 512, "YBLOCK": 16}, "persistent_reduction": {"XBLOCK": 4}}
        blocks["reduction"] = {"XBLOCK": 4, "R0_BLOCK": 256}
        self._blocks = blocks.get(heuristic) or options["config"]
        self._types = options["triton_meta"]["signature"]

    def run(self, *args: Any, stream: int) -> None:
        """Launches it."""
        names = self._function.arg_names
        given = dict(zip(names, args, strict=False))
        # The interpreter's numbers have as many bits as they need.
        too_large = [name for name, value in given.items() if self._types[name] == "i32" and value.bit_length() > 31]
        assert not too_large, f"int32 arguments that are larger: {too_large}"
        blocks = {name: size for name, size in self._blocks.items() if name in names}
        grid = [triton.cdiv(given.get(f"{axis}numel", 1), self._blocks.get(f"{axis.upper()}BLOCK", 1)) for axis in "xy"]
        self._function[(*grid, 1)](*args, **blocks)


@contextlib.contextmanager
def kernels_loaded(folder: Path, wrap: Callable[[Any, str, Mapping[str, Any]], Any]) -> Iterator[Callable[..., Any]]:
    """Loads a kernel's source as a function of Triton's, in ``wrap(function, heuristic, options)``."""
    numbers = itertools.count()

    def decorator(heuristic: str) -> Callable[..., Any]:
        return lambda **options: lambda function: wrap(function, heuristic, options)

    def load(self: object, name: str, source: str, **_: object) -> Any:
        # Triton reads sources from files.
        path = folder / f"kernel_{next(numbers)}.py"
        # The interpreter has none of libdevice's functions.
        path.write_text(
            re.sub(r"\blibdevice\.(\w+)\(", r"tl.\1(", source) if triton.knobs.runtime.interpret else source
        )
        module = types.ModuleType(path.stem)
        module.__file__ = str(path)
        exec(compile(path.read_text(), path, "exec"), vars(module))
        return vars(module)[name]

    with contextlib.ExitStack() as stack:
        for heuristic in ("pointwise", "persistent_reduction", "reduction", "fixed_config"):
            stack.enter_context(mock.patch.object(triton_heuristics, heuristic, decorator(heuristic)))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        stack.enter_context(mock.patch.object(AsyncCompile, "triton", load))
        stack.enter_context(mock.patch.object(AsyncCompile, "wait", lambda *_: None))
        yield load
