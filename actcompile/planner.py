"""Decides what is stored for each saved tensor. Pure: rows and settings in, a plan out."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from .allocation import Option, fewest_nbytes, least_noise
from .config import CODE_BITS, Config
from .decisions import (
    OFFLOAD_MIN_NBYTES,
    decide,
    host_nbytes,
    may_recompute,
    nbytes_at,
    noise_of,
    stored_nbytes,
    ways_to_store,
)
from .errors import ConfigError
from .plan import Action, Decision, Plan, Profile, Role, SavedTensor

__all__ = ["ProbedGraph", "host_nbytes", "make_plan", "solve", "stored_nbytes"]


@dataclass(frozen=True)
class ProbedGraph:
    """The rows of one graph with their sensitivities, and the keys of those that were recomputed meanwhile."""

    rows: Sequence[SavedTensor]
    profile: Profile
    recomputed: frozenset[str] = frozenset()


def make_plan(rows: Sequence[SavedTensor], config: Config, budget_nbytes: float | None = None) -> Plan:
    """One decision per row: the plan of ``config`` where it brings one, else lossless steps and uniform bits, those of
    ``config`` or as many as ``budget_nbytes`` allow.

    While a graph waits to be probed, nothing is offloaded.

    Raises:
        ConfigError: When the plan that ``config`` brings does not cover the rows, or the least takes too much memory.
    """
    if isinstance(config.plan, Plan):
        return config.plan.select(rows)
    if budget_nbytes is None or (config.automatic and config.offloads):
        uniform = _uniform(rows, config, config.code_bits)
        return _offloaded([rows], [uniform])[0] if config.offloads and not config.automatic else uniform
    widths: list[int | None] = [None] if config.code_bits is None else [None, *reversed(CODE_BITS)]
    for position, bits in enumerate(widths):
        plan = _uniform(rows, config, bits)
        if position >= widths.index(config.code_bits):
            if config.offloads:
                (plan,) = _offloaded([rows], [plan], budget_nbytes)
            elif config.recompute == "full":
                plan = _recomputed(rows, plan, config, budget_nbytes)
        if _counted_nbytes(rows, plan) <= budget_nbytes:
            return plan
    raise _infeasible(config, _counted_nbytes(rows, plan))


def solve(graphs: Sequence[ProbedGraph], config: Config, budget_nbytes: float | None = None) -> list[Plan]:
    """One plan per graph, all solved together: the least noise at the bytes that ``config`` allows, or the fewest bytes
    at its noise. With ``config.offload`` and a budget, codes keep their mean bits as long as offloading suffices. What
    was recomputed while the graphs were probed, stays so: sensitivities hold for that.

    Raises:
        ConfigError: When no plan takes so few bytes.
    """
    choice = _Choice.among(graphs, config)
    rows, mean_bits = [graph.rows for graph in graphs], config.average_bits
    assert mean_bits is not None
    if config.noise is not None:
        noise = config.noise * sum(graph.profile.gradient_square for graph in graphs)
        plans = choice.plans(fewest_nbytes(choice.options, noise))
        return _offloaded(rows, plans) if config.offloads else plans
    if budget_nbytes is None:
        plans = choice.within(choice.nbytes_at(mean_bits))
        return _offloaded(rows, plans) if config.offloads else plans
    room = budget_nbytes - choice.fixed_nbytes
    if not config.offloads:
        if room < choice.least_nbytes:
            raise _infeasible(config, choice.fixed_nbytes + choice.least_nbytes)
        return choice.within(room)
    for bits in (mean_bits, *(bits for bits in reversed(CODE_BITS) if bits < mean_bits)):
        plans = _offloaded(rows, choice.within(max(room, choice.nbytes_at(bits))), budget_nbytes)
        nbytes = sum(map(_counted_nbytes, rows, plans))
        if nbytes <= budget_nbytes:
            return plans
    raise _infeasible(config, nbytes)


@dataclass(frozen=True)
class _Choice:
    """The rows of all graphs that can be quantized: for each its graph, and the ways to store it with their price."""

    config: Config
    lossless: list[Plan]
    chosen: list[tuple[int, SavedTensor]]
    ways: list[list[Decision]]
    options: list[list[Option]]
    fixed_nbytes: int

    @classmethod
    def among(cls, graphs: Sequence[ProbedGraph], config: Config) -> "_Choice":
        """The choice that the rows of ``graphs`` leave."""
        lossless = [_recomputing(_uniform(graph.rows, config, None), graph.recomputed) for graph in graphs]
        coarse = [_uniform(graph.rows, config, CODE_BITS[0]) for graph in graphs]
        chosen = [
            (index, row)
            for index, graph in enumerate(graphs)
            for row in graph.rows
            if coarse[index][row.key].action is Action.QUANTIZE and row.key not in graph.recomputed
        ]
        ways = [ways_to_store(row, config) for _, row in chosen]
        options = [
            [Option(stored_nbytes(row, way), noise_of(row, way, graphs[index].profile)) for way in row_ways]
            for (index, row), row_ways in zip(chosen, ways, strict=True)
        ]
        exact = sum(_counted_nbytes(graph.rows, plan) for graph, plan in zip(graphs, lossless, strict=True))
        return cls(config, lossless, chosen, ways, options, exact - sum(row.nbytes for _, row in chosen))

    @property
    def least_nbytes(self) -> int:
        """Bytes of the smallest way to store each row."""
        return sum(min(way.nbytes for way in row_ways) for row_ways in self.options)

    def nbytes_at(self, bits: float) -> float:
        """Bytes of all rows at codes of ``bits``."""
        return sum(nbytes_at(row, bits, self.config.group_size) for _, row in self.chosen)

    def within(self, nbytes: float) -> list[Plan]:
        """The plans of the least noise; ``nbytes`` must be no less than ``least_nbytes``."""
        picked = least_noise(self.options, nbytes)
        assert picked is not None, nbytes
        return self.plans(picked)

    def plans(self, picked: Sequence[int]) -> list[Plan]:
        """One plan per graph, with the way at index ``picked`` for each row."""
        decisions = [dict(plan) for plan in self.lossless]
        for (index, row), row_ways, pick in zip(self.chosen, self.ways, picked, strict=True):
            decisions[index][row.key] = row_ways[pick]
        return [Plan(plan) for plan in decisions]


def _recomputed(rows: Sequence[SavedTensor], plan: Plan, config: Config, budget_nbytes: float) -> Plan:
    """``plan`` with rows recomputed until the rest fits: those first that cost the fewest operations per byte, and of
    equal ones the largest. What one of them reads is stored.
    """
    left = _counted_nbytes(rows, plan)
    candidates = [
        (row.recomputation.flops / row.nbytes, -row.nbytes, row, row.recomputation.sources)
        for row in rows
        if row.recomputation is not None and may_recompute(row, config)
    ]
    chosen: set[str] = set()
    needed: set[str] = set()
    for _, _, row, sources in sorted(candidates, key=lambda candidate: candidate[:2]):
        if left <= budget_nbytes:
            break
        if row.key not in needed and chosen.isdisjoint(sources):
            chosen.add(row.key)
            needed.update(sources)
            left -= stored_nbytes(row, plan[row.key])
    return _recomputing(plan, chosen)


def _recomputing(plan: Plan, keys: Collection[str]) -> Plan:
    reason = "computed again in the backward: there is no room for it"
    return plan.merged(Plan({key: Decision(Action.RECOMPUTE, reason) for key in plan if key in keys}))


def _offloaded(
    graphs: Sequence[Sequence[SavedTensor]], plans: Sequence[Plan], budget_nbytes: float = -1.0
) -> list[Plan]:
    """``plans`` with what is worth a transfer moved to the host, the largest first, until the rest fits the budget."""
    decisions = [dict(plan) for plan in plans]
    device_nbytes = sum(map(_counted_nbytes, graphs, plans))
    candidates = [
        (stored_nbytes(row, plan[row.key]), index, row.key)
        for index, (rows, plan) in enumerate(zip(graphs, plans, strict=True))
        for row in rows
        if row.movable and row.nbytes >= OFFLOAD_MIN_NBYTES
    ]
    for nbytes, index, key in sorted(candidates, key=lambda candidate: -candidate[0]):
        if device_nbytes <= budget_nbytes:
            break
        decision = decisions[index][key]
        reason = f"{decision.reason}; in the host's memory meanwhile"
        decisions[index][key] = replace(decision, offload=True, reason=reason)
        device_nbytes -= nbytes
    return [Plan(plan) for plan in decisions]


def _infeasible(config: Config, least_nbytes: int) -> ConfigError:
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


def _counted_nbytes(rows: Sequence[SavedTensor], plan: Plan) -> int:
    """Bytes of the device stored for rows that are there for the backward alone."""
    counted = (row for row in rows if row.role in (Role.ACTIVATION, Role.BOUNDARY))
    return sum(stored_nbytes(row, plan[row.key]) for row in counted)


def _uniform(rows: Sequence[SavedTensor], config: Config, bits: int | None) -> Plan:
    """Lossless steps, and codes of ``bits`` where these help."""
    return Plan({row.key: decide(row, config, bits) for row in rows})
