"""What AOTAutograd's cache keeps of a graph beside its code: a second process loads both, and partitions nothing.

    cold    the partitioner hangs what it found on the backward, which AOTAutograd pickles into the entry of the graph
    warm    whoever reads the entry is handed what was found; what takes a graph (torch.compile's bytes, the compiled
            code's timeline) is found by tracing again, once somebody asks

So there is no file of ours to lose, to clear or to lock: where torch keeps the code, locally, remotely or in an archive
of torch.compiler.save_cache_artifacts, it keeps this.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ._torch import Interpret, compile_pair, copied, interpret_plainly, reentrant_tracing
from .memory import Timeline
from .passes._fx import hint
from .passes._naming import module_path, source_line
from .passes.crossing import Crossing
from .passes.lower import Bodies
from .plan import Plan, SavedTensor
from .records import GraphRecord

if TYPE_CHECKING:
    from .backend import Partitioner

log = logging.getLogger(__name__)

_received: "list[Found] | None" = None


@dataclass(frozen=True)
class Names:
    """What rows are called after, by node of Dynamo's graph: its module, and the line of the user's code."""

    modules: tuple[str, ...]
    lines: tuple[str, ...]

    @classmethod
    def of(cls, graph: fx.Graph) -> "Names":
        """Those of ``graph``."""
        return cls(tuple(map(module_path, graph.nodes)), tuple(map(source_line, graph.nodes)))

    def key(self) -> tuple[object, ...]:
        """Equal where rows get equal names, but for the numbers of lines: what is above a model may change."""
        first: dict[str, int] = {}
        return self.modules, [first.setdefault(line, position) for position, line in enumerate(self.lines)]


@dataclass(frozen=True)
class Found:
    """What the partitioner found out about a graph.

    ``bodies`` are those that its code calls, and ``lines`` those of ``Names``.
    """

    rows: tuple[SavedTensor, ...]
    plan: Plan
    timeline: Timeline | None
    crossings: Mapping[str, Crossing]
    bodies: Bodies
    lines: tuple[str, ...]

    @classmethod
    def by(cls, record: GraphRecord, bodies: Bodies, names: Names) -> "Found":
        """What ``record`` was filled in with."""
        return cls(tuple(record.rows), record.plan, record.timeline, record.crossings, bodies, names.lines)

    def rows_of(self, names: Names) -> list[SavedTensor]:
        """The rows of a graph whose names have an equal key."""
        lines = dict(zip(self.lines, names.lines, strict=True))
        return [replace(row, source=lines.get(row.source, row.source)) for row in self.rows]


@dataclass(frozen=True)
class Traced:
    """A graph of Dynamo's that can be compiled more than once, with fake inputs and Inductor's settings."""

    graph: fx.GraphModule
    inputs: Sequence[Any]
    settings: dict[str, Any]

    @functools.cached_property
    def names(self) -> Names:
        """What its rows are called after."""
        return Names.of(self.graph.graph)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Symbolic sizes at the traced call, by which plans are made."""
        shapes = (value.shape if isinstance(value, torch.Tensor) else (value,) for value in self.inputs)
        return tuple(hint(size) for shape in shapes for size in shape if isinstance(size, torch.SymInt))

    @property
    def has_backward(self) -> bool:
        """Whether autograd hands on a gradient of anything that it returns."""
        outputs = (node.meta.get("example_value") for node in self.graph.graph.output_node().all_input_nodes)
        return any(isinstance(value, torch.Tensor) and value.requires_grad for value in outputs)

    def compile(self, partitioner: "Partitioner", interpret: Interpret | None) -> Callable[..., Any]:
        """Compiles it, or interprets it; see ``compile_pair``."""
        return compile_pair(
            copied(self.graph), self.inputs, partitioner=partitioner, interpret=interpret, settings=self.settings
        )


def load_or_compile(traced: Traced, partitioner: "Partitioner", interpret: Interpret | None) -> Callable[..., Any]:
    """Compiles ``traced``, or takes its code from torch's caches; either way the partitioner's record is filled in."""
    with _handed_over() as received:
        compiled = traced.compile(partitioner, interpret)
    if partitioner.kept.found is not None or not traced.has_backward:
        return compiled
    reenter, record = reentrant_tracing(), partitioner.record

    @functools.cache
    def trace_again() -> GraphRecord:
        again = GraphRecord(record.config, record.roles, record.sites, traced.settings)
        with reenter():
            traced.compile(partitioner.for_record(again), interpret_plainly)
        return again

    if received:
        # Of several entries under one key, whose guards differ, the last that was read was taken.
        found = received[-1]
        found.bodies.start_compiling()
        record.restore(found.rows_of(traced.names), found.plan, found.timeline, found.crossings, trace_again)
    else:
        # A release of torch that does not keep what hangs on a backward; the key still says what is found now.
        again = trace_again()
        record.restore(again.rows, again.plan, again.timeline, again.crossings, trace_again)
    log.info("%s, loaded from torch's cache", record.stored_summary())
    return compiled


class Kept:
    """What hangs on a backward graph, and is handed over when the cache's entry is read."""

    def __init__(self) -> None:
        self.found: Found | None = None

    def hang_on(self, backward: fx.GraphModule, found: Found) -> None:
        """Lets whoever pickles ``backward`` pickle ``found``; of several graphs, all carry what was found last."""
        self.found = found
        backward.actcompile_kept = self  # type: ignore[assignment]

    def __deepcopy__(self, memo: object) -> "Kept":
        return self

    def __reduce__(self) -> tuple[object, tuple[object]]:
        return _hand_over, (self.found,)


def _hand_over(found: Found | None) -> Kept:
    if _received is not None and found is not None:
        _received.append(found)
    kept = Kept()
    kept.found = found
    return kept


@contextmanager
def _handed_over() -> Iterator[Sequence[Found]]:
    """What the entries hold that are read inside, in a list that grows."""
    global _received
    outer, _received = _received, []
    try:
        yield _received
    finally:
        _received = outer
