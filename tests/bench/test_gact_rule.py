"""GACT's greedy allocation against all allocations there are."""

import itertools
import random

import pytest

from bench.gact_rule import WIDTHS, allocate, descend, harm


@pytest.mark.parametrize("seed", range(5))
def test_every_step_is_the_least_harm_for_its_bits(seed: int) -> None:
    source = random.Random(seed)
    sensitivity = [10 ** source.uniform(-6, 3) for _ in range(4)]
    numels = [source.randrange(1, 1000) for _ in range(4)]

    def total(bits: tuple[int, ...]) -> float:
        return sum(map(harm, sensitivity, bits))

    def spent(bits: tuple[int, ...]) -> int:
        return sum(width * numel for width, numel in zip(bits, numels, strict=True))

    every = list(itertools.product(WIDTHS, repeat=4))
    steps = [tuple(bits) for bits in descend(sensitivity, numels)]
    assert steps[0] == (32,) * 4 and steps[-1] == (1,) * 4
    assert len(steps) == 1 + 4 * (len(WIDTHS) - 1)
    for bits in steps:
        best = min(total(other) for other in every if spent(other) <= spent(bits))
        assert total(bits) == pytest.approx(best, rel=1e-9)


def test_the_first_step_that_fits_is_taken() -> None:
    sensitivity, numels = {"a": 1.0, "b": 1e-6}, {"a": 100, "b": 100}

    def fits(bits: dict[str, int]) -> bool:
        return sum(bits[key] * numels[key] for key in bits) <= 4 * 200

    assert allocate(sensitivity, numels, fits) == {"a": 4, "b": 1}
    assert allocate(sensitivity, numels, lambda bits: False) == {"a": 1, "b": 1}
