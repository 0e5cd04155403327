"""What was saved, what is stored instead, and why: as a table, HTML, JSON or a plot."""

import functools
import html
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tabulate import tabulate

from .choices import DEFAULT_BITS
from .decisions import noise_of
from .memory import Timeline, step_peak
from .plan import Action, Decision, Role, SavedTensor
from .planner import host_nbytes, noise_level, predicted_noise, stored_nbytes
from .steps import Call

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = ("module", "op", "shape", "dtype", "saved MiB", "action", "bits", "stored MiB", "kind", "noise", "reason")
MIB = 2**20


@dataclass(frozen=True)
class ReportRow:
    """One saved tensor. ``nbytes`` is its own size, ``stored_nbytes`` what is stored on the device and ``host_nbytes``
    in the host's memory, metadata included.

    ``kept`` says how many elements of a block are stored where the others are pruned, as "51/256", in ``bits`` each, or
    which share of the rows, as "0.5 of rows".
    ``kind`` is "leaf" when an error stays in one gradient and "path" when it travels on. ``sensitivity`` is the
    relative variance that rounding to 4 bits would add to the gradient of its graph, ``predicted_noise`` what its bits
    add; both are None as long as nothing measured them. ``method`` says how that was: "probed" or "perturbed".
    """

    name: str
    op: str
    module: str
    source: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    action: str
    bits: int | None
    stored_nbytes: int
    kind: str
    role: str
    reason: str
    sensitivity: float | None = None
    predicted_noise: float | None = None
    host_nbytes: int = 0
    method: str = ""
    kept: str = ""

    @property
    def counts(self) -> bool:
        """Whether the bytes are there for the backward alone: neither a parameter nor an input of the caller's."""
        return self.role in (Role.ACTIVATION, Role.BOUNDARY)


