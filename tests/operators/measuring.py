"""Gradients of a case at the lossless level, at 8 and at 4 bits beside those of torch.compile and of eager."""

import signal
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import actcompile
from tests.families.measuring import interpreted
from tests.operators.cases import SEED, Case

LEVELS = ("L0", "8", "4")
DRAWS = 5

# Codes of few elements, in the smallest groups: padded to larger ones they would take more than the tensor.
_SETTINGS = {"min_numel": 1, "group_size": 32, "lowering": "eager"}

# What a level's error may be, relative to the gradient: rounding of other operators, and noise of codes.
BOUNDS = {"L0": 1e-4, "8": 0.05, "4": 0.5}
# A gradient that is smaller than this share of the cotangents counts as that large: it is what is left of others.
_SMALL = 1e-3

RIGHT, LARGE, NOT_A_NUMBER, RAISED, LATE, SKIPPED = "right", "large error", "not a number", "raised", "late", "skipped"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case at one level.

    Args:
        status: "right", "large error", "not a number", "raised" or "late"; "skipped" where torch.compile raises.
        error: |g' - g| / |g|, the median over draws.
        codes: Tensors stored in codes.
        note: The exception, or why nothing was compared.
    """

    case: str
    level: str
    status: str
    error: float = 0.0
    codes: int = 0
    note: str = ""


class TimeIsUpError(BaseException):
    """No Exception: compilers would wrap it."""


class Subject:
    """A case as a function that yields a loss, and what its gradient is taken of."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.zeros = [torch.zeros_like(value).requires_grad_() for value in case.data]
        self._eyes = [torch.eye(_width(value)) for value in case.data]
        self._weights: list[Tensor | None] = []
        torch.manual_seed(SEED)
        outputs = self._outputs(case.data, self.zeros, self._eyes, case.others)
        generator = torch.Generator().manual_seed(SEED)
        for output in outputs:
            known = isinstance(output, Tensor) and output.requires_grad
            self._weights.append(torch.randn(_real(output).shape, generator=generator) if known else None)
        if not any(weight is not None for weight in self._weights):
            raise ValueError("no output has a gradient")
        self.size = sum(float(weight.square().sum()) for weight in self._weights if weight is not None) ** 0.5

    def __call__(
        self, data: list[Tensor], zeros: list[Tensor], eyes: list[Tensor], others: list[Tensor], weights: list[Tensor]
    ) -> Tensor:
        """The loss."""
        outputs = self._outputs(data, zeros, eyes, others)
        pairs = zip(outputs, self._weights, strict=True)
        wanted = [output for output, weight in pairs if weight is not None]
        total = torch.zeros(())
        for output, weight in zip(wanted, weights, strict=True):
            total = total + (_real(output) * weight).sum()
        return total

    def gradient(self, call: Callable[..., Tensor]) -> Tensor:
        """Of the zeros and of the module's parameters, in double precision."""
        parameters = [*self.zeros, *(self.case.module.parameters() if self.case.module else ())]
        for parameter in parameters:
            parameter.grad = None
        torch.manual_seed(SEED)
        weights = [weight for weight in self._weights if weight is not None]
        call(list(self.case.data), list(self.zeros), self._eyes, list(self.case.others), weights).backward()
        return torch.cat([_flat_gradient(parameter) for parameter in parameters])

    def _outputs(self, data: Any, zeros: Any, eyes: Any, others: Any) -> list[Any]:
        inputs = [_through(value + zero, eye) for value, zero, eye in zip(data, zeros, eyes, strict=True)]
        return tree_leaves(self.case.operator(inputs, list(others)))


def measure(case: Case, seconds: float) -> list[Outcome]:
    """One outcome per level; a single one where there is nothing to compare."""
    try:
        with _limited(seconds), _fresh():
            subject = Subject(case)
            eager = subject.gradient(subject)
            plain = subject.gradient(torch.compile(subject, backend=interpreted))
    except TimeIsUpError:
        return [Outcome(case=case.name, level="", status=SKIPPED, note="torch.compile takes too long")]
    except Exception as error:  # noqa: BLE001 whatever torch's own cases raise
        return [Outcome(case=case.name, level="", status=SKIPPED, note=_summary(error))]
    note = "" if _error(plain, eager, subject.size) <= BOUNDS["L0"] else "torch.compile differs from eager"
    lossless, few = (_outcome(subject, plain, level, seconds, note) for level in ("L0", "4"))
    # What takes no codes of 4 bits takes none of 8: the same graphs.
    same = few.status == RIGHT and not few.codes
    many = replace(few, level="8") if same else _outcome(subject, plain, "8", seconds, note)
    return [lossless, many, few]


def _outcome(subject: Subject, exact: Tensor, level: str, seconds: float, note: str) -> Outcome:
    name = subject.case.name
    options: dict[str, Any] = {"level": "L0"} if level == "L0" else {"bits": int(level)}
    try:
        with _limited(seconds), _fresh():
            call = torch.compile(subject, backend="act", options={**options, **_SETTINGS})
            draws = [subject.gradient(call) for _ in range(1 if level == "L0" else DRAWS)]
            codes = _num_codes()
    except TimeIsUpError:
        return Outcome(case=name, level=level, status=LATE, note=note)
    except Exception as error:  # noqa: BLE001 the outcome says what was raised
        return Outcome(case=name, level=level, status=RAISED, note=_summary(error))
    found = statistics.median(_error(draw, exact, subject.size) for draw in draws)
    if not all(torch.equal(draw.isfinite(), exact.isfinite()) for draw in draws):
        status = NOT_A_NUMBER
    else:
        status = RIGHT if found <= BOUNDS[level] else LARGE
    return Outcome(case=name, level=level, status=status, error=found, codes=codes, note=note)


def _num_codes() -> int:
    from actcompile import records

    rows = [(record, row) for record in records.finished() for row in record.rows]
    return sum(record.plan[row.key].action.value == "quantize" for record, row in rows)


def _through(value: Tensor, eye: Tensor) -> Tensor:
    """``value`` as the result of a matrix product."""
    return value if value.numel() == 0 else torch.mm(value.reshape(-1, eye.shape[0]), eye).view(value.shape)


def _width(value: Tensor) -> int:
    return value.shape[-1] if value.dim() else 1


def _real(output: Tensor) -> Tensor:
    return torch.view_as_real(output) if output.is_complex() else output


def _flat_gradient(parameter: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.flatten().double()


def _error(found: Tensor, exact: Tensor, size: float) -> float:
    """Relative, over what is finite on both sides."""
    both = found.isfinite() & exact.isfinite()
    return float((found - exact)[both].norm() / max(float(exact[both].norm()), _SMALL * size, 1e-30))


def _summary(error: Exception) -> str:
    """The exception and its first lines, one of which names the cause that a compiler wraps."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])}"[:300]


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeIsUpError inside after ``seconds`` of this process's work, and again where that is swallowed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    actcompile.reset()
    actcompile.set_rng_state({"position": 0})
    yield
    torch._dynamo.reset()
