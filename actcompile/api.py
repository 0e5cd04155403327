"""The functions that users call."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .config import Config
from .errors import ConfigError

if TYPE_CHECKING:
    from .plan import Plan
    from .reporting import Report


def transform(model: torch.nn.Module, config: Config | None = None, **settings: Any) -> torch.nn.Module:
    """Compiles ``model`` in place with compressed activations and returns it.

    Args:
        model: Any module; its parameters, hooks and state_dict keys stay as they are. deepcopy and pickle drop the
            compilation: transform the copy again.
        config: Settings, or leave it out and give fields of ``Config`` by name.
        **settings: Fields of ``Config``.

    Raises:
        ConfigError: For bad settings, or both ``config`` and ``settings``.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    from ._torch import compile_in_place

    compile_in_place(model, backend="act", options={"config": make_config(config, settings)})
    return model


def make_config(config: Config | None, settings: dict[str, Any]) -> Config:
    """``config``, or one made of ``settings``.

    Raises:
        ConfigError: For both at once, or what is no Config.
    """
    if config is None:
        return Config.from_options(settings)
    if not isinstance(config, Config):
        raise ConfigError(f"config must be an actcompile.Config, got {config!r}")
    if settings:
        raise ConfigError(f"give a config or single settings, not both: got config and {', '.join(settings)}")
    return config


def check_arguments(function: str, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses settings among the arguments of a model that does not take them.

    Raises:
        ConfigError: Naming them.
    """
    settings = [name for name in kwargs if name in Config.names()]
    if not settings or not callable(model):
        return
    call = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        inspect.signature(call).bind(*args, **kwargs)
    except TypeError:
        given = ", ".join(f"{name}={kwargs[name]!r}" for name in settings)
        raise ConfigError(
            f"{function} hands keyword arguments to the model, got {given}, which the model does not take: give "
            f"settings as config=actcompile.Config({given})"
        ) from None
    # Of functions without a signature nothing is known.
    except ValueError:
        return


def report(model: torch.nn.Module | None = None) -> "Report":
    """What the training graphs of ``model`` save and store, in its latest step; of all models when left out.

    Where a step traced nothing, or not all, the report says why (``Report.notes``).

    Args:
        model: A module, compiled as it is or inside of one that is.

    Raises:
        ConfigError: When ``model`` is no module.
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise ConfigError(
            f"model must be a torch.nn.Module, got {model!r}: give the module, or nothing for all graphs of the process"
        )
    from . import steps
    from ._notes import notes_on
    from ._torch import parameters_in_use
    from .reporting import make_report

    calls = steps.latest(None if model is None else parameters_in_use(model))
    return make_report(calls, notes_on(calls, model))


def explain(
    model: torch.nn.Module | Callable[..., Any], *args: Any, config: Config | None = None, **kwargs: Any
) -> "Report":
    """What training ``model`` on these arguments would save and store; computes nothing and changes nothing.

    The model is traced on fake tensors: no memory is taken, no random number drawn, no buffer written.

    Args:
        model: The model in training mode, or a function of it that returns the loss.
        *args: Arguments of one call.
        config: Settings; the default ones when left out.
        **kwargs: Keyword arguments of the call.

    Raises:
        ConfigError: For bad settings.
    """
    from ._explain import explain_call

    config = make_config(config, {})
    check_arguments("explain", model, args, kwargs)
    return explain_call(model, args, kwargs, config)


def max_batch_size(
    model: torch.nn.Module | Callable[..., Any],
    *args: Any,
    memory: int | str,
    config: Config | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
    extra: int | str = 0,
    **kwargs: Any,
) -> int:
    """The largest batch whose training step fits into ``memory``; traces and computes, trains nothing.

    Counted: parameters and buffers of the model, the batch, and the most bytes that a compiled step has alive at once,
    in which are what is stored for the backward, what the step returns, and the gradients of trainable parameters as
    the backward makes them. The step starts without gradients, as after ``zero_grad()``: where they are there already
    (gradient accumulation), give their bytes as ``extra``. Not counted: the optimizer's state (``extra``), the
    memory of Python, of the CUDA context and of libraries, and what fragmentation wastes.

    The peak is that of code compiled for just this batch. Code that torch.compile makes for a batch of any size, after
    it has seen several, can take more.

    Tensors are planned with uniform bits; ``auto=True`` with the next higher number of bits for all.

    Args:
        model: The model in training mode, or a function of it that returns the loss, as it is compiled.
        *args: Arguments of one call, with a batch of at least 2. Tensors whose first dimension is as large as that of
            the first tensor carry the batch; let no other first dimension have its size.
        memory: The device's: bytes, or a string as "15GiB".
        config: Settings; the default ones when left out.
        loss: Turns the model's output into the loss; counted as compiled with the model. Without it, or where the
            settings bring a plan, which was made for the model alone, all that the model returns is taken to live
            until the end of the step.
        extra: Bytes that are taken besides, as the optimizer's state: an int, or a string as "2GiB".
        **kwargs: Keyword arguments of the call.

    Returns:
        The batch, at least 1.

    Raises:
        ConfigError: For bad settings, arguments without a batch, or when one sample does not fit.
        CompileError: When the model reads values of tensors, which tracing does not have.
    """
    from ._max_batch import max_batch_call

    config = make_config(config, {})
    check_arguments("max_batch_size", model, args, kwargs)
    return max_batch_call(model, args, kwargs, memory=memory, config=config, loss=loss, extra=extra)


def profile(
    model: torch.nn.Module | Callable[..., Any],
    *args: Any,
    loss: Callable[[Any], torch.Tensor] | None = None,
    config: Config | None = None,
    **kwargs: Any,
) -> "Plan":
    """Measures on a small batch how much each saved tensor matters, and solves the plan for ``config``.

    One step is interpreted and probed; another one, with the plan, is checked as with ``Config(check=True)``. Nothing
    is trained: parameters, their .grad, buffers and the states of random number generators stay as they are. The plan
    serves other batch sizes.

    Args:
        model: The model in training mode, or a function of it that returns the loss.
        *args: Arguments of one call.
        loss: Turns the model's output into the loss; left out when the output is the loss, or has it as ``.loss``.
        config: Settings; the default ones when left out.
        **kwargs: Keyword arguments of the call.

    Raises:
        ConfigError: For bad settings, or no loss.
        GradientError: When the plan's gradient is not as close to the exact one as predicted.
    """
    from ._profile import profile_call

    config = make_config(config, {})
    check_arguments("profile", model, args, kwargs)
    return profile_call(model, args, kwargs, loss, config)


def reset() -> None:
    """Forgets plans, reports and compiled graphs."""
    from . import _notes, records

    records.clear()
    _notes.forget()
    torch._dynamo.reset()
