"""Decides what is stored for each saved tensor. Pure: rows and settings in, a plan out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .allocation import Option, fewest_nbytes, least_noise
from .choices import CODE_BITS
from .config import Config
from .decisions import (
    OFFLOAD_MIN_NBYTES,
    UNKNOWN_NOISE,
    decide,
    host_nbytes,
    nbytes_at,
    noise_of,
    stored_nbytes,
    ways_to_store,
)
from .errors import ConfigError
from .overflow import counted_nbytes, step_nbytes, with_offloaded, with_recomputed
from .plan import Action, Decision, Plan, Profile, SavedTensor

__all__ = [
    "ProbedGraph",
    "counted_nbytes",
    "host_nbytes",
    "make_plan",
    "noise_level",
    "predicted_noise",
    "solve",
    "stored_nbytes",
]

# How far sensitivities may be off: bits below uniform ones have to promise more than this.
_TRUST = 1.4
# Derivatives are taken at what codes hold. On fewer bits they are several times as large as at the exact tensors.
_PROBED_BITS = 3
# How far what pruning adds may be estimated too low, where more than gradients of weights read the tensor.
_CAUTION = 2.0


@dataclass(frozen=True)
class ProbedGraph:
    """The rows of one graph with their sensitivities, the plan that it ran with while these were found, and how often a
    step calls it: blocks of one class share a graph.
    """

    rows: Sequence[SavedTensor]
    profile: Profile
    plan: Plan = field(default_factory=Plan)
    num_calls: int = 1


def make_plan(rows: Sequence[SavedTensor], config: Config, budget_nbytes: float | None = None) -> Plan:
    """One decision per row: lossless steps and uniform bits, those of ``config`` or as many as ``budget_nbytes`` allow.

    While a graph waits to be probed, nothing is offloaded, and without a budget codes have 3 bits at the least.

    Raises:
        ConfigError: When the least takes too much memory.
    """
    if budget_nbytes is None or (config.automatic and config.offloads):
        bits = config.code_bits
        if config.automatic and bits is not None:
            bits = max(bits, _PROBED_BITS)
        uniform = _uniform(rows, config, bits)
        return with_offloaded([rows], [uniform])[0] if config.offloads and not config.automatic else uniform
    return uniform_within([rows], [1], config, budget_nbytes)[0]


def uniform_within(
    graphs: Sequence[Sequence[SavedTensor]], num_calls: Sequence[int], config: Config, budget_nbytes: float
) -> list[Plan]:
    """One plan per graph, all with the same bits: as many as ``budget_nbytes`` allow where a step calls each graph
    ``num_calls`` times.

    Raises:
        ConfigError: When the least takes too much memory.
    """
    widths: list[int | None] = [None] if config.code_bits is None else [None, *reversed(CODE_BITS)]
    # What is to be probed must be rounded, where exact tensors would fit too.
    widths = widths[1:] if config.automatic else widths
    for position, bits in enumerate(widths):
        plans = [_uniform(rows, config, bits) for rows in graphs]
        if position >= widths.index(config.code_bits):
            if config.offloads:
                plans = with_offloaded(graphs, plans, budget_nbytes, num_calls)
            elif config.recompute == "full":
                plans = with_recomputed(graphs, plans, config, budget_nbytes, num_calls)
        nbytes = step_nbytes(graphs, plans, num_calls)
        if nbytes <= budget_nbytes:
            return plans
    raise _infeasible(config, nbytes)


def solve(graphs: Sequence[ProbedGraph], config: Config, budget_nbytes: float | None = None) -> list[Plan]:
    """One plan per graph, all solved together: the least noise at the bytes that ``config`` allows, or the fewest bytes
    at its noise. With ``config.offload`` and a budget, codes keep their mean bits as long as offloading suffices.

    What was recomputed while the graphs were probed, stays so: sensitivities hold for that. A row whose sensitivity is
    not known stays as it was, and exact where noise is the target.

    Raises:
        ConfigError: When no plan takes so few bytes.
    """
    choice = _Choice.among(graphs, config)
    rows, mean_bits = [graph.rows for graph in graphs], config.average_bits
    num_calls = [graph.num_calls for graph in graphs]
    assert mean_bits is not None
    if config.noise is not None:
        noise = config.noise * sum(graph.num_calls * graph.profile.gradient_square for graph in graphs)
        plans = choice.plans(fewest_nbytes(choice.options, noise - choice.fixed_noise))
        return with_offloaded(rows, plans) if config.offloads else plans
    if budget_nbytes is None:
        plans = choice.within(choice.nbytes_at(mean_bits) + choice.left_by_overrides(mean_bits))
        return with_offloaded(rows, plans) if config.offloads else plans
    room = budget_nbytes - choice.fixed_nbytes
    if not config.offloads:
        return choice.within(room)
    for bits in (mean_bits, *(bits for bits in reversed(CODE_BITS) if bits < mean_bits)):
        plans = with_offloaded(rows, choice.within(max(room, choice.nbytes_at(bits))), budget_nbytes, num_calls)
        nbytes = step_nbytes(rows, plans, num_calls)
        if nbytes <= budget_nbytes:
            return plans
    raise _infeasible(config, nbytes)


def predicted_noise(rows: Sequence[SavedTensor], plan: Plan, profile: Profile) -> float:
    """The variance that ``plan`` adds to the gradient, as far as sensitivities are known."""
    level = noise_level(plan, profile)
    return sum(noise_of(row, plan[row.key], profile, level) for row in rows if row.key in profile.sensitivities)


def noise_level(plan: Plan, profile: Profile) -> float:
    """How noisy all tensors are with ``plan``, as ``Sensitivity.noise`` takes it."""
    return profile.level(
        (key, decision.pruning if decision.action is Action.SPARSIFY else decision.bits)
        for key, decision in plan.items()
        if decision.bits is not None
    )


@dataclass(frozen=True)
class _Choice:
    """The rows of all graphs that can be quantized: for each its graph, and the ways to store it with their price, that
    of all calls of a step. ``given`` are the plans for all others, ``overridden`` those of them with bits that are set
    already, ``num_calls`` how often a step calls each graph.
    """

    config: Config
    given: list[Plan]
    chosen: list[tuple[int, SavedTensor]]
    ways: list[list[Decision]]
    options: list[list[Option]]
    overridden: list[tuple[int, SavedTensor]]
    num_calls: list[int]
    fixed_nbytes: int
    fixed_noise: float

    @classmethod
    def among(cls, graphs: Sequence[ProbedGraph], config: Config) -> "_Choice":
        """The choice that the rows of ``graphs`` leave."""
        coarse = [_uniform(graph.rows, config, CODE_BITS[0]) for graph in graphs]
        plans = [_given(graph, config, codes) for graph, codes in zip(graphs, coarse, strict=True)]
        codes = [
            (index, row)
            for index, graph in enumerate(graphs)
            for row in graph.rows
            if coarse[index][row.key].action is Action.QUANTIZE
        ]
        chosen = [
            (index, row)
            for index, row in codes
            if plans[index][row.key].action is Action.KEEP and row.key in graphs[index].profile.sensitivities
        ]
        overridden = [(index, row) for index, row in codes if plans[index][row.key].action is Action.QUANTIZE]
        num_calls = [graph.num_calls for graph in graphs]
        ways = [
            [w for w in ways_to_store(row, config) if math.isfinite(noise_of(row, w, graphs[index].profile))]
            for index, row in chosen
        ]
        options = [
            [
                Option(
                    num_calls[index] * stored_nbytes(row, way),
                    num_calls[index] * _cautious_noise(row, way, graphs[index].profile),
                )
                for way in row_ways
            ]
            for (index, row), row_ways in zip(chosen, ways, strict=True)
        ]
        exact = step_nbytes([graph.rows for graph in graphs], plans, num_calls)
        return cls(
            config,
            plans,
            chosen,
            ways,
            options,
            overridden=overridden,
            num_calls=num_calls,
            fixed_nbytes=exact - sum(num_calls[index] * row.nbytes for index, row in chosen),
            fixed_noise=sum(
                num_calls[i] * noise_of(row, plans[i][row.key], graphs[i].profile) for i, row in overridden
            ),
        )

    def nbytes_at(self, bits: float) -> float:
        """Bytes of all rows at codes of ``bits``."""
        return sum(self.num_calls[index] * nbytes_at(row, bits, self.config) for index, row in self.chosen)

    def left_by_overrides(self, bits: float) -> float:
        """Bytes that rows with bits of their own leave of ``bits`` per element; negative where they take more."""
        return sum(
            self.num_calls[index] * (nbytes_at(row, bits, self.config) - stored_nbytes(row, self.given[index][row.key]))
            for index, row in self.overridden
        )

    def within(self, nbytes: float) -> list[Plan]:
        """The plans of the least noise.

        Raises:
            ConfigError: When the smallest way to store each row takes more.
        """
        picked = least_noise(self.options, nbytes)
        if picked is None:
            least_nbytes = sum(min(way.nbytes for way in row_ways) for row_ways in self.options)
            raise _infeasible(self.config, self.fixed_nbytes + least_nbytes)
        return self.plans(self._certain(picked, nbytes))

    def _certain(self, picked: list[int], nbytes: float) -> list[int]:
        """``picked``; where that promises too little, the best way that is the same for all rows, with more bytes where
        there are some left: no worse whatever the sensitivities.
        """
        uniform = self._uniform(nbytes)
        if uniform is None or self._noise(picked) * _TRUST <= self._noise(uniform):
            return picked
        finer = [
            [
                index
                for index, option in enumerate(ways)
                if index == least or (option.noise <= ways[least].noise and option.nbytes > ways[least].nbytes)
            ]
            for ways, least in zip(self.options, uniform, strict=True)
        ]
        options = [[ways[index] for index in kept] for ways, kept in zip(self.options, finer, strict=True)]
        found = least_noise(options, nbytes)
        assert found is not None
        return [kept[index] for kept, index in zip(finer, found, strict=True)]

    def _uniform(self, nbytes: float) -> list[int] | None:
        """Of the ways that are the same for all rows and fit into ``nbytes``, that of the least noise; None when none
        do.
        """
        found = []
        for format in dict.fromkeys(_format_of(way) for ways in self.ways for way in ways if way.bits is not None):
            picked = [next((i for i, way in enumerate(ways) if _format_of(way) == format), None) for ways in self.ways]
            indices = [index for index in picked if index is not None]
            if len(indices) == len(self.ways) and self._nbytes(indices) <= nbytes:
                found.append(indices)
        return min(found, key=self._noise, default=None)

    def _nbytes(self, picked: Sequence[int]) -> int:
        return sum(ways[index].nbytes for ways, index in zip(self.options, picked, strict=True))

    def _noise(self, picked: Sequence[int]) -> float:
        return sum(ways[index].noise for ways, index in zip(self.options, picked, strict=True))

    def plans(self, picked: Sequence[int]) -> list[Plan]:
        """One plan per graph, with the way at index ``picked`` for each row."""
        decisions = [dict(plan) for plan in self.given]
        codes = []
        for (index, row), row_ways, pick in zip(self.chosen, self.ways, picked, strict=True):
            decisions[index][row.key] = row_ways[pick]
            codes.append((row.numel, _bits_per_element(row, row_ways[pick])))
        otherwise = _otherwise(self.config, _mean_bits(codes) or self.config.code_bits)
        return [
            replace(plan, decisions=decided, otherwise=otherwise)
            for plan, decided in zip(self.given, decisions, strict=True)
        ]


def _given(graph: ProbedGraph, config: Config, coarse: Plan) -> Plan:
    """What nobody has to choose for the rows that are codes in ``coarse``: bits by overrides, rows that are recomputed,
    and what was stored for rows of unknown sensitivity. Those to choose are exact.
    """
    lossless = _uniform(graph.rows, config, None)
    decisions = dict(lossless)
    for row in graph.rows:
        probed = graph.plan.get(row.key, UNKNOWN_NOISE)
        if probed.action is Action.RECOMPUTE:
            decisions[row.key] = probed
        elif (coarse[row.key].action, lossless[row.key].action) != (Action.QUANTIZE, Action.KEEP):
            continue
        elif row.key not in graph.profile.sensitivities:
            is_rounded = probed.action is Action.QUANTIZE and config.noise is None
            decisions[row.key] = replace(probed, offload=False) if is_rounded else UNKNOWN_NOISE
    return replace(lossless, decisions=decisions)


def _cautious_noise(row: SavedTensor, way: Decision, profile: Profile) -> float:
    """The noise that ``way`` is chosen by."""
    is_estimate = way.action is Action.SPARSIFY and not row.is_layer_input
    return noise_of(row, way, profile) * (_CAUTION if is_estimate else 1.0)


def _format_of(way: Decision) -> tuple[object, ...]:
    """What ``way`` has in common with the same way to store another row."""
    return way.action, way.bits, way.keep, way.block, way.rows


def _bits_per_element(row: SavedTensor, way: Decision) -> float | None:
    """Of what is stored, scales and zeros of codes left out; None where it is exact."""
    is_part = way.action in (Action.SPARSIFY, Action.SAMPLE)
    return 8 * stored_nbytes(row, way) / row.numel if is_part else way.bits


def _mean_bits(codes: Sequence[tuple[int, float | None]]) -> int | None:
    """Mean bits of tensors, from their elements and bits, rounded down to a width that codes have; exact tensors do not
    count. None when there are no others.
    """
    total = sum(numel for numel, bits in codes if bits is not None)
    mean = sum(numel * bits for numel, bits in codes if bits is not None) / total if total else 0
    return max((bits for bits in CODE_BITS if bits <= mean), default=None)


def _otherwise(config: Config, bits: int | None) -> Decision:
    """What a plan says of tensors that it does not know yet; they are offloaded where all that is worth it is."""
    offload = config.offloads and config.memory is None
    if bits is None:
        return Decision(Action.KEEP, "the settings are lossless", offload=offload)
    reason = "uniform bits"
    return Decision(Action.QUANTIZE, reason, bits=bits, group_size=config.group_size, offload=offload)


def _infeasible(config: Config, least_nbytes: int) -> ConfigError:
    if config.memory is None:
        return ConfigError(
            f"bits must leave at least {CODE_BITS[0]} bit per element to what overrides does not name, got a mean of "
            f"{config.average_bits} with overrides={dict(config.override_pairs)!r}: raise bits or lower the overrides"
        )
    least = "without loss" if config.code_bits is None else f"at {CODE_BITS[0]} bit per element"
    if config.offloads:
        least += f" on the device, where tensors below {OFFLOAD_MIN_NBYTES // 2**20} MiB stay"
    remedies = [] if config.offloads else ["set offload=True"]
    if not config.offloads and config.recompute != "full":
        remedies.append("set recompute='full'")
    return ConfigError(
        f"memory must leave room for what is saved {least}, {least_nbytes} bytes ({least_nbytes / 2**20:.1f} MiB) for "
        f"this model and batch, got {config.memory!r}: "
        f"{', '.join(['give that much', *remedies, 'or make the batch smaller'])}"
    )


def _uniform(rows: Sequence[SavedTensor], config: Config, bits: int | None) -> Plan:
    """Lossless steps, and codes of ``bits`` where these help."""
    decisions = {row.key: decide(row, config, bits) for row in rows}
    return Plan(decisions, otherwise=_otherwise(config, bits), min_numel=config.smallest_numel)
