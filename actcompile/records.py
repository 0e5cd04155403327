"""What is remembered about the graphs of this process, for reports."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ._torch import current_frame
from .config import Config, parse_nbytes
from .memory import Timeline, step_timeline
from .plan import Action, Plan, Profile, Role, SavedTensor
from .planner import ProbedGraph, solve, stored_nbytes
from .sensitivity import Probe

_records: list["GraphRecord"] = []


class GraphRecord:
    """One compiled training graph: its rows, its plan and the parameters it was called with."""

    def __init__(self, config: Config, roles: Sequence[Role]) -> None:
        self.config = config
        self.rows: list[SavedTensor] = []
        self.plan = Plan()
        self.count_baseline: Callable[[], int] = lambda: 0
        self.timeline: Timeline | None = None
        self.probe: Probe | None = None
        self._frame = current_frame()
        self.roles = roles
        self._parameters: list[weakref.ref[torch.Tensor]] | None = None

    @property
    def profile(self) -> Profile | None:
        """What probing found, once it has."""
        return None if self.probe is None else self.probe.profile

    @property
    def recomputed(self) -> frozenset[str]:
        """Keys of the rows that the backward computes again."""
        return frozenset(key for key, decision in self.plan.items() if decision.action is Action.RECOMPUTE)

    @property
    def baseline_nbytes(self) -> int:
        """Bytes that torch.compile saves for the same graph."""
        return self.count_baseline()

    def budget_nbytes(self) -> float | None:
        """Bytes that the settings allow to be saved, if they limit them."""
        memory = self.config.memory
        if isinstance(memory, str):
            return parse_nbytes(memory)
        return memory * self.baseline_nbytes if isinstance(memory, float) else memory

    def finish(self, rows: Sequence[SavedTensor], plan: Plan, pair: Any) -> None:
        """Fills in what the partitioner found."""
        self.rows, self.plan = list(rows), plan
        self.timeline = step_timeline(pair.forward.graph, pair.backward.graph)
        if self.probe is not None and self.probe.profile is None:
            stored = sum(stored_nbytes(row, plan[row.key]) for row in rows if row.role is Role.ACTIVATION)
            self.probe.see(pair, self.timeline.peak_nbytes - stored)

    def see_parameters(self, args: Sequence[Any]) -> None:
        """Remembers, at the first call, whose parameters the graph works on."""
        if self._parameters is None:
            pairs = zip(self.roles, args, strict=False)
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


def solved_plan(record: GraphRecord) -> Plan:
    """The plan of a graph that was probed, solved together with those of the other graphs with the same settings.

    Raises:
        ConfigError: When no plan reaches the target.
    """
    together = [other for other in _records if other.config == record.config and other.profile is not None]
    graphs = [
        ProbedGraph(other.rows, other.profile, other.recomputed) for other in together if other.profile is not None
    ]
    # A share of each graph, or one number of bytes for all of them.
    budgets = [other.budget_nbytes() for other in together]
    budget = sum(filter(None, budgets)) if isinstance(record.config.memory, float) else budgets[0]
    return solve(graphs, record.config, budget)[together.index(record)]


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
