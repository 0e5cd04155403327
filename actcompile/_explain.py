"""What training a model would save, found by tracing alone.

The model is called once through the backend, under a mode that shows every operator fake tensors: Dynamo traces,
AOTAutograd splits forward from backward, the planner decides, and the graphs are interpreted on fake tensors, so that
what follows a graph break is traced as well. No operator computes, draws a random number or writes to a buffer.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType, MethodType
from typing import Any

import torch

from . import records
from ._torch import NEEDS_VALUES, fake_mode_for, isolated_compile, own_code, random_settings
from .backend import act
from .config import Config
from .errors import CompileError, ConfigError
from .reporting import Report, make_report
from .rng import get_rng_state, set_rng_state

_CONTAINERS = (dict, list, set)


def explain_call(
    model: torch.nn.Module | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], config: Config
) -> Report:
    """The report on the training graphs of ``model(*args, **kwargs)``.

    Raises:
        ConfigError: When ``model`` is nothing to call.
        CompileError: When the model reads values of tensors, which tracing does not have.
    """
    if not callable(model):
        raise ConfigError(f"model must be a torch.nn.Module or a function, got {type(model).__name__}")
    # Interpreted graphs that draw random numbers as those of the wanted lowering do: the rows are the same.
    options = {"config": replace(config, lowering="eager"), "inductor": random_settings(config.lowering)}
    modules = list(_reachable_modules(model))
    tensors = [*args, *kwargs.values(), *(tensor for module in modules for tensor in module.parameters())]
    if any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in tensors):
        raise ConfigError(
            "model and arguments must be on a device that trains, got tensors on meta: make them on the CPU, or under "
            "torch._subclasses.FakeTensorMode() when they are too large for it"
        )
    position = get_rng_state()
    try:
        with records.collected() as made, _unchanged(modules), fake_mode_for(tensors), torch.enable_grad():
            isolated_compile(_fresh(model), functools.partial(act, options=options))(*args, **kwargs)
    except NEEDS_VALUES as error:
        raise CompileError(
            f"explain traces a model without values, got one that reads a tensor's ({error}): train one step with "
            'backend="act" and call actcompile.report'
        ) from error
    finally:
        set_rng_state(position)
    return make_report([record for record in made if record.rows])


def _fresh(model: Callable[..., Any]) -> Callable[..., Any]:
    """``model`` behind a function that no other call compiled."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return own_code(call)  # type: ignore[arg-type]


def _reachable_modules(model: object) -> Iterator[torch.nn.Module]:
    """The modules that ``model`` is or, when it is a function, names."""
    pending, seen = [model], set()
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        match current:
            case torch.nn.Module():
                yield current
                pending.extend(current.children())
            case MethodType():
                pending.extend((current.__self__, current.__func__))
            case functools.partial():
                pending.extend((current.func, *current.args, *current.keywords.values()))
            case FunctionType():
                named = inspect.getclosurevars(current)
                pending.extend((*named.nonlocals.values(), *named.globals.values()))


@contextmanager
def _unchanged(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Puts the attributes of ``modules`` back at the end, with the contents of those that are dicts, lists or sets."""
    attributes = [dict(vars(module)) for module in modules]
    contents = [
        (value, copy.copy(value)) for known in attributes for value in known.values() if isinstance(value, _CONTAINERS)
    ]
    try:
        yield
    finally:
        for value, content in contents:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        for module, known in zip(modules, attributes, strict=True):
            vars(module).clear()
            vars(module).update(known)
