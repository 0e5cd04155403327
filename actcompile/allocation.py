"""Chooses one option per tensor: the least noise within a number of bytes, or the fewest bytes within a noise. Pure.

Each tensor has a few options, each with its bytes and its noise; noises add up. Of each tensor only the options on the
lower convex hull are looked at. Starting with the cheapest, steps along the hulls are taken in the order of noise
saved per byte. That is the optimum of the linear relaxation, and so the optimum for every budget at which a step ends;
in between, steps that still fit are taken in the same order, and the result is off by less than one step. Where there
are so few tensors that one step is a lot, an integer program is solved instead.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Tensors up to which an integer program is solved, nodes of its search, and the share by which it has to be better.
_FEW = 64
_MAX_NODES = 1000
_BETTER = 1e-6


@dataclass(frozen=True)
class Option:
    """One way to store a tensor: bytes, and the variance that it adds to the gradient."""

    nbytes: int
    noise: float


@dataclass(frozen=True)
class _Step:
    """From one option of a tensor to the next on its hull."""

    tensor: int
    start: int
    end: int
    nbytes: int
    gain: float


def least_noise(options: Sequence[Sequence[Option]], budget_nbytes: float) -> list[int] | None:
    """The index of an option per tensor, all within ``budget_nbytes``; None when even the cheapest take more."""
    chosen = [_cheapest(ways) for ways in options]
    left = budget_nbytes - sum(ways[choice].nbytes for ways, choice in zip(options, chosen, strict=True))
    if left < 0:
        return None
    for step in _steps(options):
        if chosen[step.tensor] == step.start and step.nbytes <= left:
            chosen[step.tensor] = step.end
            left -= step.nbytes
    noises, nbytes = _column(options, "noise"), _column(options, "nbytes")
    return _improved(options, chosen, noises, nbytes, budget_nbytes)


def fewest_nbytes(options: Sequence[Sequence[Option]], noise: float) -> list[int]:
    """The index of an option per tensor, their noise at most ``noise`` or as little as there is."""
    chosen = [_cheapest(ways) for ways in options]
    total = sum(ways[choice].noise for ways, choice in zip(options, chosen, strict=True))
    for step in _steps(options):
        if total <= noise:
            break
        chosen[step.tensor] = step.end
        total -= step.gain
    if total > noise:
        return chosen
    return _improved(options, chosen, _column(options, "nbytes"), _column(options, "noise"), noise)


def _column(options: Sequence[Sequence[Option]], name: str) -> NDArray[np.float64]:
    """One number of all options of all tensors."""
    return np.array([getattr(option, name) for ways in options for option in ways], dtype=float)


def _improved(
    options: Sequence[Sequence[Option]],
    chosen: list[int],
    costs: NDArray[np.float64],
    weights: NDArray[np.float64],
    limit: float,
) -> list[int]:
    """A choice of less total cost than ``chosen`` within the limit of the weights, or ``chosen``."""
    starts = np.cumsum([0, *(len(ways) for ways in options)])
    picked = starts[:-1] + np.array(chosen, dtype=int)
    cost = costs[picked].sum()
    if len(options) > _FEW or cost <= 0 or limit <= 0:
        return chosen
    # Few graphs come here, and importing it takes half of what importing everything else of this package does.
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import block_diag

    one_each = LinearConstraint(block_diag([np.ones((1, len(ways))) for ways in options]), 1, 1)
    # Options that alone cost more or weigh more than the whole choice would only spoil the scale of the numbers.
    within = LinearConstraint(np.minimum(weights / limit, 1)[None], -np.inf, 1)
    possible = Bounds(0, ((costs <= cost) & (weights <= limit)).astype(float))
    found = milp(
        np.minimum(costs / cost, 1),
        constraints=[one_each, within],
        integrality=np.ones(len(costs)),
        bounds=possible,
        options={"node_limit": _MAX_NODES},
    )
    if found.x is None:
        return chosen
    better = [int(found.x[start:end].argmax()) for start, end in itertools.pairwise(starts)]
    picked = starts[:-1] + np.array(better, dtype=int)
    is_better = weights[picked].sum() <= limit and costs[picked].sum() < (1 - _BETTER) * cost
    return better if is_better else chosen


def _cheapest(ways: Sequence[Option]) -> int:
    return min(range(len(ways)), key=lambda i: (ways[i].nbytes, ways[i].noise))


def _steps(options: Sequence[Sequence[Option]]) -> list[_Step]:
    """All steps along the hulls, the one that saves most noise per byte first; those of one tensor stay in order."""
    steps = [step for tensor, ways in enumerate(options) for step in _hull(tensor, ways)]
    return sorted(steps, key=lambda step: -step.gain / step.nbytes)


def _hull(tensor: int, ways: Sequence[Option]) -> list[_Step]:
    """Steps along the lower convex hull of a tensor's options, each saving less noise per byte than the one before."""
    hull: list[_Step] = []
    start = _cheapest(ways)
    for end in sorted(range(len(ways)), key=lambda i: ways[i].nbytes):
        if ways[end].nbytes <= ways[start].nbytes or ways[end].noise >= ways[hull[-1].end if hull else start].noise:
            continue
        step = _step(tensor, ways, hull[-1].end if hull else start, end)
        while hull and step.gain * hull[-1].nbytes >= hull[-1].gain * step.nbytes:
            step = _step(tensor, ways, hull.pop().start, end)
        hull.append(step)
    return hull


def _step(tensor: int, ways: Sequence[Option], start: int, end: int) -> _Step:
    nbytes, gain = ways[end].nbytes - ways[start].nbytes, ways[start].noise - ways[end].noise
    return _Step(tensor, start, end, nbytes, gain)
