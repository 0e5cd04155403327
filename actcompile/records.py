"""What is remembered about the graphs of this process, for reports."""

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from . import steps
from ._config_checks import parse_nbytes
from ._torch import current_frame, is_fake
from .checking import Check
from .config import Config
from .memory import CompiledStep, SymbolicTimeline, Timeline, step_timeline
from .passes.crossing import Crossing
from .plan import Plan, Profile, Role, SavedTensor
from .planner import counted_nbytes, stored_nbytes
from .sensitivity import Probe

_records: list["GraphRecord"] = []
# Graphs that were compiled without a backward since ``clear``.
num_without_backward = 0


class GraphRecord:
    """One compiled training graph: what it computes, its rows, its plan and the parameters it was called with."""

    def __init__(
        self,
        config: Config,
        roles: Sequence[Role],
        sites: tuple[str, ...] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        # That of the code whose peak is predicted; explain interprets graphs that training will compile.
        self.lowering = config.lowering
        self.step: CompiledStep | None = None
        self._trace_again: Callable[[], GraphRecord] | None = None
        self._settings = dict(settings or {})
        self.rows: list[SavedTensor] = []
        self.plan = Plan()
        self.count_baseline: Callable[[], Mapping[Crossing | None, int]] = dict
        self.timeline: Timeline | None = None
        self.probe: Probe | None = None
        self.check: Check | None = None
        self.sites = sites
        self.solved: Plan | None = None
        self.inherited: Profile | None = None
        self._frame = current_frame()
        self.roles = roles
        # Of each tensor among the inputs, its role and whether it needs a gradient; sizes come and go.
        self.need_gradients: tuple[tuple[Role, bool], ...] = ()
        # Rows whose tensors cross to or from other graphs of the same call.
        self.crossings: dict[str, Crossing] = {}
        self._parameters: list[weakref.ref[torch.Tensor]] | None = None
        self._are_fake = False
        # How often each graph was called in the latest complete step that called this one.
        self.companions: steps.Companions = {}
        self.are_patterns_checked = False

    @property
    def num_calls(self) -> int:
        """How often a step calls the graph."""
        return self.companions.get(self, 1)

    @property
    def own_profile(self) -> Profile | None:
        """What the last probe found, once there was one: noise that is handed to earlier graphs of a step counts for
        what it becomes there.
        """
        found = None if self.probe is None else self.probe.profile
        if found is None or not found.handed_square:
            return found
        return found.seen_from(sum(graph.num_calls * graph.own_square() for graph in self._earlier()))

    def own_square(self) -> float:
        """|g|^2 over the graph's parameters, 0 where it was not probed."""
        found = None if self.probe is None else self.probe.profile
        return 0.0 if found is None else found.own_square

    def _earlier(self) -> "Iterator[GraphRecord]":
        """The graphs that a step calls before this one, which were compiled before it."""
        known = self.companions or of_settings(self.config)
        return itertools.takewhile(lambda graph: graph is not self, (graph for graph in _records if graph in known))

    @property
    def profile(self) -> Profile | None:
        """The same or, without it, what was found for the same code at other sizes."""
        return self.inherited if self.own_profile is None else self.own_profile

    @property
    def baseline_nbytes(self) -> int:
        """Bytes that torch.compile saves for the same graph."""
        return sum(self.count_baseline().values())

    def budget_nbytes(self) -> float | None:
        """Bytes that the settings allow to be saved, if they limit them."""
        memory = self.config.memory
        if isinstance(memory, str):
            return parse_nbytes(memory)
        return memory * self.baseline_nbytes if isinstance(memory, float) else memory

    def finish(self, rows: Sequence[SavedTensor], plan: Plan, pair: Any) -> None:
        """Fills in what the partitioner found."""
        self.rows = list(rows)
        self.plan = plan if plan.graphs else replace(plan, graphs=(self.sites,))
        self.timeline = step_timeline(pair.forward.graph, pair.backward.graph)
        self.step = CompiledStep(pair, self._settings)
        if self.check is not None:
            self.check.see_rows(self.rows)
        if self.probe is not None:
            stored = sum(stored_nbytes(row, plan[row.key]) for row in rows if row.role is Role.ACTIVATION)
            self.probe.see(pair, self.timeline.peak_nbytes - stored)

    def restore(
        self,
        rows: Sequence[SavedTensor],
        plan: Plan,
        timeline: Timeline | None,
        crossings: Mapping[str, Crossing],
        trace_again: "Callable[[], GraphRecord]",
    ) -> None:
        """Fills in what the partitioner found when the code was compiled that a cache holds.

        ``trace_again`` gives a record of a partition of now, for what is only found from graphs.
        """
        if not self.rows:
            # An interpreted graph of before has the same.
            self.count_baseline = lambda: trace_again().count_baseline()
        self.rows, self.plan, self.timeline = list(rows), plan, timeline
        self.crossings = dict(crossings)
        self.step, self._trace_again = None, trace_again

    def measure(self, rows: Sequence[SavedTensor], plan: Plan) -> None:
        """Fills in what a forward that is not planned ahead stored."""
        self.rows, self.plan = list(rows), plan

    def predicted_timeline(self) -> Timeline | None:
        """What is alive in a step of the traced sizes: of the compiled code, unless the graph is interpreted.

        None where nothing was planned ahead.
        """
        if self.timeline is None:
            return None
        return self.symbolic_timeline().at() if self.lowering == "inductor" else self.timeline

    def symbolic_timeline(self) -> SymbolicTimeline:
        """The same of the compiled code, in the symbolic sizes of the graph."""
        if self.step is None and self._trace_again is not None:
            self.step = self._trace_again().step
        assert self.step is not None
        return self.step.timeline

    def see_parameters(self, args: Sequence[Any]) -> None:
        """Remembers, at the first call, whose parameters the graph works on."""
        # Where DDP cuts a model into parts, Dynamo calls each with fake tensors first.
        are_fake = any(is_fake(value) for value in args)
        if self._parameters is None or (self._are_fake and not are_fake):
            pairs = zip(self.roles, args, strict=False)
            self._parameters = [weakref.ref(value) for role, value in pairs if role is Role.PARAMETER]
            self._are_fake = are_fake

    def is_same_code(self, other: "GraphRecord") -> bool:
        """Whether both are of the same code, perhaps compiled for other sizes."""
        return self is other or (self._frame is not None and self._frame == other._frame)

    def replaces(self, earlier: "GraphRecord") -> bool:
        """Whether ``earlier`` is the same code of the same model, compiled for other sizes."""
        if self._frame is None or self._frame != earlier._frame or self._parameters is None:
            return False
        # Python keeps one reference per tensor; what they refer to may be gone.
        return list(map(id, self._parameters)) == list(map(id, earlier._parameters or ()))

    def summary(self) -> str:
        """One line for the log."""
        return f"{self.stored_summary()}, {self.baseline_nbytes / 2**20:.1f} MiB with torch.compile"

    def stored_summary(self) -> str:
        """Its first half, which takes no partition to find out."""
        counted = [row for row in self.rows if row.role in (Role.ACTIVATION, Role.BOUNDARY)]
        return f"{len(counted)} saved tensors, {counted_nbytes(self.rows, self.plan) / 2**20:.1f} MiB stored"


def add(config: Config, roles: Sequence[Role], sites: tuple[str, ...], settings: Mapping[str, Any]) -> GraphRecord:
    """A new record, kept until ``clear``; ``settings`` are Inductor's."""
    record = GraphRecord(config, roles, sites, settings)
    _records.append(record)
    return record


def note_inference() -> None:
    """Remembers that a graph was compiled that needs no gradient."""
    global num_without_backward
    num_without_backward += 1


def of_settings(config: Config) -> list[GraphRecord]:
    """Records of graphs with these settings, oldest first."""
    return [record for record in _records if record.config == config]


def finished() -> list[GraphRecord]:
    """Records of graphs in use whose partition is done, oldest first."""
    used = {call.record for call in steps.latest()}
    return [record for record in _records if record.rows and record in used]


@contextmanager
def collected() -> Iterator[list[GraphRecord]]:
    """Records made inside go into the list that this gives, and are not kept."""
    global _records
    kept, _records = _records, []
    try:
        with steps.isolated():
            yield _records
    finally:
        _records = kept


def clear() -> None:
    """Forgets all records."""
    global num_without_backward
    _records.clear()
    num_without_backward = 0
    steps.clear()
