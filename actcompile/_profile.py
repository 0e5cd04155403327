"""Ahead of training, on a small batch: a step that is probed, and one that is checked. Both train nothing."""

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from . import records
from ._isolated import fresh, reachable_modules, unchanged
from ._torch import isolated_compile, random_settings
from .backend import act
from .config import Config
from .errors import ConfigError
from .plan import Plan
from .rng import get_rng_state, set_rng_state
from .solving import solved_plan

# What has no effect beside a plan, or must not stand there.
_SAID_BY_PLAN = (
    *("bits", "memory", "noise", "auto", "group_size", "sparsity", "sparse_value_bits", "rows", "offload", "level"),
    "profile_every",
)


def profile_call(
    model: torch.nn.Module | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: Callable[[Any], torch.Tensor] | None,
    config: Config,
) -> Plan:
    """The plan for ``model``, from one step on ``args`` and ``kwargs``; another one checks what it does to gradients.

    Raises:
        ConfigError: When there is no loss to start from, nothing to train, or nothing to choose.
        GradientError: When the plan's gradient is not as close to the exact one as predicted.
    """
    probing = replace(config, auto=True, lowering="eager")
    if not probing.automatic:
        raise ConfigError(
            f"config must leave bits to be chosen, got plan={config.plan!r}, bits={config.setting('bits')!r}: leave "
            "the plan out and take bits from 1 to 8, memory or noise"
        )
    with _one_step(model, args, kwargs, loss, probing, config.lowering) as made:
        if not all(record.probe is None or record.probe.saw_finite for record in made):
            raise ConfigError(
                "loss must have a finite gradient to be profiled, got inf or nan: leave out what scales the loss, or "
                "profile after some steps of training"
            )
        plans = [solved_plan(record, "profile") for record in made if record.profile is not None]
    plan = functools.reduce(Plan.merged, plans, Plan())
    if plans:
        defaults: dict[str, Any] = {
            field.name: field.default for field in fields(Config) if field.name in _SAID_BY_PLAN
        }
        check_call(model, args, kwargs, loss, replace(config, plan=plan, **defaults))
    return plan


def check_call(
    model: torch.nn.Module | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: Callable[[Any], torch.Tensor] | None,
    config: Config,
) -> None:
    """Checks the gradient of one step with the settings of ``config``.

    Raises:
        ConfigError: When there is no loss to start from, or nothing to train.
        GradientError: When it is not as close to the exact one as predicted.
    """
    with _one_step(model, args, kwargs, loss, replace(config, check=True, lowering="eager"), config.lowering):
        pass


@contextmanager
def _one_step(
    model: torch.nn.Module | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: Callable[[Any], torch.Tensor] | None,
    config: Config,
    lowering: str,
) -> Iterator[list[records.GraphRecord]]:
    """The records of one step with ``config``, interpreted, with the random numbers of ``lowering``."""
    if not callable(model):
        raise ConfigError(f"model must be a torch.nn.Module or a function, got {type(model).__name__}")
    modules = list(reachable_modules(model))
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    parameters = list({id(parameter): parameter for parameter in parameters}.values())
    if not parameters:
        raise ConfigError("model must have parameters that require gradients, got none: unfreeze what is trained")
    options = {"config": config, "inductor": random_settings(lowering)}
    with records.collected() as made, unchanged(modules), _same_state(modules), torch.enable_grad():
        output = isolated_compile(fresh(model), functools.partial(act, options=options))(*args, **kwargs)
        # Unlike backward(), this leaves every .grad alone.
        torch.autograd.grad(_scalar(output, loss), parameters, allow_unused=True)
        yield made


def _scalar(output: Any, loss: Callable[[Any], torch.Tensor] | None) -> torch.Tensor:
    value = loss(output) if loss is not None else getattr(output, "loss", output)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ConfigError(
            f"loss must turn the model's output into one number to differentiate, got {type(value).__name__}: "
            "pass loss=function, or a model that returns its loss"
        )
    return value


@contextmanager
def _same_state(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Puts buffers and the state of all random number generators back at the end."""
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    position, python, arrays = get_rng_state(), random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            set_rng_state(position)
            random.setstate(python)
            np.random.set_state(arrays)
            with torch.no_grad():
                for buffer, content in buffers:
                    buffer.copy_(content)
