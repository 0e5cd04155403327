"""The largest batch that fits, from symbolic bytes.

    1. The model is traced once on fake tensors, with the batch as a symbol, and Inductor says what the code would
       allocate and free: the peak of a step as a maximum over expressions in the batch.
    2. Solved for the memory, this gives a batch, and the graphs of just that batch are traced: Inductor orders what it
       compiles for one size by that size. What they differ by corrects the expressions, until the batch stays.

Where the model fixes the sizes it is traced with, step 1 is a line through two traced batches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ._config_checks import parse_nbytes
from ._explain import traced_calls
from ._isolated import reachable_modules
from ._torch import mark_dynamic_batch, tree_leaves, tree_map
from .choices import CODE_BITS
from .config import Config
from .errors import ConfigError
from .memory import SymbolicTimeline, step_peak

# Corrections at most, and the share of the memory that may stay empty: each correction traces the model again.
_ROUNDS = 6
_TOLERANCE = 0.005
_MAX_BATCH = 2**40


def max_batch_call(
    model: torch.nn.Module | Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    memory: int | str,
    config: Config,
    loss: Callable[[Any], torch.Tensor] | None,
    extra: int | str,
) -> int:
    """The largest batch of ``model`` within ``memory``; see ``actcompile.max_batch_size``.

    Raises:
        ConfigError: For arguments without a batch, or memory that one sample does not fit in.
    """
    if not callable(model):
        raise ConfigError(f"model must be a torch.nn.Module or a function, got {type(model).__name__}")
    beside = _nbytes("extra", extra, least=0)
    limit = _nbytes("memory", memory, least=1) - beside
    step = _Step(model, args, kwargs, loss, _plannable(config))
    fitting, found = _corrected(step, limit)
    if not fitting:
        least = found + beside
        raise ConfigError(
            f"memory must hold the step of one sample, {least} bytes ({least / 2**20:.1f} MiB) with parameters, "
            f"gradients and extra, got {memory!r}: give that much, or store fewer bits"
        )
    return fitting


def _corrected(step: "_Step", limit: int) -> tuple[int, int]:
    """The largest batch within ``limit`` bytes and its bytes, or 0 and the bytes of one sample."""
    estimate = step.estimate()
    batch = _largest(estimate, limit)
    slope = max(1.0, (estimate(2 * batch) - estimate(batch)) / batch)
    fitting, exceeding, traced = (0, 0), _MAX_BATCH, (0, 0)
    for _ in range(_ROUNDS):
        found = step.nbytes(batch)
        if traced[0]:
            slope = max(1.0, (found - traced[1]) / (batch - traced[0]))
        traced = (batch, found)
        if found <= limit:
            fitting = max(fitting, traced)
        else:
            exceeding = min(exceeding, batch)
        if exceeding == 1:
            return 0, found
        if exceeding - fitting[0] == 1 or limit * (1 - _TOLERANCE) <= found <= limit:
            break
        batch = batch + math.floor((limit - found) / slope)
        batch = min(max(batch, fitting[0] + 1), exceeding - 1)
    if fitting[0]:
        return fitting
    found = step.nbytes(1)
    return int(found <= limit), found


def _largest(nbytes: Callable[[int], int], limit: int) -> int:
    """The largest size whose ``nbytes``, which grow with it, stay within ``limit``; at least 1."""
    low, high = 1, 2
    while high < _MAX_BATCH and nbytes(high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if nbytes(middle) <= limit else (low, middle)
    return low


class _Step:
    """A training step of any batch, and the bytes that it takes."""

    def __init__(
        self,
        model: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        loss: Callable[[Any], torch.Tensor] | None,
        config: Config,
    ) -> None:
        self._model, self._arguments, self._config = model, (tuple(args), dict(kwargs)), config
        # A plan was made for the model alone.
        self._loss = loss if config.plan is None else None
        inputs = [leaf for leaf in tree_leaves(self._arguments) if isinstance(leaf, torch.Tensor)]
        self._batch = _batch_of(inputs)
        modules = reachable_modules(model)
        lasting = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        lasting += [value for value in inputs if not self._carries(value)]
        self._lasting = {id(tensor): tensor for tensor in lasting}
        self._sample_nbytes = sum(value.nbytes for value in inputs if self._carries(value)) // self._batch

    def nbytes(self, batch: int) -> int:
        """Bytes of a step of ``batch``, traced for just this size."""
        timelines = self._timelines(batch, dynamic=False)
        return self._total(batch, timelines, {})

    def estimate(self) -> Callable[[int], int]:
        """Bytes of a step as a function of its batch."""
        timelines = self._timelines(self._batch, dynamic=True)
        symbols = [symbol for timeline in timelines for symbol, size in timeline.traced.items() if size == self._batch]
        if symbols:
            return lambda batch: self._total(batch, timelines, dict.fromkeys(symbols, batch))
        first, second = self._batch, 2 * self._batch
        start = self._total(first, timelines, {})
        slope = (self.nbytes(second) - start) / first
        return lambda batch: int(start + slope * (batch - first))

    def _total(self, batch: int, timelines: Sequence[SymbolicTimeline], sizes: Mapping[Any, int]) -> int:
        peak = step_peak([timeline.at(sizes) for timeline in timelines])
        return sum(tensor.nbytes for tensor in self._lasting.values()) + batch * self._sample_nbytes + peak

    def _timelines(self, batch: int, dynamic: bool) -> list[SymbolicTimeline]:
        def remade(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not self._carries(value):
                return value
            shape = (batch, *value.shape[1:])
            result = torch.empty_strided(shape, _batch_stride(value), dtype=value.dtype, device=value.device)
            if dynamic:
                mark_dynamic_batch(result)
            return result.requires_grad_(value.requires_grad)

        examples = tree_leaves(self._arguments)
        calls = traced_calls(self._model, lambda: tree_map(remade, self._arguments), examples, self._config, self._loss)
        if not calls:
            raise ConfigError(
                "model must save something for a backward, got one without parameters that require gradients, or that "
                "cannot be compiled: unfreeze what is trained"
            )
        # Parameters of modules that a function reaches by ways of its own.
        self._lasting |= {id(parameter): parameter for call in calls for parameter in call.parameters()}
        return [call.record.symbolic_timeline() for call in calls]

    def _carries(self, value: torch.Tensor) -> bool:
        """Whether ``value`` is there once per sample."""
        return value.dim() > 0 and value.shape[0] == self._batch and not isinstance(value, torch.nn.Parameter)


def _batch_stride(value: torch.Tensor) -> tuple[int, ...]:
    """Strides for any number of samples: those of ``value`` where its samples lie one behind the other."""
    sample = value[0]
    side_by_side = value.stride(0) >= sum((n - 1) * s for n, s in zip(sample.shape, sample.stride(), strict=True)) + 1
    return value.stride() if side_by_side else torch.empty(value.shape, device="meta").stride()


def _batch_of(inputs: Sequence[torch.Tensor]) -> int:
    """The size of the first dimension of the first input that has one.

    Raises:
        ConfigError: Without such an input, or for a batch that cannot be told from a dimension of size 1.
    """
    sizes = [int(value.shape[0]) for value in inputs if value.dim() and not isinstance(value, torch.nn.Parameter)]
    if not sizes:
        raise ConfigError(
            "args must hold one example batch as tensors, got none: give what the model is called with, as in "
            "max_batch_size(model, ids, memory=...)"
        )
    if sizes[0] < 2:
        raise ConfigError(f"the example batch must have at least 2 samples, got {sizes[0]}: repeat the sample")
    return sizes[0]


def _plannable(config: Config) -> Config:
    """``config``, with the same mean bits for all tensors where it leaves them to be measured.

    Raises:
        ConfigError: For targets that need sensitivities or fix the bytes.
    """
    if config.memory is not None or config.noise is not None:
        raise ConfigError(
            "config must say how many bits are stored, got "
            f"memory={config.memory!r} and noise={config.noise!r}: set bits, or plan=actcompile.profile(...)"
        )
    if not config.automatic:
        return config
    assert config.average_bits is not None
    return replace(config, auto=False, bits=min(bits for bits in CODE_BITS if bits >= config.average_bits))


def _nbytes(name: str, value: object, least: int) -> int:
    nbytes = parse_nbytes(value) if isinstance(value, str) else value
    if isinstance(nbytes, bool) or not isinstance(nbytes, int) or nbytes < least:
        raise ConfigError(f'{name} must be bytes from {least} up, an int or a string as "15GiB", got {value!r}')
    return nbytes
