"""Steps of one model with compressed activations beside plain torch, and what each stores."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

import actcompile
from actcompile._torch import compile_pair, interpret_plainly
from actcompile.meter import measure_peak
from tests.families.family import Family

PRECISIONS = ("fp32", "bf16", "autocast")
BITS = (8, 4)
STEPS = 3
DRAWS = 4
SEED = 0

# Share of the weights' norm that a step of SGD moves them by.
_STEP = 0.01

Call = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model at one width of codes.

    Args:
        cosine: Between the first step's gradient and that of plain torch, over all parameters.
        error: |g' - g| / |g| of the same.
        projection: Of the mean gradient of ``DRAWS`` draws on the exact one.
        projection_error: Its standard error.
        finite: Whether the losses of all steps and the weights after them are.
        loss_error: The largest relative difference of a step's loss from plain torch's.
        compile_error: |g' - g| / |g| of torch.compile alone.
        plain_nbytes: Bytes alive after torch.compile's forward that were not before.
        stored_nbytes: The same with compressed activations.
        reported_nbytes: What the report says of them.
    """

    family: str
    precision: str
    bits: int
    cosine: float
    error: float
    projection: float
    projection_error: float
    finite: bool
    loss_error: float
    compile_error: float
    plain_nbytes: int
    stored_nbytes: int
    reported_nbytes: int
    seconds: float

    @property
    def ratio(self) -> float:
        """How many times less is stored."""
        return self.plain_nbytes / max(1, self.stored_nbytes)


def interpreted(graph: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
    """A backend: what Inductor makes of a graph, with its partition into forward and backward, interpreted."""
    return compile_pair(graph, inputs, partitioner=None, interpret=interpret_plainly, settings={})


class Subject:
    """A model with its batch, whose weights and buffers go back to what they were before every run."""

    def __init__(self, family: Family, precision: str) -> None:
        torch.manual_seed(SEED)
        self.model, batch = family.build()
        if precision == "bf16":
            self.model.bfloat16()
            batch = tuple(value.bfloat16() if value.is_floating_point() else value for value in batch)
        self._batch = batch
        self._autocasts = precision == "autocast"
        self._start = [value.detach().clone() for value in self._state()]

    def gradient(self, call: Call) -> Tensor:
        """Of all parameters, in double precision."""
        self._restore()
        self.loss(call).backward()
        return _flat(self.model)

    def losses(self, call: Call, rate: float) -> list[float]:
        """Of the steps of SGD; the last is nan when a weight is no number after them."""
        self._restore()
        found = []
        for _ in range(STEPS):
            self.model.zero_grad()
            loss = self.loss(call)
            loss.backward()
            found.append(loss.item())
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(rate * parameter.grad)
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            found[-1] = float("nan")
        return found

    def stored_nbytes(self, call: Call) -> int:
        """Bytes that were not there before the forward and are after it."""
        self._restore()
        return measure_peak(lambda: self.loss(call), "cpu").end_nbytes

    def loss(self, call: Call) -> Tensor:
        """Of the batch; what the model draws at random is the same every time."""
        torch.manual_seed(SEED)
        precision: AbstractContextManager[object] = nullcontext()
        if self._autocasts:
            precision = torch.autocast("cpu", torch.bfloat16)
        with precision:
            return call(*self._batch)

    def rate(self, exact: Tensor) -> float:
        """The learning rate at which the first step moves the weights by the same share in every model."""
        norm = sum(float(p.detach().double().square().sum()) for p in self.model.parameters() if p.grad is not None)
        return _STEP * norm**0.5 / max(float(exact.norm()), 1e-30)

    def _state(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()

    def _restore(self) -> None:
        self.model.zero_grad()
        with torch.no_grad():
            for value, start in zip(self._state(), self._start, strict=True):
                value.copy_(start)


def measure(family: Family, precision: str = "fp32", bits: tuple[int, ...] = BITS) -> list[Row]:
    """One row for each of ``bits``."""
    subject = Subject(family, precision)
    exact = subject.gradient(subject.model)
    assert exact.isfinite().all(), f"the gradient of {family.name} in plain torch must be finite"
    rate = subject.rate(exact)
    losses = subject.losses(subject.model, rate)
    with _fresh():
        call = torch.compile(subject.model, backend=interpreted)
        compile_error = _error(subject.gradient(call), exact)
        plain = subject.stored_nbytes(call)
    return [_measure_bits(family, precision, subject, exact, rate, losses, compile_error, plain, n) for n in bits]


def _measure_bits(
    family: Family,
    precision: str,
    subject: Subject,
    exact: Tensor,
    rate: float,
    losses: list[float],
    compile_error: float,
    plain_nbytes: int,
    bits: int,
) -> Row:
    start = time.perf_counter()
    with _fresh():
        call = torch.compile(subject.model, backend="act", options={"bits": bits, "lowering": "eager"})
        draws = [subject.gradient(call) for _ in range(DRAWS)]
        found = subject.losses(call, rate)
        stored = subject.stored_nbytes(call)
        reported = actcompile.report(subject.model).saved_nbytes
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found, losses, strict=True)]
    mean = torch.stack(draws).mean(0)
    projections = torch.stack([draw @ exact for draw in draws]) / (exact @ exact)
    return Row(
        family=family.name,
        precision=precision,
        bits=bits,
        cosine=float(draws[0] @ exact / (draws[0].norm() * exact.norm()).clamp(min=1e-300)),
        error=_error(draws[0], exact),
        projection=float(projections.mean()),
        projection_error=float(projections.std() / DRAWS**0.5),
        finite=bool(torch.tensor(found).isfinite().all() and mean.isfinite().all()),
        loss_error=max(differences),
        compile_error=compile_error,
        plain_nbytes=plain_nbytes,
        stored_nbytes=stored,
        reported_nbytes=reported,
        seconds=time.perf_counter() - start,
    )


def _flat(model: nn.Module) -> Tensor:
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@contextmanager
def _fresh() -> Iterator[None]:
    """Nothing compiled and nothing recorded, before and after; a fixed position of the rounding noise."""
    torch._dynamo.reset()
    actcompile.reset()
    actcompile.set_rng_state({"position": 0})
    yield
    torch._dynamo.reset()
