"""Whether a gradient is as close to the exact one as its codes allow, and if not, whose fault it is.

rewrites    restored and exact gradient differ by the square root of the precision, half of its digits, at most
finite      what is finite in the exact gradient is finite in that of the step
size        |g' - g|^2 is at most a few times what is predicted. Both are draws of quadratic forms; where noise passes
            few numbers on its way they spread over orders of magnitude, so that the mean of several draws decides
            wherever one of each lies apart
share       |g' - g| / |g| is at most 85% at 4 bits, 5% at 8: noise of that size has been multiplied on its way, and the
            first derivatives that it is predicted by say nothing any more
bias        the mean of (g' - g) along g is zero, within six of its standard deviations and what curvature adds
"""

import logging
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._gradients import Gradients
from .errors import GradientError
from .plan import SavedTensor

log = logging.getLogger(__name__)

# Where one draw of the noise is no more than this many times what one product predicts, no others are asked.
_FEW_TIMES = 2.0
# What the means of the noise and of the prediction may differ by, over so many draws of each, at 4 bits and more. On
# fewer, what products of noise add grows with the variance.
_TIMES = 4.0
_DRAWS = 8
# |g' - g| / |g| at 4 bits: 5% at 8 bits.
_SHARE = 0.85
# How far a mean may be off at 4 bits because functions are curved; that grows with the variance.
_CURVATURE = 0.02
# Standard deviations that a mean may lie apart.
_SIGMAS = 6.0
# Of the gradient's norm: a gradient that is smaller, such as that of a bias ahead of a normalization, is rounding.
_SMALL = 0.01


def judge(gradients: Gradients, results: Sequence[Any], rows: Mapping[str, SavedTensor], names: Sequence[str]) -> bool:
    """Whether there was anything to compare with: an exact gradient that is finite.

    Args:
        gradients: The exact ones, and those of chosen tensors' codes.
        results: Those of the step.
        rows: What is saved, by row key.
        names: Of the inputs whose gradients are given.

    Raises:
        GradientError: When ``results`` are wrong.
    """
    if not gradients.compared:
        log.warning("the exact gradient is not finite: the next one is checked")
        return False
    _check_rewrites(gradients, names)
    _check_finite(gradients, results, rows)
    if gradients.keys and _norm(gradients.exact, gradients.counted):
        _Noise(gradients, rows).check(results)
    log.info("the gradient is as close to the exact one as predicted")
    return True


def _check_rewrites(gradients: Gradients, names: Sequence[str]) -> None:
    """Raises where the rewritten backward, on exact tensors, has another gradient than the graph that was traced."""
    exact, total = gradients.exact, _norm(gradients.exact, gradients.compared)
    for position in gradients.compared:
        reference = exact[position].double()
        digits = torch.finfo(exact[position].dtype).eps ** 0.5
        difference = float((gradients.restored[position].double() - reference).norm())
        limit = digits * (float(reference.norm()) + _SMALL * total)
        if not difference <= limit:
            name = names[position] if position < len(names) else f"input {position}"
            raise GradientError(
                "graphs that are rewritten must have the gradient of those that were traced, where nothing is rounded, "
                f"got one for {name} that is {difference:.3g} off, of a norm of {reference.norm():.3g}: a defect of "
                "this package, please report it with the model; skip and bits do not help, recompute='none' may"
            )


def _check_finite(gradients: Gradients, results: Sequence[Any], rows: Mapping[str, SavedTensor]) -> None:
    """Raises where a gradient that is finite is inf or nan in the step."""

    def num_bad(found: Sequence[Any]) -> int:
        return sum(int((~found[position].isfinite()).sum()) for position in gradients.compared)

    count = num_bad(results)
    if count:
        alone = {key: num_bad(gradients.of({key})) for key in gradients.keys}
        culprit = max(alone, key=alone.__getitem__, default=None)
        finding = f"gradients must be finite where the exact ones are, got {count} numbers that are inf or nan"
        share = f"{alone[culprit]} of them" if culprit is not None and alone[culprit] else ""
        raise _error(finding, share, culprit if share else None, gradients, rows)


def _norm(values: Sequence[Any], positions: Collection[int]) -> float:
    return sum(float(values[position].double().square().sum()) for position in positions) ** 0.5


def _error(
    finding: str, share: str, culprit: str | None, gradients: Gradients, rows: Mapping[str, SavedTensor]
) -> GradientError:
    """What was found, the tensor that it comes from, and the remedy."""
    if culprit is None:
        return GradientError(
            f"{finding}, which no tensor adds alone: raise bits, or keep modules exact by skip; please report it with "
            "the model"
        )
    row = rows.get(culprit)
    module = "" if row is None else row.module
    source = f", {row.source}" if row is not None and row.source else ""
    return GradientError(
        f"{finding}, {share} from tensor {culprit!r} in {gradients.bits(culprit)} bits (module {module!r}{source}): "
        f"skip=({module!r},) keeps it exact, overrides={{{module!r}: 8}} gives it more bits; please report it with the "
        "model"
    )


