"""What training a model would save, found by tracing alone.

The model is called once through the backend, under a mode that shows every operator fake tensors: Dynamo traces,
AOTAutograd splits forward from backward, the planner decides, and the graphs are interpreted on fake tensors, so that
what follows a graph break is traced as well. No operator computes, draws a random number or writes to a buffer.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from . import records, steps
from ._isolated import fresh, reachable_modules, unchanged
from ._notes import notes_on
from ._torch import NEEDS_VALUES, fake_mode_for, isolated_compile, random_settings, untraced_reasons
from .backend import act
from .config import Config
from .errors import CompileError, ConfigError
from .reporting import Report, make_report
from .rng import get_rng_state, set_rng_state


def explain_call(
    model: torch.nn.Module | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], config: Config
) -> Report:
    """The report on the training graphs of ``model(*args, **kwargs)``.

    Raises:
        ConfigError: When ``model`` is nothing to call.
        CompileError: When the model reads values of tensors, which tracing does not have.
    """
    before = untraced_reasons()
    calls = traced_calls(model, lambda: (args, kwargs), [*args, *kwargs.values()], config)
    return make_report(calls, notes_on(calls, before=before))


def traced_records(*args: Any, **kwargs: Any) -> list[records.GraphRecord]:
    """The records of ``traced_calls``, one for each call."""
    return [call.record for call in traced_calls(*args, **kwargs)]


def traced_calls(
    model: torch.nn.Module | Callable[..., Any],
    make_arguments: Callable[[], tuple[Sequence[Any], Mapping[str, Any]]],
    examples: Sequence[Any],
    config: Config,
    loss: Callable[[Any], Any] | None = None,
) -> list[steps.Call]:
    """The calls of training graphs that one call of ``model`` makes, traced on fake tensors.

    Args:
        model: What is called.
        make_arguments: Makes the call's arguments, in the mode that makes all new tensors fake.
        examples: Tensors of the user's, which may be fake already.
        config: Settings.
        loss: Traced with the model, on what it returns.

    Raises:
        ConfigError: When ``model`` is nothing to call.
        CompileError: When the model reads values of tensors, which tracing does not have.
    """
    if not callable(model):
        raise ConfigError(f"model must be a torch.nn.Module or a function, got {type(model).__name__}")
    if config.pruning == "samples":
        raise ConfigError(
            "config must say how much is stored whatever the values are, got pruning='samples': train one step and "
            "call actcompile.report"
        )
    # Interpreted graphs that draw random numbers as those of the wanted lowering do: the rows are the same.
    options = {"config": replace(config, lowering="eager"), "inductor": random_settings(config.lowering)}
    modules = list(reachable_modules(model))
    tensors = [*examples, *(tensor for module in modules for tensor in module.parameters())]
    if any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in tensors):
        raise ConfigError(
            "model and arguments must be on a device that trains, got tensors on meta: make them on the CPU, or under "
            "torch._subclasses.FakeTensorMode() when they are too large for it"
        )
    position = get_rng_state()
    try:
        with records.collected(), unchanged(modules), fake_mode_for(tensors), torch.enable_grad():
            args, kwargs = make_arguments()
            isolated_compile(fresh(model, loss), functools.partial(act, options=options))(*args, **kwargs)
            made = steps.latest()
    except NEEDS_VALUES as error:
        raise CompileError(
            f"a model is traced here without values, got one that reads a tensor's ({error}): train one step with "
            'backend="act" and call actcompile.report'
        ) from error
    finally:
        set_rng_state(position)
    done = [call for call in made if call.rows]
    for call in done:
        call.record.lowering = config.lowering
    return done
