"""Inductor's random numbers, in graphs that are interpreted.

Compiled code draws seeds from torch's generator, and makes each number of seed and position by Philox 4x32-10 (Salmon
et al., 2011), in the backward the same as in the forward. The bodies that torch gives these operators draw all numbers
from its generator instead, others each time. Here, uniform ones (dropout's) are those of compiled code:

    CPU     key (seed mod 2^32, 0), counter (position, 0, 0, 0), word & (2^31 - 1)    (cpp_prefix.h, 2.11 to 2.15)
    Triton  key (seed mod 2^32, seed / 2^32), the same counter, word or its complement where it is negative (tl.rand)

Numbers that are normally distributed, and integers, come from a generator that the seed starts: others than in compiled
code, and the same in both directions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_SCALE = 4.6566127342e-10
# Positions at a time: what is computed on the way takes 8 bytes each, several times over.
_CHUNK = 2**18


def uniform(size: Sequence[int], seed: Tensor) -> Tensor:
    """float32 numbers in [0, 1) of ``size``, as compiled code makes them of ``seed``, a 0-d int64 tensor."""
    start, device = int(seed), seed.device
    result = torch.empty(math.prod(size), dtype=torch.float32, device=device)
    for first in range(0, result.numel(), _CHUNK):
        positions = torch.arange(first, min(first + _CHUNK, result.numel()), device=device)
        if device.type == "cpu":
            word = philox(positions, start & _WORD, 0) & 0x7FFFFFFF
        else:
            word = philox(positions, start & _WORD, (start >> 32) & _WORD)
            word = torch.where(word > 0x7FFFFFFF, _WORD - word, word)
        result[first : first + _CHUNK] = word.to(torch.float32) * _SCALE
    return result.view(*size)


def philox(positions: Tensor, low: int, high: int) -> Tensor:
    """The first word of Philox 4x32-10, as int64, for counters (position, 0, 0, 0) and the key (low, high)."""
    zero = torch.zeros_like(positions)
    counter = (positions & _WORD, zero, zero, zero)
    for _ in range(_ROUNDS):
        high_0, low_0 = _product(counter[0], _MULTIPLIERS[0])
        high_1, low_1 = _product(counter[2], _MULTIPLIERS[1])
        counter = (high_1 ^ counter[1] ^ low, low_1, high_0 ^ counter[3] ^ high, low_0)
        low, high = (low + _KEY_STEPS[0]) & _WORD, (high + _KEY_STEPS[1]) & _WORD
    return counter[0]


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of the product of two 32-bit words."""
    # By halves: a product of 64 bits would overflow.
    lower = word * (factor & 0xFFFF)
    upper = word * (factor >> 16) + (lower >> 16)
    return upper >> 16, ((upper & 0xFFFF) << 16) | (lower & 0xFFFF)


def _random(size: Sequence[int], seed: Tensor, mode: str, **kwargs: Any) -> Tensor:
    if mode == "rand":
        return uniform(size, seed)
    return getattr(torch, mode)(size, generator=_generator(seed), device=seed.device)  # type: ignore[no-any-return]


def _randint(low: int, high: int, size: Sequence[int], seed: Tensor) -> Tensor:
    return torch.randint(low, high, size, generator=_generator(seed), device=seed.device)


def _seeds(count: int, device: torch.device) -> Tensor:
    # As ir.RandomSeeds draws them; the body that torch gives the operator takes half of the range.
    limits = torch.iinfo(torch.int64)
    return torch.randint(limits.min, limits.max, [count], device=device)


def _generator(seed: Tensor) -> torch.Generator:
    return torch.Generator(seed.device).manual_seed(int(seed))


# By name: torch defines them with its first compilation.
RANDOM: Mapping[str, Callable[..., Tensor]] = {
    "prims::inductor_seeds": _seeds,
    "prims::inductor_random": _random,
    "prims::inductor_randint": _randint,
}


class SeededInterpreter(fx.Interpreter):
    """Interprets a graph with these random numbers."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls an operator, or what stands here for it."""
        name = target._schema.name if isinstance(target, torch._ops.OpOverload) else ""
        return super().call_function(RANDOM.get(name, target), args, kwargs)
