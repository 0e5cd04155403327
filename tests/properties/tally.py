"""Counts what becomes of random programs, and prints those that fail, without stopping at the first.

``python -m tests.properties.tally --cases 2000 --seed 1`` compares level L0, with ``--bits 8`` codes of 8 bits.
"""

import argparse
import logging
import warnings
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from . import test_compressed, test_lossless
from .programs import Program, programs


def main() -> None:
    """Runs the cases and prints the tally."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bits", type=int, choices=(32, 8), default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    tally: Counter[str] = Counter()

    def count(program: Program) -> None:
        try:
            tally[_outcome(program, options.bits)] += 1
        except AssertionError as error:
            tally["failed"] += 1
            print(error, error.__cause__ or "", flush=True)
        if tally.total() % 50 == 0:
            print(dict(tally), flush=True)

    cases = settings(
        max_examples=options.cases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    seed(options.seed)(cases(given(programs())(count)))()
    print(dict(tally))


def _outcome(program: Program, bits: int) -> str:
    if bits == 32:
        return test_lossless.check(program)
    error = test_compressed.check(program)
    return "not compared" if error is None else "below 1%" if error < 0.01 else "below 10%"


if __name__ == "__main__":
    main()
