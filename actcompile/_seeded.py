"""Inductor's random numbers, in graphs that are interpreted.

Compiled code computes them from a seed, in the backward the same as in the forward. The bodies that torch gives these
operators draw from its generator instead, others each time. The numbers here are not those of compiled code.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def _random(size: Sequence[int], seed: Tensor, mode: str, **kwargs: Any) -> Tensor:
    return getattr(torch, mode)(size, generator=_generator(seed), device=seed.device)  # type: ignore[no-any-return]


def _randint(low: int, high: int, size: Sequence[int], seed: Tensor) -> Tensor:
    return torch.randint(low, high, size, generator=_generator(seed), device=seed.device)


def _generator(seed: Tensor) -> torch.Generator:
    return torch.Generator(seed.device).manual_seed(int(seed))


# By name: torch defines them with its first compilation.
RANDOM: Mapping[str, Callable[..., Tensor]] = {
    "prims::inductor_random": _random,
    "prims::inductor_randint": _randint,
}
