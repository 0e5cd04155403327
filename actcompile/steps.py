"""Which graphs the steps of training call, how often, and with whose parameters.

A call is one training forward of a graph. What it stores is held until its backward ran; a step is the calls between
two moments at which nothing is held. Blocks of one class share a graph: it is called once for each of them in a step.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ._patterns import unmatched, warn
from ._torch import Held, held_by, is_fake, memory_of
from .plan import Role

if TYPE_CHECKING:
    from .records import GraphRecord

# Calls that no later one took the place of, oldest first.
_calls: list["Call"] = []
_step = 0


class Call:
    """One training forward of the graph of ``record``, in the step of this number, and what it stored by ``plan``."""

    def __init__(self, record: "GraphRecord", args: Sequence[Any], outputs: Any, step: int) -> None:
        self.record = record
        # The plan may change from call to call, and what is measured does.
        self.rows, self.plan = record.rows, record.plan
        self.step = step
        self.is_fake = any(is_fake(value) for value in args)
        parameters = [value for role, value in zip(record.roles, args, strict=False) if role is Role.PARAMETER]
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        self._ids = frozenset(map(id, parameters))
        self._held: Held | None = held_by(outputs)
        # The memory of what may cross to or from other graphs.
        roles = zip(record.roles, args, strict=False)
        inputs = {("in", i): value for i, (role, value) in enumerate(roles) if role is Role.BOUNDARY}
        results = {("out", i): value for i, value in enumerate(outputs if isinstance(outputs, tuple | list) else ())}
        self.crossing_memory = {
            place: memory_of(value)
            for place, value in (inputs | results).items()
            if isinstance(value, torch.Tensor) and not is_fake(value)
        }

    @property
    def has_parameters(self) -> bool:
        """Whether the graph has any, and is no loss or other function alone."""
        return bool(self._parameters)

    def is_pending(self) -> bool:
        """Whether what was stored is still there: the backward has not run, and may."""
        if self._held is not None and not self._held():
            self._held = None
        return self._held is not None

    def belongs_to(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether one of ``parameters`` was an argument."""
        known = {id(parameter) for parameter in parameters}
        return any(id(parameter) in known for parameter in self.parameters())

    def parameters(self) -> list[torch.Tensor]:
        """The parameters that were arguments and are still there."""
        known = (reference() for reference in self._parameters)
        return [parameter for parameter in known if parameter is not None]

    def takes_place_of(self, earlier: "Call") -> bool:
        """Whether ``earlier`` is over and was of the same part of the model, perhaps of other code or other sizes."""
        if earlier.is_pending():
            return False
        if self._ids or earlier._ids:
            # Dead parameters' ids may be those of new ones: then the earlier model is gone.
            return not self._ids.isdisjoint(earlier._ids)
        return self.record.is_same_code(earlier.record)


def begin() -> None:
    """Called ahead of each training forward: where nothing is held, the step before is complete."""
    global _step
    if any(call.is_pending() for call in _calls):
        return
    finished = Counter(call.record for call in _calls if call.step == _step)
    for record in finished:
        record.companions = finished
        _check_patterns(record)
    _step += 1


def _check_patterns(record: "GraphRecord") -> None:
    """Warns of patterns that match no module of any graph with the settings of ``record``, once all are there."""
    if not record.are_patterns_checked:
        warn(unmatched(record.config, (call.record.sites for call in _calls if call.record.config == record.config)))
        record.are_patterns_checked = True


def note(record: "GraphRecord", args: Sequence[Any], outputs: Any) -> None:
    """Called after each training forward of ``record`` with its arguments and results."""
    global _calls
    call = Call(record, args, outputs, _step)
    # Where DDP cuts a model into parts, Dynamo calls each with fake tensors first.
    _calls = [
        other
        for other in _calls
        if not call.takes_place_of(other) and (call.is_fake or not other.is_fake or other.record is not record)
    ]
    _calls.append(call)


def latest(parameters: Iterable[torch.Tensor] | None = None) -> list[Call]:
    """The calls of the latest step in which one of ``parameters`` took part, those of its model; without them the
    latest calls of all models. Graphs without parameters belong to a model that had the step for itself.
    """
    if parameters is None:
        return list(_calls)
    known = list(parameters)
    own = [call for call in _calls if call.belongs_to(known)]
    last = max((call.step for call in own), default=-1)
    step = [call for call in _calls if call.step == last]
    is_alone = all(call in own for call in step if call.has_parameters)
    return [call for call in step if call in own or (is_alone and not call.has_parameters)]


@contextmanager
def isolated() -> Iterator[None]:
    """Calls made inside are kept apart from all others, and forgotten at the end."""
    global _calls
    kept, _calls = _calls, []
    try:
        yield
    finally:
        _calls = kept


def clear() -> None:
    """Forgets all calls."""
    _calls.clear()


Companions = Mapping["GraphRecord", int]
