"""Where rounding noise may pass on its way from saved tensors to gradients, in a joint graph or in a backward.

What no tangent reaches is a factor that gradients are multiplied with. Each such node is one of three:

    FREE    linear in what it reads (_noise_rules.py): noise passes on as it is
    UNIT    a bounded function of one node above it, its root, however it is decomposed (_bounded.py): noise in the root
            may pass, noise in what lies between may not
    CUT     anything else: sqrt, log, division, a comparison, an operator that nobody listed

The nodes that gradients read are demanded; a free node demands what it reads, a unit its root. A cut that is demanded
must be given: computed from exact values. It may then be stored in a few bits itself, since it enters linearly.
"""

import math
import operator
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx

from ._bends import between_bends
from ._bounded import constant_of, has_pole, is_bounded
from ._exact_sources import exact_sources
from ._fx import draws_random_numbers, is_tensor
from ._noise_rules import FACTORIZATIONS, LINEAR, LINEAR_BACKWARD, PRODUCTS
from ._quotients import cancelled_factors
from ._views import VIEW_OPS

aten, prims = torch.ops.aten, torch.ops.prims

# Operators that a function of one number may have; longer ones are cuts.
_MOST_STEPS = 40
# Of groups with fewer elements, scales and zeros would take as many bytes as codes of one bit.
SMALLEST_GROUP = 64
# Roots to try.
_MOST_ROOTS = 12

# What a node is made of element by element: a node, and the views between.
_Origin = tuple[fx.Node, tuple[Any, ...]]


class Kind(Enum):
    """What a node does to noise in what it reads."""

    FREE = "free"
    UNIT = "unit"
    CUT = "cut"


@dataclass
class Unit:
    """A bounded function of ``root``: ``nodes``, in order, the last of which is its value."""

    root: fx.Node
    nodes: list[fx.Node]


@dataclass
class Demands:
    """What gradients read, directly or by nodes that may be computed again.

    ``cuts`` must be computed from exact values, and may be noisy themselves; ``fixed`` must not, for the reason given.
    """

    nodes: set[fx.Node] = field(default_factory=set)
    cuts: set[fx.Node] = field(default_factory=set)
    fixed: dict[fx.Node, str] = field(default_factory=dict)
    units: dict[fx.Node, Unit] = field(default_factory=dict)


