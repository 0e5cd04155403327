"""Decides what is stored for each saved tensor. Pure: rows and settings in, a plan out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from .allocation import Option, fewest_nbytes, least_noise
from .config import CODE_BITS, EXACT_BITS, Config
from .errors import ConfigError
from .plan import Action, Decision, Plan, Profile, Role, SavedTensor
from .triton_kernels.pack_bool import packed_nbytes
from .triton_kernels.quantize import quantized_nbytes

# Integer types from the narrowest, with the number of non-negative values each holds.
_NARROW_TYPES = ((torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31))

NO_FEWER_BYTES = Decision(Action.KEEP, "codes would take no fewer bytes", by_size=True)


@dataclass(frozen=True)
class ProbedGraph:
    """The rows of one graph with their sensitivities."""

    rows: Sequence[SavedTensor]
    profile: Profile


def make_plan(rows: Sequence[SavedTensor], config: Config, budget_nbytes: float | None = None) -> Plan:
    """One decision per row: lossless steps and uniform bits, those of ``config`` or as many as ``budget_nbytes`` allow.

    Raises:
        ConfigError: When one bit takes too much memory.
    """
    if budget_nbytes is None:
        return _uniform(rows, config, config.code_bits)
    # What is to be probed must be rounded, where exact tensors would fit too.
    for bits in (*(() if config.automatic else (None,)), *reversed(CODE_BITS)):
        plan = _uniform(rows, config, bits)
        if counted_nbytes(rows, plan) <= budget_nbytes:
            return plan
    raise _infeasible(config, counted_nbytes(rows, plan))


def solve(graphs: Sequence[ProbedGraph], config: Config, budget_nbytes: float | None = None) -> list[Plan]:
    """One plan per graph, all solved together: the least noise at the bytes that ``config`` allows, or the fewest bytes
    at its noise.

    Raises:
        ConfigError: When no plan takes so few bytes.
    """
    lossless = [_uniform(graph.rows, config, None) for graph in graphs]
    coarse = [_uniform(graph.rows, config, CODE_BITS[0]) for graph in graphs]
    chosen = [
        (index, row)
        for index, graph in enumerate(graphs)
        for row in graph.rows
        if coarse[index][row.key].action is Action.QUANTIZE and lossless[index][row.key].action is Action.KEEP
    ]
    overridden = [
        (graph, row, plan[row.key])
        for graph, plan in zip(graphs, lossless, strict=True)
        for row in graph.rows
        if plan[row.key].action is Action.QUANTIZE
    ]
    ways = [_ways(row, config) for _, row in chosen]
    options = [
        [Option(stored_nbytes(row, way), _noise(row, way, graphs[index].profile)) for way in row_ways]
        for (index, row), row_ways in zip(chosen, ways, strict=True)
    ]
    if config.noise is not None:
        square = sum(graph.profile.gradient_square for graph in graphs)
        taken = sum(_noise(row, decision, graph.profile) for graph, row, decision in overridden)
        picked = fewest_nbytes(options, config.noise * square - taken)
    else:
        taken = sum(stored_nbytes(row, decision) for _, row, decision in overridden)
        budget = _average_nbytes([*(row for _, row in chosen), *(row for _, row, _ in overridden)], config) - taken
        exact = sum(counted_nbytes(graph.rows, plan) for graph, plan in zip(graphs, lossless, strict=True))
        fixed = exact - sum(row.nbytes for _, row in chosen)
        if budget_nbytes is not None:
            budget = budget_nbytes - fixed
        found = least_noise(options, budget)
        if found is None:
            raise _infeasible(config, fixed + sum(min(way.nbytes for way in row_ways) for row_ways in options))
        picked = found
    decisions = [dict(plan) for plan in lossless]
    for (index, row), row_ways, pick in zip(chosen, ways, picked, strict=True):
        decisions[index][row.key] = row_ways[pick]
    otherwise = _otherwise(config, _mean_bits(decisions, chosen) or config.code_bits)
    return [Plan(plan, otherwise=otherwise, min_numel=config.smallest_numel) for plan in decisions]


def _mean_bits(decisions: Sequence[Mapping[str, Decision]], rows: Sequence[tuple[int, SavedTensor]]) -> int | None:
    """Mean bits of the codes of ``rows``, rounded down to a width that codes have; None when there are none."""
    codes = [(row.numel, decisions[index][row.key].bits) for index, row in rows]
    total = sum(numel for numel, bits in codes if bits is not None)
    mean = sum(numel * bits for numel, bits in codes if bits is not None) / total if total else 0
    return max((bits for bits in CODE_BITS if bits <= mean), default=None)


def _otherwise(config: Config, bits: int | None) -> Decision:
    """What a plan says of tensors that it does not know yet."""
    if bits is None:
        return Decision(Action.KEEP, "the settings are lossless")
    return Decision(Action.QUANTIZE, "uniform bits", bits=bits, group_size=config.group_size)


def _average_nbytes(rows: Sequence[SavedTensor], config: Config) -> float:
    """Bytes of ``rows`` at the mean bits of ``config``."""
    assert config.average_bits is not None
    return sum(_nbytes_at(row, config.average_bits, config.group_size) for row in rows)


def _infeasible(config: Config, least_nbytes: int) -> ConfigError:
    if config.memory is None:
        return ConfigError(
            f"bits must leave at least {CODE_BITS[0]} bit per element to what overrides does not name, got a mean of "
            f"{config.average_bits} with overrides={dict(config.override_pairs)!r}: raise bits or lower the overrides"
        )
    return ConfigError(
        f"memory must leave room for what is saved at {CODE_BITS[0]} bit per element, {least_nbytes} bytes "
        f"({least_nbytes / 2**20:.1f} MiB) for this model and batch, got {config.memory!r}: give that much, or make "
        "the batch smaller"
    )


def counted_nbytes(rows: Sequence[SavedTensor], plan: Plan) -> int:
    """Bytes stored for rows that are there for the backward alone."""
    counted = (row for row in rows if row.role in (Role.ACTIVATION, Role.BOUNDARY))
    return sum(stored_nbytes(row, plan[row.key]) for row in counted)


def _ways(row: SavedTensor, config: Config) -> list[Decision]:
    """What may be stored for a row that can be quantized, from the fewest bytes."""
    reason = "least noise at these bytes"
    if row.role is Role.BOUNDARY:
        reason += "; memory falls once the caller drops the tensor"
    ways = [Decision(Action.QUANTIZE, reason, bits=bits, group_size=config.group_size) for bits in CODE_BITS]
    smaller = [way for way in ways if stored_nbytes(row, way) < row.nbytes]
    return [*smaller, Decision(Action.KEEP, "exact is worth its bytes")]


def _noise(row: SavedTensor, decision: Decision, profile: Profile) -> float:
    """The variance that a decision adds to the gradient."""
    known = profile.sensitivities.get(row.key)
    return 0.0 if decision.bits is None or known is None else known.variance[decision.bits]


def _nbytes_at(row: SavedTensor, bits: float, group_size: int) -> float:
    """Bytes of codes of ``bits``, which may lie between two widths, with scales and zeros."""
    without = quantized_nbytes(row.numel, 0, group_size, row.dtype)
    return without + (quantized_nbytes(row.numel, 8, group_size, row.dtype) - without) * bits / 8


def stored_nbytes(row: SavedTensor, decision: Decision) -> int:
    """Bytes that ``decision`` stores for ``row``, metadata included."""
    match decision.action:
        case Action.KEEP:
            return row.nbytes
        case Action.PACK:
            return packed_nbytes(row.numel)
        case Action.NARROW:
            assert decision.dtype is not None
            return row.numel * decision.dtype.itemsize
        case Action.QUANTIZE:
            assert decision.bits is not None and decision.group_size is not None
            return quantized_nbytes(row.numel, decision.bits, decision.group_size, row.dtype)


def _uniform(rows: Sequence[SavedTensor], config: Config, bits: int | None) -> Plan:
    """Lossless steps, and codes of ``bits`` where these help."""
    decisions = {row.key: decide(row, config, bits) for row in rows}
    return Plan(decisions, otherwise=_otherwise(config, bits), min_numel=config.smallest_numel)


def decide(row: SavedTensor, config: Config, bits: int | None) -> Decision:
    """The decision for one row: lossless steps, and codes of ``bits`` where these help; what settings say for its
    module wins.
    """
    obstacle = row.obstacle or setting_against(row, config)
    if obstacle:
        return Decision(Action.KEEP, obstacle)
    if row.numel < config.smallest_numel:
        return Decision(Action.KEEP, f"it has fewer than {config.smallest_numel} elements (min_numel)", by_size=True)
    if row.dtype == torch.bool:
        return Decision(Action.PACK, "a mask needs one bit per element")
    if not row.dtype.is_floating_point:
        return _narrow(row)
    reason = "uniform bits until the first backward is probed" if config.automatic else "uniform bits"
    override = find_override(row, config)
    if override is not None:
        pattern, bits = override
        reason = f"its module matches {pattern!r} (overrides)"
        if bits == EXACT_BITS:
            return Decision(Action.KEEP, reason)
    if bits is None:
        return Decision(Action.KEEP, "the settings are lossless")
    if row.role is Role.BOUNDARY:
        reason += "; memory falls once the caller drops the tensor"
    decision = Decision(Action.QUANTIZE, reason, bits=bits, group_size=config.group_size)
    if stored_nbytes(row, decision) >= row.nbytes:
        return NO_FEWER_BYTES
    return decision


def find_override(row: SavedTensor, config: Config) -> tuple[str, int] | None:
    """The pattern and bits that ``config.overrides`` sets for the module of ``row``."""
    return next((pair for pair in config.override_pairs if fnmatchcase(row.module, pair[0])), None)


def setting_against(row: SavedTensor, config: Config) -> str:
    """Why settings keep the tensors of this module exact, or an empty string."""
    for pattern in config.skip:
        if fnmatchcase(row.module, pattern):
            return f"its module matches {pattern!r} (skip)"
    return ""


def _narrow(row: SavedTensor) -> Decision:
    if row.index_range is None:
        return Decision(Action.KEEP, "the range of its integers is not known")
    for dtype, num_values in _NARROW_TYPES:
        if row.index_range <= num_values and dtype.itemsize < row.dtype.itemsize:
            return Decision(Action.NARROW, f"its integers lie below {row.index_range}", dtype=dtype)
    return Decision(Action.KEEP, "its integers need their width", by_size=True)
