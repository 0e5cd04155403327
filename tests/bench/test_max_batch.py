"""The bisection finds the largest number, wherever it starts."""

import pytest

from bench.max_batch import largest


@pytest.mark.parametrize("guess", [1, 2, 20, 77, 500])
@pytest.mark.parametrize("answer", [0, 1, 7, 76, 77, 78, 160])
def test_largest(answer: int, guess: int) -> None:
    asked = []

    def fits(number: int) -> bool:
        asked.append(number)
        return number <= answer

    assert largest(fits, guess) == answer
    assert min(asked) > 0 and len(asked) < 24
