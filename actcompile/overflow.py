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


def step_nbytes(
    graphs: Sequence[Sequence[SavedTensor]], plans: Sequence[Plan], num_calls: Sequence[int] | None = None
) -> int:
    """The same of a step that calls each graph ``num_calls`` times, or once."""
    counts = num_calls or [1] * len(graphs)
    return sum(count * counted_nbytes(rows, plan) for rows, plan, count in zip(graphs, plans, counts, strict=True))


def with_recomputed(
    graphs: Sequence[Sequence[SavedTensor]],
    plans: Sequence[Plan],
    config: Config,
    budget_nbytes: float,
    num_calls: Sequence[int],
) -> list[Plan]:
    """``plans`` with rows recomputed until the rest fits: those first that cost the fewest operations per byte, and of
    equal ones the largest. What one of them reads is stored.
    """
    left = step_nbytes(graphs, plans, num_calls)
    candidates = [
        (row.recomputation.flops / row.nbytes, -row.nbytes, index, row, row.recomputation.sources)
        for index, rows in enumerate(graphs)
        for row in rows
        if row.recomputation is not None and may_recompute(row, config)
    ]
    chosen: list[set[str]] = [set() for _ in graphs]
    needed: list[set[str]] = [set() for _ in graphs]
    for _, _, index, row, sources in sorted(candidates, key=lambda candidate: candidate[:2]):
        if left <= budget_nbytes:
            break
        if row.key not in needed[index] and chosen[index].isdisjoint(sources):
            chosen[index].add(row.key)
            needed[index].update(sources)
            left -= num_calls[index] * stored_nbytes(row, plans[index][row.key])
    return [plan.merged(Plan(dict.fromkeys(keys, RECOMPUTED))) for plan, keys in zip(plans, chosen, strict=True)]


def with_offloaded(
    graphs: Sequence[Sequence[SavedTensor]],
    plans: Sequence[Plan],
    budget_nbytes: float = -math.inf,
    num_calls: Sequence[int] | None = None,
) -> list[Plan]:
    """``plans`` with what is worth a transfer moved to the host, the largest first, until the rest fits the budget."""
    decisions = [dict(plan) for plan in plans]
    counts = num_calls or [1] * len(graphs)
    device_nbytes = step_nbytes(graphs, plans, counts)
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
        device_nbytes -= counts[index] * nbytes
    return [replace(plan, decisions=moved) for plan, moved in zip(plans, decisions, strict=True)]
