"""Tells whether a function of one number, as a few operators compute it, may be computed again from a noisy number.

It may where the function, at whatever scale it is looked at, is a ramp or a step with a bend: its slope is bounded, the
slope's total variation is, and far out it is a straight line that is not zero. Such a function is a mixture of ramps
max(x - t, 0) of bounded weight: an error comes out no larger than it went in, is biased near the bend alone, and does
not grow against what most elements are. SiLU, GELU, Mish, softplus, ELU and their derivatives are such functions,
sigmoid and tanh, too. A single hump is none (the derivatives of the last two): on a tensor of large values, all that it
has lies in a few elements, and noise as wide as the hump moves it elsewhere. Nor is what oscillates (sine), grows
faster than a line (square, exponential) or has a pole, a steep spot or a jump.

    f(x) = mul(x, sigmoid(x))      ->  yes
    f(x) = sqrt(add(relu(x), 1e-6))  ->  no: its slope reaches 500

The function is computed in float64 on points near and far; no list of names decides.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

aten, prims = torch.ops.aten, torch.ops.prims

# Largest slope, and largest total variation of the slope in units of it.
_MOST_SLOPE = 8.0
_MOST_VARIATION = 16.0
# How far a step may overshoot, against its height.
_MOST_BEND = 1.05
# Slopes below this count as none, far out.
_LEVEL = 1e-2
_POINTS = 2001
_WIDTH = 40.0
_SCALES = (1.0, 10.0, 100.0, 1000.0)
# Where the slope changes most, points lie closer and closer: what is steep there stays so.
_REFINEMENTS = 4

# Distances from zero, to find poles at, and what a function has there that has one.
_NEAR = (-0.5, -30.0)
_POLE = 1e6

# Operators of a function: their names, and arguments, which are constants or ("value", position).
Steps = tuple[tuple[Any, tuple[Any, ...], tuple[tuple[str, Any], ...]], ...]


def is_bounded(nodes: Sequence[fx.Node], root: fx.Node) -> bool:
    """Whether the last of ``nodes``, pointwise operators in order on ``root`` and constants, is such a function."""
    steps = _steps(nodes, root)
    return steps is not None and _is_bounded(steps)


def has_pole(nodes: Sequence[fx.Node], root: fx.Node) -> bool:
    """Whether the last of ``nodes``, as above, grows beyond all bounds where ``root`` comes near zero."""
    steps = _steps(nodes, root)
    return steps is not None and _has_pole(steps)


def constant_of(node: fx.Node) -> Any:
    """The number that every element of ``node`` is, or None."""
    if node.all_input_nodes:
        return None
    if node.target is aten.full.default:
        return node.args[1]
    return node.args[0] if node.target is aten.scalar_tensor.default else None


def _steps(nodes: Sequence[fx.Node], root: fx.Node) -> Steps | None:
    positions = {root: 0}
    steps = []
    for node in nodes:
        try:
            args = tuple(_argument(value, positions) for value in node.args)
            kwargs = tuple(sorted((name, _argument(value, positions)) for name, value in node.kwargs.items()))
        except KeyError:
            return None
        steps.append((node.target, args, kwargs))
        positions[node] = len(positions)
    return tuple(steps)


def _argument(value: Any, positions: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        if value in positions:
            return "value", positions[value]
        constant = constant_of(value)
        if constant is None:
            raise KeyError(value)
        return "constant", constant, value.meta["val"].dtype
    return tuple(value) if isinstance(value, list) else value


@functools.lru_cache(4096)
def _has_pole(steps: Steps) -> bool:
    with unset_fake_temporarily(), torch.no_grad():
        distances = torch.logspace(*_NEAR, 100, dtype=torch.float64)
        value = _evaluate(steps, torch.cat([-distances, distances]))
        # A root of a negative number is no pole.
        return value is not None and bool((value.abs() > _POLE).any())


@functools.lru_cache(4096)
def _is_bounded(steps: Steps) -> bool:
    """Evaluates the function on a grid at every scale."""
    # Graphs are rewritten while fake tensors are made of all others.
    with unset_fake_temporarily(), torch.no_grad():
        line = torch.linspace(-_WIDTH, _WIDTH, _POINTS, dtype=torch.float64)
        results = []
        for scale in _SCALES:
            value = _evaluate(steps, scale * line)
            if value is None or value.shape != line.shape or not _is_gentle(steps, scale * line, value):
                return False
            results.append(value)
        return _has_lasting_ends(results)


def _evaluate(steps: Steps, x: Tensor) -> Tensor | None:
    values: list[Any] = [x]
    for target, args, kwargs in steps:
        # Rounding to fewer bits is noise of its own.
        if target is prims.convert_element_type.default and values[args[0][1]].is_floating_point():
            values.append(values[args[0][1]])
            continue
        try:
            given = [_given(value, values) for value in args]
            values.append(target(*given, **{name: _given(value, values) for name, value in kwargs}))
        except (RuntimeError, TypeError, NotImplementedError):
            # It takes no float64, or not on this device.
            return None
    result = values[-1]
    return result.to(torch.float64) if isinstance(result, Tensor) and not result.is_complex() else None


def _given(value: Any, values: Sequence[Any]) -> Any:
    if isinstance(value, tuple) and value and value[0] == "value":
        return values[value[1]]
    if isinstance(value, tuple) and value and value[0] == "constant":
        return torch.tensor(value[1], dtype=torch.float64 if value[2].is_floating_point else value[2])
    return value


def _is_gentle(steps: Steps, x: Tensor, value: Tensor) -> bool:
    """Whether all is finite, slopes are bounded, and do not change again and again."""
    slopes = value.diff() / x.diff()
    steepest = float(slopes.abs().max())
    if not steepest <= _MOST_SLOPE or float(slopes.diff().abs().sum()) > _MOST_VARIATION * max(steepest, 1e-9):
        return False
    for _ in range(_REFINEMENTS):
        bend = int(slopes.diff().abs().argmax())
        x = torch.linspace(float(x[bend]), float(x[bend + 2]), 101, dtype=torch.float64)
        value = torch.zeros_like(x) + _evaluate(steps, x)  # type: ignore[operator]
        slopes = value.diff() / x.diff()
        if not float(slopes.abs().max()) <= _MOST_SLOPE:
            return False
    return True


def _has_lasting_ends(results: Sequence[Tensor]) -> bool:
    """Whether the function grows for good on one side, or is a step that goes little beyond its two levels."""
    far, step = results[-1], _SCALES[-1] * 2 * _WIDTH / (_POINTS - 1)
    first, last = float(far[0]), float(far[-1])
    if max(abs(float(far[1]) - first), abs(last - float(far[-2]))) > _LEVEL * step:
        return True
    # A constant beside a hump makes no step of it: tanh(x)^2 is as little of one as 1 - tanh(x)^2.
    height = abs(last - first)
    bends = (torch.minimum((value - first).abs(), (value - last).abs()).max() for value in results)
    return height > _LEVEL and all(float(bend) <= _MOST_BEND * height for bend in bends)
