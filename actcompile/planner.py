"""Decides what is stored for each saved tensor. Pure: rows and settings in, a plan out."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from .config import Config
from .plan import Action, Decision, Plan, Role, SavedTensor
from .triton_kernels.pack_bool import packed_nbytes
from .triton_kernels.quantize import quantized_nbytes

# Integer types from the narrowest, with the number of non-negative values each holds.
_NARROW_TYPES = ((torch.uint8, 2**8), (torch.int16, 2**15), (torch.int32, 2**31))


def make_plan(rows: Sequence[SavedTensor], config: Config) -> Plan:
    """One decision per row: the plan of ``config`` where it brings one, else lossless steps and uniform bits.

    Raises:
        ConfigError: When the plan that ``config`` brings does not cover the rows.
    """
    if isinstance(config.plan, Plan):
        return config.plan.select(rows)
    return Plan({row.key: _decide(row, config) for row in rows})


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
