"""Decides what is stored for each saved tensor. Pure: rows and settings in, a plan out."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from .allocation import Option, least_noise
from .config import CODE_BITS, Config
from .plan import Action, Decision, Plan, Profile, Role, SavedTensor
from .triton_kernels.pack_bool import packed_nbytes
from .triton_kernels.quantize import quantized_nbytes

# Integer types from the narrowest, with the number of non-negative values each holds.
_NARROW_TYPES = ((torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31))


def make_plan(rows: Sequence[SavedTensor], config: Config, profile: Profile | None = None) -> Plan:
    """One decision per row: the plan of ``config`` where it brings one, else lossless steps and bits.

    Bits are the same for all tensors until a profile tells how much each matters; then those whose noise adds up to the
    least at as many bytes.

    Raises:
        ConfigError: When the plan that ``config`` brings does not cover the rows.
    """
    if isinstance(config.plan, Plan):
        return config.plan.select(rows)
    uniform = {row.key: _decide(row, config) for row in rows}
    return Plan(uniform if profile is None else {**uniform, **_allocate(rows, uniform, config, profile)})


def _allocate(
    rows: Sequence[SavedTensor], uniform: Mapping[str, Decision], config: Config, profile: Profile
) -> dict[str, Decision]:
    """Decisions for the rows that uniform bits quantize."""
    chosen = [row for row in rows if uniform[row.key].action is Action.QUANTIZE]
    ways = [_ways(row, config) for row in chosen]
    options = [
        [Option(stored_nbytes(row, decision), _noise(row, decision, profile)) for decision in decisions]
        for row, decisions in zip(chosen, ways, strict=True)
    ]
    assert config.average_bits is not None
    budget = sum(_nbytes_at(row, config.average_bits, config.group_size) for row in chosen)
    picked = least_noise(options, budget)
    assert picked is not None, "uniform bits fit"
    return {row.key: decisions[pick] for row, decisions, pick in zip(chosen, ways, picked, strict=True)}


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


def _decide(row: SavedTensor, config: Config) -> Decision:
    obstacle = row.obstacle or _setting_against(row, config)
    if obstacle:
        return Decision(Action.KEEP, obstacle)
    if row.dtype == torch.bool:
        return Decision(Action.PACK, "a mask needs one bit per element")
    if not row.dtype.is_floating_point:
        return _narrow(row)
    if config.code_bits is None:
        return Decision(Action.KEEP, "the settings are lossless")
    reason = "uniform bits"
    if row.role is Role.BOUNDARY:
        reason += "; memory falls once the caller drops the tensor"
    decision = Decision(Action.QUANTIZE, reason, bits=config.code_bits, group_size=config.group_size)
    if stored_nbytes(row, decision) >= row.nbytes:
        return Decision(Action.KEEP, "codes would take no fewer bytes")
    return decision


def _setting_against(row: SavedTensor, config: Config) -> str:
    if row.numel < config.smallest_numel:
        return f"it has fewer than {config.smallest_numel} elements (min_numel)"
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
    return Decision(Action.KEEP, "its integers need their width")