class _Noise:
    """What rounding did to the gradients that count, beside what it may do."""

    def __init__(self, gradients: Gradients, rows: Mapping[str, SavedTensor]) -> None:
        self._gradients = gradients
        self._rows = rows
        norm = _norm(gradients.exact, gradients.counted)
        self._square = norm**2
        along = {position: gradients.exact[position] / norm for position in gradients.counted}
        self._spread = gradients.spread_along(along)

    def check(self, results: Sequence[Any]) -> None:
        """Raises where that is more, in the mean of several draws."""
        gradients = self._gradients
        seen = _Seen([results], [gradients.predicted(0)])
        if self._complaint(seen, _FEW_TIMES) is None:
            return
        draws = [results, *(gradients.rounded(draw) for draw in range(1, _DRAWS))]
        seen = _Seen(draws, [gradients.predicted(seed) for seed in range(1, _DRAWS + 1)])
        complaint = self._complaint(seen, _TIMES)
        if complaint is not None:
            raise complaint

    def _complaint(self, seen: "_Seen", times: float) -> GradientError | None:
        gradients, square = self._gradients, self._square
        noise = statistics.fmean(map(self._noise, seen.draws)) / square
        guess = sum(seen.predicted(key) for key in gradients.keys) / square
        limit = _SHARE * self._scale()
        if not noise <= times * max(1.0, self._scale() ** 2) * guess + self._digits**2:
            found = {key: self._noise(gradients.of({key})) for key in gradients.keys}
            culprit = max(found, key=lambda key: found[key] - seen.predicted(key))
            alone, expected = (f"{(value / square) ** 0.5:.3g}" for value in (found[culprit], seen.predicted(culprit)))
            finding = f"a relative error of {noise**0.5:.3g} where {guess**0.5:.3g} is predicted"
            return self._error(finding, f"{alone} (predicted {expected})", culprit)
        if not noise <= limit**2:
            found = {key: self._noise(gradients.of({key})) for key in gradients.keys}
            culprit = max(found, key=found.__getitem__)
            finding = f"a relative error of {noise**0.5:.3g} where so many bits should leave {limit:.3g} at most"
            return self._error(finding, f"{(found[culprit] / square) ** 0.5:.3g}", culprit)
        return self._biased(seen)

    def _biased(self, seen: "_Seen") -> GradientError | None:
        if self._spread is None:
            return None
        gradients, count = self._gradients, len(seen.draws)
        bias = statistics.fmean(map(self._along, seen.draws))
        deviation = (sum(self._spread.values()) / self._square / count) ** 0.5
        limit = _SIGMAS * deviation + _CURVATURE * self._scale() ** 2 + self._digits
        if abs(bias) <= limit:
            return None
        found = {key: self._along(gradients.of({key})) for key in gradients.keys}
        culprit = max(found, key=lambda key: abs(found[key]))
        finding = f"a component along the exact one that is {bias:+.2%} off, where {limit:.2%} may be due to chance"
        return self._error(finding, f"{found[culprit]:+.2%}", culprit)

    def _noise(self, results: Sequence[Any]) -> float:
        restored, counted = self._gradients.restored, self._gradients.counted
        return sum(float((results[p].double() - restored[p].double()).square().sum()) for p in counted)

    def _along(self, results: Sequence[Any]) -> float:
        """How much longer than the exact gradient is the part of ``results`` along it, as a share."""
        restored, exact = self._gradients.restored, self._gradients.exact
        products = (
            float(((results[p].double() - restored[p].double()) * exact[p].double()).sum())
            for p in self._gradients.counted
        )
        return sum(products) / self._square

    def _scale(self) -> float:
        """How many times larger than at 4 bits the steps between two levels are, in the mean of all codes' bits."""
        return 15 / (2**self._gradients.mean_bits - 1)

    @property
    def _digits(self) -> float:
        exact = self._gradients.exact
        return max(torch.finfo(exact[position].dtype).eps for position in self._gradients.counted) ** 0.5

    def _error(self, finding: str, share: str, culprit: str) -> GradientError:
        rule = "gradients must be as far from the exact ones as rounding explains"
        return _error(f"{rule}, got {finding}", share, culprit, self._gradients, self._rows)


@dataclass(frozen=True)
class _Seen:
    """Results with rounding noise, and what was predicted of it, by row key."""

    draws: Sequence[Sequence[Any]]
    guesses: Sequence[Mapping[str, float]]

    def predicted(self, key: str) -> float:
        """Of one tensor, the mean of all predictions."""
        return statistics.fmean(guess[key] for guess in self.guesses)
