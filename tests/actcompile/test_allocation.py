"""allocation against an exact solver, and its corner cases."""

import itertools
import time

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag

from actcompile.allocation import Option, fewest_nbytes, least_noise

BITS = (1, 2, 3, 4, 6, 8, 32)


def problem(count: int, seed: int) -> list[list[Option]]:
    """Tensors of different sizes whose sensitivities spread over six decades."""
    rng = np.random.default_rng(seed)
    options = []
    for _ in range(count):
        numel, sensitivity = int(rng.integers(1, 100)) * 4096, 10 ** rng.uniform(-6, 0)
        noise = {bits: 0.0 if bits == 32 else numel * sensitivity / (2**bits - 1) ** 2 for bits in BITS}
        options.append([Option(numel * bits // 8, noise[bits]) for bits in BITS])
    return options


def totals(options: list[list[Option]], chosen: list[int]) -> tuple[int, float]:
    picked = [ways[choice] for ways, choice in zip(options, chosen, strict=True)]
    return sum(option.nbytes for option in picked), sum(option.noise for option in picked)


def exact_noise(options: list[list[Option]], budget: float) -> float:
    """The least noise within the budget, by mixed-integer programming."""
    noises = np.array([option.noise for ways in options for option in ways])
    nbytes = np.array([option.nbytes for ways in options for option in ways], dtype=float)
    one_each = LinearConstraint(block_diag([np.ones((1, len(ways))) for ways in options]), 1, 1)
    within = LinearConstraint(nbytes[None] / budget, -np.inf, 1)
    solved = milp(
        noises / noises.sum(), constraints=[one_each, within], integrality=np.ones(len(noises)), bounds=Bounds(0, 1)
    )
    assert solved.status == 0
    return float(solved.fun * noises.sum())


@pytest.mark.parametrize("average", [1.5, 2, 3, 4, 6])
@pytest.mark.parametrize("seed", range(4))
def test_noise_is_close_to_the_optimum(seed: int, average: float) -> None:
    options = problem(40, seed)
    budget = sum(ways[0].nbytes * average for ways in options)
    nbytes, noise = totals(options, least_noise(options, budget) or [])
    assert nbytes <= budget
    assert noise <= 1.1 * exact_noise(options, budget)


def test_steps_that_end_at_the_budget_are_optimal() -> None:
    options = problem(12, 0)
    for fraction in (0.5, 0.1, 0.01):
        highest = totals(options, [0] * len(options))[1]
        chosen = fewest_nbytes(options, fraction * highest)
        nbytes, noise = totals(options, chosen)
        assert noise <= fraction * highest
        assert noise == pytest.approx(exact_noise(options, nbytes), rel=1e-6)
        assert least_noise(options, nbytes) == chosen


@pytest.mark.parametrize("seed", range(20))
def test_few_tensors_are_solved_exactly(seed: int) -> None:
    options = problem(4, seed)
    for average in (2, 4, 8):
        budget = sum(ways[0].nbytes * average for ways in options)
        chosen = least_noise(options, budget) or []
        choices = list(itertools.product(*(range(len(ways)) for ways in options)))
        best = min(totals(options, list(c))[1] for c in choices if totals(options, list(c))[0] <= budget)
        assert totals(options, chosen)[0] <= budget
        assert totals(options, chosen)[1] == pytest.approx(best, rel=1e-3)
        noise = totals(options, chosen)[1]
        fewest = min(totals(options, list(c))[0] for c in choices if totals(options, list(c))[1] <= noise)
        found = fewest_nbytes(options, noise)
        assert totals(options, found)[1] <= noise
        assert totals(options, found)[0] == pytest.approx(fewest, rel=1e-3)


def test_budget_below_the_cheapest() -> None:
    assert least_noise([[Option(10, 1.0), Option(20, 0.0)]], 9) is None


def test_options_off_the_hull_are_taken_where_they_are_the_best_that_fits() -> None:
    assert least_noise([[Option(10, 1.0), Option(15, 0.9), Option(20, 0.0)]], 19) == [1]
    assert least_noise([[Option(10, 1.0), Option(15, 2.0), Option(20, 0.0)]], 20) == [2]
    assert least_noise([[Option(20, 0.0), Option(10, 1.0), Option(10, 0.5)]], 10) == [2]


def test_nothing_to_choose() -> None:
    assert least_noise([], 0) == [] and fewest_nbytes([], 0.0) == []


def test_noise_that_no_option_reaches() -> None:
    assert fewest_nbytes([[Option(1, 5.0), Option(2, 3.0)]], 1.0) == [1]


def test_two_thousand_tensors_take_less_than_half_a_second() -> None:
    options = problem(2000, 0)
    start = time.perf_counter()
    least_noise(options, sum(ways[3].nbytes for ways in options))
    assert time.perf_counter() - start < 0.5