class Noise:
    """Classifies those of ``nodes`` that no tangent reaches.

    Args:
        nodes: Of a joint graph or a backward, or a part of one, in order.
        dependent: The nodes that a tangent reaches.
        sources: Nodes from which noise may come, directly or by what is computed from them.
        exact: Those of them that have none themselves.
        results: Gradients.
        delicate: What factorizations of matrices yielded.
    """

    def __init__(
        self,
        nodes: Iterable[fx.Node],
        dependent: Container[fx.Node],
        sources: Iterable[fx.Node],
        exact: Container[fx.Node] = (),
        results: Iterable[Any] = (),
        delicate: Iterable[fx.Node] = (),
    ) -> None:
        self._nodes = list(nodes)
        self._dependent = dependent
        self._exact = exact
        self._results = results
        self._delicate = delicate_nodes((node for node in self._nodes if node not in dependent), delicate)
        self._tainted: set[fx.Node] = set(sources)
        self._kinds: dict[fx.Node, Kind] = {}
        self._units: dict[fx.Node, Unit] = {}
        self._origins: dict[fx.Node, frozenset[_Origin]] = {}
        self._above: dict[fx.Node, tuple[fx.Node, ...]] = {}
        # Cuts, and what is free but demands one of as many elements.
        self._on_cuts: set[fx.Node] = set()
        # Such cuts, repeated.
        self._spread: set[fx.Node] = set()
        for node in self._nodes:
            if not self._tainted.isdisjoint(node.all_input_nodes):
                self._tainted.add(node)
            if self.is_noisy(node) and node not in dependent:
                self._classify(node)

    def is_noisy(self, node: object) -> bool:
        """Whether ``node`` may carry noise, or is decided by values that do."""
        return isinstance(node, fx.Node) and node in self._tainted and node not in self._exact

    def kind(self, node: fx.Node) -> Kind:
        """What ``node`` does to noise; what has none is free."""
        return self._kinds.get(node, Kind.FREE)

    def poles(self, cut: fx.Node) -> list[fx.Node]:
        """What ``cut`` is a function of and has no bound near a zero of: 1 / x, where nothing is added to x.

        One element may be as large as it likes then, where all that it is multiplied with is as small.
        """
        pairs = [(_between(root, cut), root) for root in self._roots(cut) if _is_float(root)]
        is_pole = bool(pairs) and all(nodes is not None and has_pole(nodes, root) for nodes, root in pairs)
        return [root for _, root in pairs] if is_pole else []

    def exact_factors(self, demands: Demands) -> dict[fx.Node, str]:
        """What gradients are multiplied with and no codes may be stored of, with the reason."""
        poles = {cut: self.poles(cut) for cut in demands.cuts if _is_float(cut)}
        cancelled = cancelled_factors(
            self._nodes,
            self._dependent,
            self.is_noisy,
            lambda factor: poles.get(factor, ()),
            _is_pointwise,
        )
        return {
            **{cut: f"{name_of(cut)} has a pole: all beside it is small" for cut, roots in poles.items() if roots},
            **dict.fromkeys(cancelled, "the gradient is divided by what it is made of"),
        }

    def origins(self, node: fx.Node) -> frozenset[_Origin]:
        """What the elements of ``node`` are made of, one by one: cuts, and what is no function of single elements."""
        return self._origins.get(node, frozenset())

    def culprits(self, cut: fx.Node) -> list[fx.Node]:
        """What a cut reads and must not be noisy."""
        noisy = [(value, position) for value, position in _operands(cut) if self.is_noisy(value)]
        positions = LINEAR.get(str(cut.target), ()) if _is_float(cut) else ()
        found = [value for value, position in noisy if position not in positions]
        return found or [value for value, _ in noisy]

    def demands(self) -> Demands:
        """What tangent-dependent nodes and results read, all the way up."""
        found = Demands()
        steep: set[fx.Node] = set()
        bent = between_bends(self._nodes, self._dependent, _is_pointwise)
        for node in self._nodes:
            if node in self._dependent and node.op == "call_function":
                self._hold_delicate(node, steep, found)
                positions = LINEAR_BACKWARD.get(str(node.target), LINEAR.get(str(node.target), ()))
                for value, position in _operands(node):
                    if value in self._dependent or not self.is_noisy(value):
                        continue
                    if node in bent:
                        found.fixed.setdefault(value, f"{name_of(node)} stands in a function that is not linear")
                    elif _is_float(value) and position not in positions:
                        found.fixed.setdefault(value, f"{name_of(node)} is not linear in it")
                    else:
                        self.demand(value, found)
        for value in self._results:
            if isinstance(value, fx.Node) and value not in self._dependent:
                self.demand(value, found)
        return found

    def _hold_delicate(self, node: fx.Node, steep: set[fx.Node], found: Demands) -> None:
        """Keeps what meets the gradient of a factorization exact, up to the product that ends it.

        Such a gradient may be as large as the matrix is near a singular one, where the matrix itself has nothing: what
        is left of their product is small because both are exact.
        """
        values = [value for value in node.all_input_nodes if value not in self._dependent and _is_float(value)]
        delicate = [value for value in values if value in self._delicate]
        if not delicate and steep.isdisjoint(node.all_input_nodes):
            return
        noisy = [value for value in values if self.is_noisy(value)]
        for value in noisy:
            found.fixed.setdefault(value, "the gradient of a factorization is multiplied by it")
        if all(value in self._delicate for value in noisy):
            steep.add(node)

    def demand(self, node: fx.Node, found: Demands) -> None:
        """Adds ``node`` and what it demands to ``found``."""
        pending = [node]
        while pending:
            current = pending.pop()
            if not self.is_noisy(current) or current in found.nodes:
                continue
            found.nodes.add(current)
            kind = self.kind(current)
            # Of a selection, the value that is selected is what to store, and not both branches.
            is_choice = current.target is aten.where.self and current in self._on_cuts and kind is Kind.FREE
            if kind is Kind.CUT or is_choice:
                sources = exact_sources(current, self.is_noisy, _is_pointwise)
                found.fixed |= dict.fromkeys(sources, f"{name_of(current)} of it has many times its elements")
                found.cuts |= set() if sources else {current}
            elif kind is Kind.UNIT:
                found.units[current] = self._units[current]
                pending.append(self._units[current].root)
            else:
                pending.extend(current.all_input_nodes)

    def above(self, nodes: Iterable[fx.Node]) -> set[fx.Node]:
        """``nodes``, and the noisy ones that they are computed from."""
        pending, seen = [node for node in nodes if self.is_noisy(node)], set()
        while pending:
            node = pending.pop()
            if node not in seen:
                seen.add(node)
                pending.extend(value for value in node.all_input_nodes if self.is_noisy(value))
        return seen

    def _classify(self, node: fx.Node) -> None:
        unit = None
        if node.op == "call_function":
            kind = self._kind_of(node)
            reads_cuts = any(value in self._on_cuts and _has_numel_of(value, node) for value in node.all_input_nodes)
            # What reads cuts may be a function of what lies above them.
            if kind is Kind.CUT or reads_cuts:
                unit = self._unit_of(node, kind)
            self._kinds[node] = kind if unit is None else Kind.UNIT
            if node.target in VIEW_OPS and not reads_cuts:
                # One for each row, repeated.
                source = node.all_input_nodes[0]
                self._spread |= {node} if source in self._on_cuts or source in self._spread else set()
            follows = reads_cuts and (_is_pointwise(node) or node.target in VIEW_OPS)
            if _is_float(node) and (unit.root in self._on_cuts if unit is not None else kind is Kind.CUT or follows):
                self._on_cuts.add(node)
        if unit is not None:
            self._units[node] = unit
        self._origins[node] = self._made_of(node)

    def _kind_of(self, node: fx.Node) -> Kind:
        """FREE where ``node`` is linear in values that may have noise, or reads only masks and indices; else CUT."""
        noisy = [(value, position) for value, position in _operands(node) if self.is_noisy(value)]
        floats = [(value, position) for value, position in noisy if _is_float(value)]
        if not _is_float(node):
            return Kind.CUT if floats else Kind.FREE
        if node.target is operator.getitem:
            return self.kind(node.all_input_nodes[0])
        positions = LINEAR.get(str(node.target), ())
        if any(position not in positions for _, position in floats):
            return Kind.CUT
        is_cut = str(node.target) in PRODUCTS and (self._is_square(node) or self._is_scaled(node))
        return Kind.CUT if is_cut else Kind.FREE

    def _is_square(self, node: fx.Node) -> bool:
        """Whether factors of a product are made of the same elements."""
        factors = [
            value for value in node.args if isinstance(value, fx.Node) and self.is_noisy(value) and _is_float(value)
        ]
        if node.target is aten.addcmul.default:
            factors = [value for value in factors if value is not node.args[0] or value in node.args[1:]]
        origins = [self._origins.get(factor, frozenset({(factor, ())})) for factor in factors[:2]]
        return len(origins) == 2 and not origins[0].isdisjoint(origins[1])

    def _is_scaled(self, node: fx.Node) -> bool:
        """Whether rows are multiplied by a cut of each, as in normalizations, and groups cannot end where rows do.

        Where they do, noise is no larger than the row that it belongs to.
        """
        value = node.meta["val"]
        for factor in node.all_input_nodes:
            if factor in self._on_cuts or factor in self._spread:
                length = _row_length(_before_expanding(factor).meta["val"], value)
                if length is not None and length % SMALLEST_GROUP:
                    return any(self.is_noisy(other) and other is not factor for other in node.all_input_nodes)
        return False

    def _made_of(self, node: fx.Node) -> frozenset[_Origin]:
        """What the elements of ``node`` are made of, one by one; a cut is made of itself, too."""
        if node.op != "call_function":
            return frozenset({(node, ())})
        if node.target in VIEW_OPS:
            step = str((node.target, node.args[1:]))
            origins = self._origins.get(node.all_input_nodes[0], frozenset())
            return frozenset((root, (*views, step)) for root, views in origins)
        if not _is_pointwise(node) or not is_tensor(node):
            return frozenset({(node, ())})
        own = {(node, ())} if self.kind(node) is Kind.CUT else set()
        return frozenset(own).union(
            (root, views if _has_shape_of(value, node) else (*views, str(node.meta["val"].shape)))
            for value in node.all_input_nodes
            if self.is_noisy(value) and _is_float(value)
            for root, views in self._origins.get(value, ())
        )

    def _unit_of(self, node: fx.Node, kind: Kind) -> Unit | None:
        """The bounded function that ``node`` is, of the nearest node for which that can be shown.

        Of a node that is free, one that does without a cut.
        """
        if not is_tensor(node) or not _is_float(node):
            return None
        # What would have to be given comes last.
        for root in sorted(filter(_is_float, self._roots(node)), key=lambda root: root in self._on_cuts):
            nodes = _between(root, node)
            cuts = [inner for inner in nodes or () if self.kind(inner) is Kind.CUT and _is_float(inner)]
            if nodes is None or (kind is Kind.FREE and not cuts):
                continue
            if is_bounded(nodes, root):
                return Unit(root, nodes)
        return None

    def _roots(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Nodes, the nearest first, each of which ``node`` is a function of, element by element, beside constants."""
        if node not in self._above:
            self._above[node] = self._find_roots(node)
        return self._above[node]

    def _find_roots(self, node: fx.Node) -> tuple[fx.Node, ...]:
        if node.op != "call_function" or not _is_pointwise(node):
            return ()
        sources = [value for value in node.all_input_nodes if constant_of(value) is None]
        if not sources or not all(self.is_noisy(value) and _has_shape_of(value, node) for value in sources):
            return ()
        first, *others = [(value, *self._roots(value)) for value in sources]
        return tuple(root for root in first if all(root in chain for chain in others))[:_MOST_ROOTS]


def _row_length(factor: torch.Tensor, value: torch.Tensor) -> int | None:
    """Elements in a row of ``value`` for each of ``factor``; None where these do not lie one after the other."""
    shape = [1] * (value.dim() - factor.dim()) + list(factor.shape)
    num_outer = next((dim for dim, size in enumerate(shape) if size == 1 != value.shape[dim]), len(shape))
    is_row = num_outer < len(shape) and all(size == 1 for size in shape[num_outer:])
    length = math.prod(value.shape[num_outer:])
    return length if is_row and isinstance(length, int) else None


def _before_expanding(node: fx.Node) -> fx.Node:
    while node.target is aten.expand.default:
        node = node.all_input_nodes[0]
    return node


def delicate_nodes(nodes: Iterable[fx.Node], given: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """What factorizations among ``nodes`` yield, and what is computed from that or ``given``, element by element."""
    found = set(given)
    for node in nodes:
        if node.op != "call_function":
            continue
        is_result = name_of(node).lstrip("_").startswith(FACTORIZATIONS)
        follows = _is_pointwise(node) or node.target in VIEW_OPS or node.target is operator.getitem
        if is_result or (follows and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _between(root: fx.Node, node: fx.Node) -> list[fx.Node] | None:
    """The nodes that compute ``node`` from ``root``, in order; None where they are too many."""
    seen: dict[fx.Node, None] = {}

    def visit(current: fx.Node) -> None:
        if current is root or current in seen or constant_of(current) is not None or len(seen) > _MOST_STEPS:
            return
        for value in current.all_input_nodes:
            visit(value)
        seen[current] = None

    visit(node)
    return list(seen) if len(seen) <= _MOST_STEPS else None


def _operands(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The nodes that ``node`` reads, with the positions of the arguments that they stand in; -1 for named ones."""
    found = []
    for position, argument in enumerate(node.args):
        found += [(value, position) for value in _nodes_in(argument)]
    return found + [(value, -1) for argument in node.kwargs.values() for value in _nodes_in(argument)]


def _nodes_in(argument: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def _is_pointwise(node: fx.Node) -> bool:
    target = node.target
    if target in (prims.convert_element_type.default, aten.where.self):
        return True
    tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
    return torch.Tag.pointwise in tags and not draws_random_numbers(node)


def _has_shape_of(value: fx.Node, node: fx.Node) -> bool:
    return is_tensor(value) and is_tensor(node) and value.meta["val"].shape == node.meta["val"].shape


def _has_numel_of(value: fx.Node, node: fx.Node) -> bool:
    return is_tensor(value) and is_tensor(node) and value.meta["val"].numel() == node.meta["val"].numel()


def _is_float(node: fx.Node) -> bool:
    """Whether ``node`` may hold rounding noise by its type; a tuple may."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return value.dtype.is_floating_point or value.dtype.is_complex
    return isinstance(value, tuple | list)


def name_of(node: fx.Node) -> str:
    """Short name of an operator."""
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]
