"""Chooses one option per tensor: the least noise within a number of bytes, or the fewest bytes within a noise. Pure.

Each tensor has a few options, each with its bytes and its noise; noises add up. Of each tensor only the options on the
lower convex hull are looked at. Starting with the cheapest, steps along the hulls are taken in the order of noise
saved per byte. That is the optimum of the linear relaxation, and so the optimum for every budget at which a step ends;
in between, steps that still fit are taken in the same order, and the result is off by less than one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass


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
    return chosen


def fewest_nbytes(options: Sequence[Sequence[Option]], noise: float) -> list[int]:
    """The index of an option per tensor, their noise at most ``noise`` or as little as there is."""
    chosen = [_cheapest(ways) for ways in options]
    total = sum(ways[choice].noise for ways, choice in zip(options, chosen, strict=True))
    for step in _steps(options):
        if total <= noise:
            break
        chosen[step.tensor] = step.end
        total -= step.gain
    return chosen


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
