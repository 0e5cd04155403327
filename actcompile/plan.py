"""The data that the parts of the compiler exchange: what is saved, what is stored instead, and why.

Terms, used throughout with these meanings:

    joint graph    forward and backward traced as one graph by AOTAutograd
    primal         an input of the joint graph: parameter, buffer or argument
    tangent        a gradient that enters the backward
    saved tensor   an output of the forward graph that the backward graph reads
    partition      splitting the joint graph, which decides what is saved and what is recomputed
    row            one saved tensor, as analysis describes it
    decision       what is stored in place of a row
    plan           one decision per row
    offload        moving what is stored to the host's memory until the backward needs it
    group          elements that share one scale and one zero point
    block          elements of which a fixed number is kept, where small ones are pruned
    pruning        how many elements are kept of a block, and in how many bits
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .errors import ConfigError

PLAN_FORMAT = "actcompile plan"
PLAN_VERSION = 3
_READABLE_VERSIONS = (1, 2, 3)


class Action(str, Enum):
    """What becomes of a saved tensor."""

    KEEP = "keep"  # stored as it is
    PACK = "pack"  # a bool tensor, one bit per element
    NARROW = "narrow"  # in a narrower type: integers, in the narrowest that holds their range
    QUANTIZE = "quantize"  # codes of a few bits per element, with a scale and a zero point per group
    SPARSIFY = "sparsify"  # the largest elements of each block and where they lie; the others come back as zero
    SAMPLE = "sample"  # some rows, of tokens, and how much each counts; perhaps in codes
    PRUNE = "prune"  # the largest elements of each sample, as many as there are
    RECOMPUTE = "recompute"  # not stored: the backward computes it again from other saved tensors

    def __str__(self) -> str:
        return self.value


# Bits at which it is measured what pairs of tensors add.
PAIR_BITS = 2

# What may come back with an error.
LOSSY = frozenset({Action.QUANTIZE, Action.SPARSIFY, Action.SAMPLE})


class Role(str, Enum):
    """Who holds a saved tensor besides the backward.

    What is held is neither rounded nor counted. What is computed from it is an activation, also where that is computed
    from parameters and buffers alone, unless it is a copy of them, a part of a weight, or a constant. What these are,
    ``passes/held.py`` says; what is in doubt stays exact.
    """

    ACTIVATION = "activation"  # nobody: its bytes are what training needs
    PARAMETER = "parameter"  # of a module, or what layers read as their weight
    BUFFER = "buffer"  # of a module
    INPUT = "input"  # the caller, or autograd until a leaf has its gradient
    BOUNDARY = "boundary"  # nobody once the call returns: an earlier graph computed it, or what ran in between
    SEED = "seed"  # of the rounding noise
    PADDING = "padding"  # the caller's, and says which tokens are no padding

    def __str__(self) -> str:
        return self.value


class Pruning(NamedTuple):
    """``keep`` elements of each ``block`` are stored, in ``value_bits`` each."""

    keep: int
    block: int
    value_bits: int


@dataclass(frozen=True)
class Recomputation:
    """What it takes to compute a saved tensor again: floating-point operations, and the keys of the rows it reads."""

    flops: int
    sources: tuple[str, ...]


@dataclass(frozen=True)
class SavedTensor:
    """One saved tensor of one graph.

    ``key`` names it across graphs, batch sizes and processes: module path, operator and, where these repeat, a number.
    ``shape`` holds the sizes of the traced call, ``nbytes`` and ``numel`` their product; ``symbolic_shape`` prints the
    symbols of a dynamic graph. ``obstacle`` says why it must stay exact, or is empty; ``movable`` whether a copy of it
    elsewhere would free its memory; ``recomputation`` how the backward could do without it; ``is_layer_input`` whether
    the backward reads it in gradients of weights alone, so that errors in it reach nothing else, and ``num_rows`` how
    many rows of tokens it has where these are products of matrices, ``is_marked`` whether an input of the model marks
    which of them are padding. ``row_length`` is the size of its last dimension in memory, 0 where that is
    symbolic or the only one.
    """

    key: str
    name: str
    op: str
    module: str
    source: str
    shape: tuple[int, ...]
    symbolic_shape: tuple[str, ...]
    dtype: torch.dtype
    numel: int
    nbytes: int
    role: Role = Role.ACTIVATION
    kind: str = "path"
    index_range: int | None = None
    obstacle: str = ""
    movable: bool = True
    recomputation: Recomputation | None = None
    is_layer_input: bool = False
    num_rows: int = 0
    is_marked: bool = False
    row_length: int = 0


@dataclass(frozen=True)
class Decision:
    """What is stored in place of one saved tensor, and why; with ``offload``, in the host's memory.

    ``bits`` are those of a code or, with ``keep`` of each ``block``, of a value that is left; ``rows`` is the share of
    rows that are stored, with a mark for each row where ``padded``. ``by_size`` says that it
    is kept because of its size alone: another batch size decides again. ``nbytes`` is what was stored where that
    depends on the values.
    """

    action: Action
    reason: str
    bits: int | None = None
    group_size: int | None = None
    dtype: torch.dtype | None = None
    by_size: bool = False
    offload: bool = False
    nbytes: int | None = None
    keep: int | None = None
    block: int | None = None
    rows: float | None = None
    padded: bool = False

    @property
    def pruning(self) -> Pruning:
        """Of a decision to sparsify."""
        assert self.keep is not None and self.block is not None and self.bits is not None, self
        return Pruning(self.keep, self.block, self.bits)


@dataclass(frozen=True)
class Sensitivity:
    """What rounding or pruning one saved tensor adds to the gradient.

    Args:
        variance: Code bits -> E|g' - g|^2 over the trainable parameters when this tensor alone is rounded to them.
        method: How it was found: "probed" by the product through the backward graph, or "perturbed", by noise in this
            tensor alone.
        excess: What the variance v on two bits grows by among other tensors on two bits, in units of v^2.
        pruned: Pruning -> E|g' - g|^2 when this tensor alone is pruned so: the square of the bias, and the variance
            that rounding what is left adds. Prunings that were not measured are not there.
        sampled: The same when as many of its rows are sampled as the settings say, or None where that was not measured.
        handed_on: The share of ``variance`` that lies in gradients handed to earlier graphs.
    """

    variance: Mapping[int, float]
    method: str
    excess: float = 0.0
    pruned: Mapping[Pruning, float] = field(default_factory=dict)
    sampled: float | None = None
    handed_on: float = 0.0

    def weighed(self, weight: float) -> "Sensitivity":
        """The same where what is handed on counts ``weight`` times."""
        factor = 1 - self.handed_on + self.handed_on * weight
        return replace(
            self,
            variance={bits: factor * value for bits, value in self.variance.items()},
            excess=self.excess / factor if factor else 0.0,
            pruned={pruning: factor * value for pruning, value in self.pruned.items()},
            sampled=None if self.sampled is None else factor * self.sampled,
        )

    def noise(self, bits: int, level: float | None = None) -> float:
        """The tensor's part of E|g' - g|^2 when the others are rounded, too.

        Pairs were measured where all tensors have two bits. More noise than that adds in proportion. With less, what
        pairs add falls faster: where it is many times the rest, triples and more are in it, as of an exponential.

        Args:
            bits: Of its codes.
            level: Noise of all tensors, in units of theirs on two bits; that of this tensor when left out.
        """
        variance, usual = self.variance[bits], self.variance.get(PAIR_BITS, 0.0)
        if not usual or not self.excess:
            return variance
        level = variance / usual if level is None else level
        grown = 1 + 2 * self.excess * usual
        ratio = grown**level if level <= 1 else 1 + (grown - 1) * level
        return variance * (1 + ratio) / 2


@dataclass(frozen=True)
class Profile:
    """What one probe of a graph found: sensitivities by row key, and |g|^2 over the trainable parameters.

    ``handed_square`` is the part of that which lies in gradients handed to earlier graphs.
    """

    sensitivities: Mapping[str, Sensitivity]
    gradient_square: float
    handed_square: float = 0.0

    @property
    def own_square(self) -> float:
        """|g|^2 over the parameters of the graph itself."""
        return self.gradient_square - self.handed_square

    def level(self, ways: Iterable[tuple[str, int | Pruning]]) -> float:
        """Noise of tensors that are stored in these ways, to first order, in units of what all add on two bits.

        Args:
            ways: Row keys with bits of codes, or what is kept of each block.
        """
        known = ((self.sensitivities[key], way) for key, way in ways if key in self.sensitivities)
        noise = sum(s.pruned.get(way, 0.0) if isinstance(way, Pruning) else s.variance[way] for s, way in known)
        usual = sum(found.variance.get(PAIR_BITS, 0.0) for found in self.sensitivities.values())
        return noise / usual if usual else 0.0

    def seen_from(self, earlier_square: float) -> "Profile":
        """Sensitivities where noise in what is handed on is what it becomes: noise of the same share in the gradients
        that earlier graphs compute from it, ``earlier_square`` in all.
        """
        if not self.handed_square or not earlier_square:
            return self
        weight = earlier_square / self.handed_square
        weighed = {key: found.weighed(weight) for key, found in self.sensitivities.items()}
        return Profile(weighed, self.own_square)


@dataclass(frozen=True)
class Plan(Mapping[str, Decision]):
    """Decisions by row key. Reads like a dict; saved as JSON.

    Args:
        decisions: The decisions.
        graphs: Of each graph that it was made for, what the graph computes (``_naming.call_sites``); nothing in a plan
            made by hand, which serves any model with its keys.
        otherwise: What floating-point tensors get that were too small, or not saved, at the sizes it was made at.
        min_numel: Elements below which it kept tensors.
        torch: The release of torch that it was made with, where it comes from a file that says so.
    """

    decisions: Mapping[str, Decision] = field(default_factory=dict)
    graphs: tuple[tuple[str, ...], ...] = ()
    otherwise: Decision | None = None
    min_numel: int = 0
    torch: str = field(default="", compare=False, repr=False)

    def __getitem__(self, key: str) -> Decision:
        return self.decisions[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    @property
    def lossy(self) -> bool:
        """Whether any saved tensor may come back with an error."""
        decisions = [*self.decisions.values(), *([self.otherwise] if self.otherwise else [])]
        return any(decision.action in LOSSY for decision in decisions)

    @property
    def is_of_another_torch(self) -> bool:
        """Whether another release of torch may have saved other tensors."""
        return bool(self.torch) and _release(self.torch) != _release(torch.__version__)

    def to_json(self) -> str:
        """The plan as a JSON document."""
        document: dict[str, Any] = {
            "format": PLAN_FORMAT,
            "version": PLAN_VERSION,
            "torch": self.torch or str(torch.__version__),
            "graphs": self.graphs,
            "otherwise": self.otherwise and _to_jsonable(self.otherwise),
            "min_numel": self.min_numel,
            "decisions": {key: _to_jsonable(decision) for key, decision in self.decisions.items()},
        }
        return json.dumps(document, indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to ``path``."""
        Path(path).write_text(self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads a plan written by ``save``.

        Raises:
            ConfigError: When the file is missing, truncated, or not a plan of this version.
        """
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise ConfigError(f"plan must name a readable file, got {str(path)!r} ({error.strerror})") from error
        except ValueError as error:
            raise _damaged(str(path), error) from error
        return cls.from_json(text, str(path))

    @classmethod
    def from_json(cls, text: str, origin: str) -> "Plan":
        """Reads what ``to_json`` wrote; errors call it ``origin``.

        Raises:
            ConfigError: When it is truncated, or not a plan of a version that is read.
        """
        try:
            document = json.loads(text)
        except ValueError as error:
            raise _damaged(origin, error) from error
        if not isinstance(document, dict) or document.get("format") != PLAN_FORMAT:
            raise ConfigError(f"plan must be a file written by plan.save, got {origin!r}, which is something else")
        if document.get("version") not in _READABLE_VERSIONS:
            raise ConfigError(
                f"plan files of versions {', '.join(map(str, _READABLE_VERSIONS))} are read, got version "
                f"{document.get('version')!r} in {origin!r}: write it again with this release"
            )
        try:
            return _from_document(document)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"plan {origin!r} holds a decision that cannot be read ({error!r}): write it again with plan.save"
            ) from error

    def merged(self, other: "Plan") -> "Plan":
        """This plan with the decisions and graphs of ``other`` added."""
        return replace(
            self,
            decisions={**self.decisions, **other.decisions},
            graphs=tuple(dict.fromkeys((*self.graphs, *other.graphs))),
            otherwise=self.otherwise or other.otherwise,
            min_numel=max(self.min_numel, other.min_numel),
            torch=self.torch or other.torch,
        )


def _release(version: str) -> list[str]:
    """Major and minor number: "2.13.0+cpu" -> ["2", "13"]."""
    return version.split(".")[:2]


def _damaged(origin: str, error: ValueError) -> ConfigError:
    return ConfigError(
        f"plan must be a complete JSON file, got {origin!r}, which breaks off or is damaged ({error}): write it again "
        "with plan.save"
    )


def _to_jsonable(decision: Decision) -> dict[str, Any]:
    entry = {name: value for name, value in asdict(decision).items() if value is not None and value is not False}
    entry["action"] = str(decision.action)
    if decision.dtype is not None:
        entry["dtype"] = str(decision.dtype).removeprefix("torch.")
    return entry


def _from_document(document: dict[str, Any]) -> Plan:
    """A plan from what ``Plan.to_json`` wrote; version 1 knows decisions alone."""
    otherwise = document.get("otherwise")
    return Plan(
        {key: _from_jsonable(entry) for key, entry in document["decisions"].items()},
        graphs=tuple(tuple(map(str, sites)) for sites in document.get("graphs", ())),
        otherwise=otherwise and _from_jsonable(otherwise),
        min_numel=int(document.get("min_numel", 0)),
        torch=str(document.get("torch", "")),
    )


def _from_jsonable(entry: dict[str, Any]) -> Decision:
    values = dict(entry)
    values["action"] = Action(values["action"])
    if "dtype" in values:
        values["dtype"] = getattr(torch, values["dtype"])
    return Decision(**values)
