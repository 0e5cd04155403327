"""Follows a plan: at other sizes than those it was made at, and for no other model. Pure.

graph           must compute what one of the plan's graphs computes, call by call; where DDP cuts a model into parts,
                what an uninterrupted run of it computes
known row       gets its decision, which must fit its dtype
by size         what the plan keeps for being small, or stores in the narrowest type, is decided again from the row
recomputed      only where the backward can compute the row from others that are stored; else as unknown
group size      of the plan, where rows have the length for it; else what fits them (decisions.py)
offloaded       where its memory can be freed; rows that the plan does not offload are where it offloads all that is
                worth it
unknown row     was not saved at the sizes of the plan: the partition weighs bytes. It gets the plan's mean bits;
                in a plan made by hand, which does not say what it was made for, it is refused
settings        skip and overrides win over the plan
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch

from .config import Config
from .decisions import (
    NO_FEWER_BYTES,
    decide,
    encoded_nbytes,
    find_override,
    fitting_group_size,
    may_offload,
    may_recompute,
    offloaded,
    setting_against,
)
from .errors import ConfigError
from .plan import LOSSY, Action, Decision, Plan, SavedTensor

_REMEDY = "it was made for another model; make one for this model"

# What each action can store.
_FITS: Mapping[Action, Callable[[torch.dtype], bool]] = {
    Action.KEEP: lambda dtype: True,
    Action.PACK: lambda dtype: dtype == torch.bool,
    Action.NARROW: lambda dtype: dtype in (torch.int64, torch.int32, torch.int16),
    Action.QUANTIZE: lambda dtype: dtype.is_floating_point,
    Action.SPARSIFY: lambda dtype: dtype.is_floating_point,
    Action.SAMPLE: lambda dtype: dtype.is_floating_point,
    # How much it stores is found as a graph is interpreted: no plan holds it.
    Action.PRUNE: lambda dtype: False,
    Action.RECOMPUTE: lambda dtype: dtype.is_floating_point,
}


def follow(plan: Plan, rows: Sequence[SavedTensor], config: Config) -> Plan:
    """``plan`` with decisions for ``rows``, in their order.

    Raises:
        ConfigError: When it does not cover or fit a row: it belongs to another model.
    """
    again = _recomputed(plan, rows, config)
    return replace(plan, decisions={row.key: _placed(plan, row, _followed(plan, row, config, again)) for row in rows})


def _recomputed(plan: Plan, rows: Sequence[SavedTensor], config: Config) -> set[str]:
    """Keys of the rows that the plan recomputes, as far as what they are computed from is stored."""
    chosen: set[str] = set()
    needed: set[str] = set()
    for row in rows:
        planned, how = plan.get(row.key), row.recomputation
        if planned is None or planned.action is not Action.RECOMPUTE or how is None or not may_recompute(row, config):
            continue
        if row.key not in needed and chosen.isdisjoint(how.sources):
            chosen.add(row.key)
            needed.update(how.sources)
    return chosen


def _placed(plan: Plan, row: SavedTensor, decision: Decision) -> Decision:
    """``decision`` for ``row``, on the device or in the host's memory as the plan says."""
    planned, standard = plan.get(row.key), plan.otherwise
    if decision.offload:
        return decision if row.movable else replace(decision, offload=False)
    if decision.action is Action.RECOMPUTE:
        return decision
    is_named = planned is not None and planned.offload and row.movable
    is_covered = standard is not None and standard.offload and may_offload(row)
    return offloaded(decision) if is_named or is_covered else decision


def _followed(plan: Plan, row: SavedTensor, config: Config, again: Collection[str]) -> Decision:
    planned = plan.get(row.key)
    if planned is None:
        return _unknown(plan, row, config)
    if not _FITS[planned.action](row.dtype):
        raise ConfigError(
            f"plan must fit every saved tensor of the model, got {planned.action} for {row.key!r}, which holds "
            f"{str(row.dtype).removeprefix('torch.')}: {_REMEDY}"
        )
    if row.key in again:
        return planned
    if planned.action is Action.KEEP and not planned.by_size and find_override(row, config) is None:
        return planned
    # Sampling is of layers' inputs alone.
    is_possible = planned.action in LOSSY and (planned.action is not Action.SAMPLE or row.num_rows)
    if not is_possible or row.obstacle or _settings_win(row, config):
        return _again(plan, row, config)
    if planned.action is Action.SAMPLE:
        planned = replace(planned, padded=row.is_marked)
    if planned.group_size is not None:
        # Rows may have another length here.
        length = row.numel // row.num_rows if planned.action is Action.SAMPLE else row.row_length
        planned = replace(planned, group_size=fitting_group_size(length, planned.group_size))
    return planned if encoded_nbytes(row, planned) < row.nbytes else NO_FEWER_BYTES


