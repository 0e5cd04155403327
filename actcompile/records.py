"""What is remembered about the graphs of this process, for reports."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ._torch import current_frame
from .config import Config
from .memory import Timeline, step_timeline
from .plan import Plan, Profile, Role, SavedTensor
from .planner import stored_nbytes

_records: list["GraphRecord"] = []


class GraphRecord:
    """One compiled training graph: its rows, its plan and the parameters it was called with."""

    def __init__(self, config: Config, roles: Sequence[Role]) -> None:
        self.config = config
        self.rows: list[SavedTensor] = []
        self.plan = Plan()
        self.baseline_nbytes = 0
        self.timeline: Timeline | None = None
        self.profile: Profile | None = None
        self._frame = current_frame()
        self._roles = roles
        self._parameters: list[weakref.ref[torch.Tensor]] | None = None

    def finish(
        self, rows: Sequence[SavedTensor], plan: Plan, baseline_nbytes: int, pair: Any, profile: Profile | None
    ) -> None:
        """Fills in what the partitioner found."""
        self.profile = profile
        self.rows, self.plan, self.baseline_nbytes = list(rows), plan, baseline_nbytes
        self.timeline = step_timeline(pair.forward.graph, pair.backward.graph)

    def see_parameters(self, args: Sequence[Any]) -> None:
        """Remembers, at the first call, whose parameters the graph works on."""
        if self._parameters is None:
            pairs = zip(self._roles, args, strict=False)
            self._parameters = [weakref.ref(value) for role, value in pairs if role is Role.PARAMETER]

    def belongs_to(self, parameters: Iterable[torch.Tensor]) -> bool:
        """Whether the graph was called with one of ``parameters``."""
        known = {id(parameter) for parameter in parameters}
        return any(id(reference()) in known for reference in self._parameters or ())

    def replaces(self, earlier: "GraphRecord") -> bool:
        """Whether ``earlier`` is the same code of the same model, compiled for other sizes."""
        if self._frame is None or self._frame != earlier._frame or self._parameters is None:
            return False
        return [id(reference()) for reference in self._parameters] == [
            id(reference()) for reference in earlier._parameters or ()
        ]

    def summary(self) -> str:
        """One line for the log."""
        counted = [row for row in self.rows if row.role in (Role.ACTIVATION, Role.BOUNDARY)]
        saved = sum(stored_nbytes(row, self.plan[row.key]) for row in counted)
        return (
            f"{len(counted)} saved tensors, {saved / 2**20:.1f} MiB stored, "
            f"{self.baseline_nbytes / 2**20:.1f} MiB with torch.compile"
        )


def add(config: Config, roles: Sequence[Role]) -> GraphRecord:
    """A new record, kept until ``clear``."""
    record = GraphRecord(config, roles)
    _records.append(record)
    return record


def finished() -> list[GraphRecord]:
    """Records of graphs whose partition is done, oldest first; of code that was compiled again, the latest."""
    done = [record for record in _records if record.rows]
    return [record for i, record in enumerate(done) if not any(later.replaces(record) for later in done[i + 1 :])]


@contextmanager
def collected() -> Iterator[list[GraphRecord]]:
    """Records made inside go into the list that this gives, and are not kept."""
    global _records
    kept, _records = _records, []
    try:
        yield _records
    finally:
        _records = kept


def clear() -> None:
    """Forgets all records."""
    _records.clear()
