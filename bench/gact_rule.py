"""GACT's way to choose bits, for comparison: sensitivities by three training steps per tensor, and a greedy allocation.

For each tensor l, gradients g0 and g1 with l at 1 bit and two draws of its noise, and g2 with l at 8 bits, all other
tensors as they are:

    C_l = max(|g0 - g1|^2, 2 max(|g0 - g2|^2, |g1 - g2|^2))
    minimize sum_l C_l / (2^b_l - 1)^2 over b_l in {1, 2, 4, 8, 32}, for sum_l numel_l b_l within a budget

Starting with 32 bits everywhere, the tensor goes one width down whose harm per bit saved is least. The budget knows
nothing of the bytes of scales and zero points.

Source: Liu et al., GACT (ICML 2022), as its release implements it.
"""

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence

from .replay import Replay

WIDTHS = (1, 2, 4, 8, 32)
# Width of all other tensors while one is measured, as in the first steps of its levels.
CURRENT_BITS = 4
STEPS_PER_TENSOR = 3


def sensitivities(replay: Replay) -> dict[str, float]:
    """C of every tensor, by row key."""
    found = {}
    # Noise of all other tensors is the same in the three steps.
    replay.start_from({row.key: CURRENT_BITS for row in replay.rows}, 0)
    for row in replay.rows:
        g0, g1, g2 = (replay.gradients({row.key: bits}, draw) for bits, draw in ((1, 0), (1, 1), (8, 0)))
        d01, d02, d12 = replay.distance(g0, g1), replay.distance(g0, g2), replay.distance(g1, g2)
        found[row.key] = max(d01, 2 * max(d02, d12))
    replay.start_from({}, 0)
    return found


def harm(sensitivity: float, bits: int) -> float:
    """The objective's term of one tensor."""
    return sensitivity / (2**bits - 1) ** 2


def descend(sensitivity: Sequence[float], numels: Sequence[int]) -> Iterator[list[int]]:
    """Bits of all tensors after each step of the greedy allocation, from 32 everywhere to 1 everywhere."""
    bits = [WIDTHS[-1]] * len(numels)
    yield list(bits)

    def step(index: int) -> tuple[float, int]:
        lower = WIDTHS[WIDTHS.index(bits[index]) - 1]
        worse = harm(sensitivity[index], lower) - harm(sensitivity[index], bits[index])
        return worse / (numels[index] * (bits[index] - lower)), index

    heap = [step(index) for index in range(len(numels))]
    heapq.heapify(heap)
    while heap:
        _, index = heapq.heappop(heap)
        bits[index] = WIDTHS[WIDTHS.index(bits[index]) - 1]
        if bits[index] > WIDTHS[0]:
            heapq.heappush(heap, step(index))
        yield list(bits)


def allocate(
    sensitivity: Mapping[str, float], numels: Mapping[str, int], fits: Callable[[Mapping[str, int]], bool]
) -> dict[str, int]:
    """Bits by row key: those of the first step that ``fits`` accepts, or 1 everywhere.

    GACT's own condition is ``sum(numels[key] * bits[key] for key in bits) <= average * sum(numels.values())``.
    """
    found: dict[str, int] = {}
    for bits in descend([sensitivity[key] for key in numels], list(numels.values())):
        found = dict(zip(numels, bits, strict=True))
        if fits(found):
            break
    return found