@dataclass(frozen=True)
class Report:
    """The saved tensors of a step: one row for each that a call of a graph saved.

    ``baseline_nbytes`` is what ``torch.compile`` saves for the same graphs. Totals leave out parameters and the
    caller's inputs on both sides. ``notes`` says what is missing, and why: code that Dynamo did not trace stores what
    it stores without compilation, and is in none of these bytes; settings that have no effect.
    """

    rows: tuple[ReportRow, ...]
    baseline_nbytes: int
    timelines: tuple[Timeline, ...] = ()
    predicted_noise: float | None = None
    notes: tuple[str, ...] = ()
    _predictions: tuple[Callable[[], Timeline | None], ...] = field(default=(), repr=False, compare=False)

    @property
    def saved_nbytes(self) -> int:
        """Bytes of the device's memory that the forward passes to the backward."""
        return sum(row.stored_nbytes for row in self.rows if row.counts)

    @property
    def host_nbytes(self) -> int:
        """Bytes that wait for the backward in the host's memory."""
        return sum(row.host_nbytes for row in self.rows if row.counts)

    @property
    def ratio(self) -> float:
        """How many times fewer bytes are stored on the device than torch.compile saves."""
        if not self.saved_nbytes:
            return math.inf if self.host_nbytes else 1.0
        return self.baseline_nbytes / self.saved_nbytes

    @property
    def predicted_peak_nbytes(self) -> int | None:
        """The most bytes alive at once in a step that starts without gradients; those that it makes are counted.

        Parameters, inputs of the caller's and optimizer state are left out. Graphs that Inductor compiles are lowered
        and scheduled for this, when it is asked for: their kernels are fused, and no C++ is compiled. None with
        ``pruning="samples"``, which stores as much as the values of a step say.
        """
        found = [predict() for predict in self._predictions] or self.timelines
        known = [timeline for timeline in found if timeline is not None]
        return step_peak(known) if len(known) == len(found) else None

    def __str__(self) -> str:
        if not self.rows:
            return "\n".join(self.notes) or "No training graph has been compiled yet: run a step first."
        return "\n".join([tabulate(self._cells(), _COLUMNS, disable_numparse=True), self._total(), *self.notes])

    def _repr_html_(self) -> str:
        if not self.rows:
            return "".join(f"<p>{html.escape(line)}</p>" for line in str(self).splitlines())
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in (self._total(), *self.notes))
        return f"{tabulate(self._cells(), _COLUMNS, tablefmt='html', disable_numparse=True)}{lines}"

    def to_json(self) -> str:
        """All rows and totals as a JSON document."""
        rows = [asdict(row) | {"dtype": str(row.dtype).removeprefix("torch.")} for row in self.rows]
        names = ("saved_nbytes", "host_nbytes", "baseline_nbytes", "ratio", "predicted_noise", "predicted_peak_nbytes")
        totals = {name: getattr(self, name) for name in names}
        if math.isinf(self.ratio):
            # JSON has no infinity.
            totals["ratio"] = None
        return json.dumps({**totals, "notes": self.notes, "rows": rows}, indent=1)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draws bytes, of all tensors and of each, and the memory timeline of a step; writes it to ``path`` if given.

        Raises:
            ImportError: When matplotlib is missing.
        """
        from ._plot import plot_report

        return plot_report(self, path)

    def _total(self) -> str:
        stored = f"stored {self.saved_nbytes / MIB:.2f} MiB"
        if self.host_nbytes:
            stored += f" and in the host's memory {self.host_nbytes / MIB:.2f} MiB"
        noise = "" if self.predicted_noise is None else f"; predicted noise {self.predicted_noise:.1e} of the gradient"
        return f"{stored}, torch.compile saves {self.baseline_nbytes / MIB:.2f} MiB: {self.ratio:.1f}x less{noise}"

    def _cells(self) -> list[list[str]]:
        return [_cell_row(rows) for rows in fold_layers([row for row in self.rows if row.counts])]


def fold_layers(rows: Sequence[ReportRow]) -> list[list[ReportRow]]:
    """Groups rows that differ in the number of their layer alone, in the order of their first."""
    groups: dict[tuple[object, ...], list[ReportRow]] = {}
    for row in rows:
        pattern = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", row.module)
        ordinal = sum(1 for other in groups.get(_fold_key(row, pattern, 0), ()) if other.module == row.module)
        position = ordinal
        key = _fold_key(row, pattern, position)
        while any(other.module == row.module for other in groups.get(key, ())):
            position += 1
            key = _fold_key(row, pattern, position)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _fold_key(row: ReportRow, pattern: str, position: int) -> tuple[object, ...]:
    name = pattern, row.op, row.shape, row.dtype, row.kind, row.role
    return *name, row.action, row.bits, row.kept, bool(row.host_nbytes), row.reason, position


def _cell_row(rows: Sequence[ReportRow]) -> list[str]:
    first, count, noises = rows[0], len(rows), [row.predicted_noise for row in rows]
    return [
        folded_name([row.module for row in rows]) + (f" (x{count})" if count > 1 else ""),
        first.op,
        "x".join(map(str, first.shape)) or "scalar",
        str(first.dtype).removeprefix("torch."),
        f"{sum(row.nbytes for row in rows) / MIB:.3f}",
        " ".join(filter(None, (first.action, first.kept))) + (", offload" if first.host_nbytes else ""),
        str(first.bits or ""),
        f"{sum(row.stored_nbytes for row in rows) / MIB:.3f}",
        first.kind,
        "" if None in noises else f"{sum(filter(None, noises)):.1e}",
        first.reason,
    ]


def folded_name(modules: Sequence[str]) -> str:
    """ "blocks.0.fc", ..., "blocks.3.fc" -> "blocks.0-3.fc"; what runs with gaps is listed by first and last."""
    columns = zip(*(module.split(".") for module in modules), strict=True)
    return ".".join(
        column[0] if len(set(column)) == 1 else f"{min(column, key=int)}-{max(column, key=int)}" for column in columns
    )


def make_report(calls: Sequence[Call], notes: Sequence[str] = ()) -> Report:
    """The report on what ``calls`` stored, with ``notes`` on what is missing."""
    known = _Once()
    square = _gradient_square(calls)
    rows = [_report_row(call, row, square, known.has_stored(call, row)) for call in calls for row in call.rows]
    timelines = tuple(call.record.timeline for call in calls if call.record.timeline is not None)
    predictions = {call.record: functools.cache(call.record.predicted_timeline) for call in calls}
    return Report(
        tuple(rows),
        sum(map(known.baseline_nbytes, calls)),
        timelines,
        _total_noise(calls),
        tuple(notes),
        _predictions=tuple(predictions[call.record] for call in calls),
    )


class _Once:
    """Counts once what crosses between graphs of one call as it is, whichever of them store it."""

    def __init__(self) -> None:
        self._stored: set[object] = set()
        self._baseline: set[object] = set()

    def has_stored(self, call: Call, row: SavedTensor) -> bool:
        """Whether a graph before stores the tensor of ``row`` as it is, and so does ``call``."""
        memory = call.crossing_memory.get(call.record.crossings.get(row.key, ("", 0)))
        decision = call.plan[row.key]
        if memory is None or decision.action is not Action.KEEP or decision.offload:
            return False
        is_known = memory in self._stored
        self._stored.add(memory)
        return is_known

    def baseline_nbytes(self, call: Call) -> int:
        """Bytes that torch.compile saves for ``call`` and for no graph before."""
        total = 0
        for place, nbytes in call.record.count_baseline().items():
            memory = None if place is None else call.crossing_memory.get(place)
            total += nbytes if memory not in self._baseline else 0
            if memory is not None:
                self._baseline.add(memory)
        return total


def _gradient_square(calls: Sequence[Call]) -> float:
    """|g|^2 over the parameters of all graphs that were probed."""
    return sum(call.record.profile.gradient_square for call in calls if call.record.profile is not None)


def _report_row(call: Call, row: SavedTensor, square: float, is_stored_before: bool = False) -> ReportRow:
    decision, profile = call.plan[row.key], call.record.profile
    known = None if profile is None else profile.sensitivities.get(row.key)
    noises: tuple[float | None, float | None] = (None, None)
    if profile is not None and known is not None and square:
        level = noise_level(call.plan, profile)
        noises = known.variance[DEFAULT_BITS] / square, noise_of(row, decision, profile, level) / square
    return ReportRow(
        name=row.name,
        op=row.op,
        module=row.module,
        source=row.source,
        shape=row.shape,
        dtype=row.dtype,
        nbytes=row.nbytes,
        action=str(decision.action),
        bits=decision.bits,
        stored_nbytes=0 if is_stored_before else stored_nbytes(row, decision),
        kind=row.kind,
        role=str(row.role),
        reason="an earlier graph of the same call stores it" if is_stored_before else decision.reason,
        sensitivity=noises[0],
        predicted_noise=noises[1],
        host_nbytes=host_nbytes(row, decision),
        method="" if known is None else known.method,
        kept=_kept(decision),
    )


def _kept(decision: Decision) -> str:
    if decision.action is Action.SPARSIFY:
        return f"{decision.keep}/{decision.block}"
    return f"{decision.rows:g} of rows" if decision.action is Action.SAMPLE else ""


def _total_noise(calls: Sequence[Call]) -> float | None:
    """The relative variance that all plans add to the gradient; None unless every graph was probed."""
    known = [(call, call.record.profile) for call in calls if call.record.profile is not None]
    square = _gradient_square(calls)
    if len(known) < len(calls) or not square:
        return None
    return sum(predicted_noise(call.rows, call.plan, profile) for call, profile in known) / square
