"""Takes what does not fit off the device: to the host's memory, or recomputed in the backward. Pure."""

import math
from collections.abc import Sequence
from dataclasses import replace

from .config import Config
from .decisions import RECOMPUTED, may_offload, may_recompute, offloaded, stored_nbytes
from .plan import Plan, Role, SavedTensor


def counted_nbytes(rows: Sequence[SavedTensor], plan: Plan) -> int:
    """Bytes of the device stored for rows that are there for the backward alone."""
    counted = (row for row in rows if row.role in (Role.ACTIVATION, Role.BOUNDARY))
    return sum(stored_nbytes(row, plan[row.key]) for row in counted)


def with_recomputed(rows: Sequence[SavedTensor], plan: Plan, config: Config, budget_nbytes: float) -> Plan:
    """``plan`` with rows recomputed until the rest fits: those first that cost the fewest operations per byte, and of
    equal ones the largest. What one of them reads is stored.
    """
    left = counted_nbytes(rows, plan)
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
    return plan.merged(Plan(dict.fromkeys(chosen, RECOMPUTED)))


def with_offloaded(
    graphs: Sequence[Sequence[SavedTensor]], plans: Sequence[Plan], budget_nbytes: float = -math.inf
) -> list[Plan]:
    """``plans`` with what is worth a transfer moved to the host, the largest first, until the rest fits the budget."""
    decisions = [dict(plan) for plan in plans]
    device_nbytes = sum(map(counted_nbytes, graphs, plans))
    candidates = [
        (stored_nbytes(row, plan[row.key]), index, row.key)
        for index, (rows, plan) in enumerate(zip(graphs, plans, strict=True))
        for row in rows
        if may_offload(row)
    ]
    for nbytes, index, key in sorted(candidates, key=lambda candidate: -candidate[0]):
        if device_nbytes <= budget_nbytes:
            break
        decisions[index][key] = offloaded(decisions[index][key])
        device_nbytes -= nbytes
    return [replace(plan, decisions=moved) for plan, moved in zip(plans, decisions, strict=True)]