def _unknown(plan: Plan, row: SavedTensor, config: Config) -> Decision:
    if not plan.graphs and not row.obstacle:
        raise ConfigError(
            f"plan must cover every saved tensor of the model, got one without an entry for {row.key!r} "
            f"({row.op} in {row.module or 'the model'}): {_REMEDY}"
        )
    return _again(plan, row, config)


def _settings_win(row: SavedTensor, config: Config) -> bool:
    return bool(setting_against(row, config)) or find_override(row, config) is not None


def _again(plan: Plan, row: SavedTensor, config: Config) -> Decision:
    """A decision from the row alone, with the settings that the plan was made with."""
    least = plan.min_numel if config.min_numel is None else config.min_numel
    standard = plan.otherwise or Decision(Action.KEEP, "the plan keeps it")
    settings = replace(config, plan=None, min_numel=least, group_size=standard.group_size or config.group_size)
    decision = decide(row, settings, standard.bits)
    if decision.action is Action.QUANTIZE and not _settings_win(row, config):
        return replace(decision, reason="the plan's mean bits: at its sizes this was too small, or not stored")
    return decision


class OutdatedPlanError(Exception):
    """What another release of torch saves for a graph is not what a plan was made for: its bits must be found anew."""


def check_rows(plan: Plan, rows: Sequence[SavedTensor]) -> None:
    """Checks that a plan of another torch says what each of ``rows`` gets, where that is not the same for all.

    Raises:
        OutdatedPlanError: Naming a row that it does not know, or knows with another type.
    """
    standard = plan.otherwise
    chosen = {decision.bits for decision in plan.values() if decision.action in LOSSY}
    if not plan.is_of_another_torch or standard is None or chosen <= {standard.bits}:
        return
    for row in rows:
        planned = plan.get(row.key)
        is_chosen = not row.obstacle and row.dtype.is_floating_point and row.numel >= plan.min_numel
        if (is_chosen and planned is None) or (planned is not None and not _FITS[planned.action](row.dtype)):
            raise OutdatedPlanError(f"{row.key!r} is saved")


def settings_anew(plan: Plan, config: Config) -> Config:
    """Settings by which a graph is probed that ``plan`` was not made for, of the same mean bits."""
    standard = plan.otherwise or Decision(Action.KEEP, "")
    least = plan.min_numel if config.min_numel is None else config.min_numel
    size = standard.group_size or config.group_size
    return replace(config, plan=None, auto=True, bits=standard.bits, min_numel=least, group_size=size)


def check_model(plan: Plan, sites: Sequence[str], is_part: bool) -> None:
    """Checks that ``plan`` was made for a graph that computes ``sites``.

    Args:
        plan: The plan.
        sites: What the graph computes, as of ``call_sites``.
        is_part: Whether the graph may be one of several parts of a graph that the plan was made for.

    Raises:
        ConfigError: Naming the first call in which they differ.
        OutdatedPlanError: The same, where another release of torch may trace another graph of the same model.
    """
    if not plan.graphs:
        return
    graph = _inside(sites)
    known = [_inside(other) for other in plan.graphs]
    if graph in known or (is_part and any(_holds(other, graph) for other in known)):
        return
    length, closest = max(((_num_common(other, graph), other) for other in known), key=lambda found: found[0])
    if plan.is_of_another_torch:
        raise OutdatedPlanError(f"the model {_at(graph, length)} where the plan's {_at(closest, length)}")
    raise ConfigError(
        f"plan must be made for this model, got one that {_at(closest, length)} where this model {_at(graph, length)}: "
        f"{_REMEDY}"
    )


def _inside(sites: Sequence[str]) -> tuple[str, ...]:
    """``sites`` from the first to the last that lies in a module: a function around the model may add a loss."""
    positions = [position for position, site in enumerate(sites) if not site.startswith("/")]
    return tuple(sites[positions[0] : positions[-1] + 1] if positions else sites)


def _holds(longer: Sequence[str], shorter: Sequence[str]) -> bool:
    starts = range(len(longer) - len(shorter) + 1)
    return any(tuple(longer[start : start + len(shorter)]) == tuple(shorter) for start in starts)


def _num_common(first: Sequence[str], second: Sequence[str]) -> int:
    """How many sites both begin with."""
    pairs = zip(first, second, strict=False)
    return next((position for position, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _at(sites: Sequence[str], position: int) -> str:
    if not sites:
        return "computes nothing"
    return f"computes {sites[position]!r}" if position < len(sites) else f"ends after {sites[-1]!r}"
