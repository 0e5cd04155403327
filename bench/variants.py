"""What ``bench.step`` compares: the ways that torch has to save memory, and this package."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch import config as functorch_config
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from .harness import compile_act

__all__ = ["BASELINE", "VARIANTS", "Variant"]

# The format of both fp8 baselines; the other one, e5m2, has twice the error.
_FLOAT8 = torch.float8_e4m3fn

# Inductor's pass, by default for bfloat16 of 100 MB and more. Unless scaling is asked for by name, only its forward
# scales (torch 2.13).
_FLOAT8_PASS = {
    "post_grad_fusion_options": {
        "activation_quantization_aten_pass": {
            "quant_type": str(_FLOAT8),
            "size_in_mb": 0,
            "use_scaling": True,
            "exclude_primals": True,
            "allowed_dtypes": "torch.bfloat16;torch.float16;torch.float32",
        }
    }
}


@dataclass(frozen=True)
class Variant:
    """One way to run a training step.

    Args:
        compile: From the model to what is called in its place.
        context: What every forward runs in.
        checkpointed: Whether each block of the model is recomputed in the backward.
        counter: That of Inductor's counters which says whether a pass that the variant is about did anything.
    """

    compile: Callable[[nn.Module], Callable[..., Any]] = torch.compile
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext
    checkpointed: bool = False
    counter: str = ""


def _budget(share: float) -> AbstractContextManager[object]:
    return functorch_config.patch(activation_memory_budget=share)


@fx.wrap
def _to_float8(x: Tensor) -> tuple[Tensor, ...]:
    """``x [..., C]`` as fp8 with one scale per row, in ``x``'s dtype: ``x ~ scale * codes``; integers as they are."""
    if not x.is_floating_point() or not x.ndim:
        return (x,)
    limit = torch.finfo(_FLOAT8).max
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / limit
    return (x / scale).clamp(-limit, limit).to(_FLOAT8), scale


@fx.wrap
def _from_float8(packed: tuple[Tensor, ...]) -> Tensor:
    if len(packed) == 1:
        return packed[0]
    codes, scale = packed
    return codes.to(scale.dtype) * scale


@functools.cache
def _float8_graphs() -> tuple[fx.GraphModule, fx.GraphModule]:
    """The two hooks as graphs, which torch.compile makes part of the forward and of the backward."""
    return fx.symbolic_trace(lambda x: _to_float8(x)), fx.symbolic_trace(lambda packed: _from_float8(packed))


def _float8_hooks() -> AbstractContextManager[object]:
    return saved_tensors_hooks(*_float8_graphs())


@contextlib.contextmanager
def _budgeted_float8_hooks() -> Any:
    with _budget(0.8), _float8_hooks():
        yield


def _act(**options: Any) -> Variant:
    return Variant(lambda model: compile_act(model, **options))


BASELINE = "torch.compile"
VARIANTS: Mapping[str, Variant] = {
    BASELINE: Variant(),
    "eager": Variant(lambda model: model),
    "budget 0.8": Variant(context=lambda: _budget(0.8)),
    "budget 0.5": Variant(context=lambda: _budget(0.5)),
    "budget 0.2": Variant(context=lambda: _budget(0.2)),
    "checkpoint": Variant(checkpointed=True),
    "fp8 pass": Variant(
        lambda model: torch.compile(model, options=_FLOAT8_PASS), counter="activation_quantization_fwd_aten_pass"
    ),
    "fp8 hooks": Variant(context=_float8_hooks),
    "fp8 hooks, budget 0.8": Variant(context=_budgeted_float8_hooks),
    # Compiled code would fetch everything back at once.
    "save_on_cpu": Variant(lambda model: model, lambda: save_on_cpu(pin_memory=torch.cuda.is_available())),
    "act8": _act(bits=8),
    "act4": _act(bits=4),
    "act2": _act(bits=2),
    "act4 auto": _act(bits=4, auto=True),
    "act8 none": _act(bits=8, recompute="none"),
    "act4 none": _act(bits=4, recompute="none"),
    "act2 none": _act(bits=2, recompute="none"),
    "act4 auto none": _act(bits=4, auto=True, recompute="none"),
}
