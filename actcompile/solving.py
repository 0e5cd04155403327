"""From what probing found to plans: which graphs are solved together, for which sizes and ranks, and when again."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from . import records
from .distributed import num_ranks, plan_of_rank_0
from .following import follow
from .overflow import step_nbytes
from .plan import Plan, SavedTensor
from .planner import ProbedGraph, counted_nbytes, host_nbytes, predicted_noise, solve, uniform_within
from .records import GraphRecord

log = logging.getLogger(__name__)

# A new plan has to have this many times less noise to be worth compiling again.
_WORTH = 1.25
# Noise this many times above its target calls for more bits.
_DRIFT = 1.25


def found_plan(record: GraphRecord) -> Plan | None:
    """The plan of a graph as soon as it is known: from its own probe, or from that of the same code at other sizes.

    Raises:
        ConfigError: When no plan reaches the target.
        CompileError: When rank 0's plan does not arrive.
    """
    known = records.of_settings(record.config)
    earlier = next((other for other in reversed(known) if _serves(other, record)), None)
    if earlier is None:
        return None
    plan = solved_plan(earlier)
    if earlier is record:
        return plan
    record.inherited = earlier.profile
    followed = follow(plan, record.rows, record.config)
    budget = _budget_again(record, earlier)
    if budget is None or counted_nbytes(record.rows, followed) <= budget:
        return followed
    if num_ranks() > 1:
        log.warning("a batch of this size takes more than memory=%r: ranks keep one plan", record.config.memory)
        return followed
    assert earlier.profile is not None
    again = ProbedGraph(record.rows, earlier.profile, followed)
    return replace(solve([again], record.config, budget)[0], graphs=plan.graphs)


def replan(record: GraphRecord) -> None:
    """Gives new plans to all graphs of a step that stored more than ``memory`` in the latest one that was complete, as
    when graphs are called several times, or others were compiled meanwhile.

    Raises:
        ConfigError: When no plan fits.
    """
    config, budget = record.config, record.budget_nbytes()
    # A share of every call is one of all of them; a plan that was given is followed as it is.
    if budget is None or isinstance(config.memory, float) or config.plan is not None:
        return
    graphs, counts = _companions(record)
    nbytes = step_nbytes([other.rows for other in graphs], [other.plan for other in graphs], counts)
    if nbytes <= budget:
        return
    if num_ranks() > 1:
        log.warning(
            "the calls of a step take %d bytes together, more than memory=%r: ranks keep one plan", nbytes, budget
        )
        return
    if config.automatic:
        for other in graphs:
            other.solved = None
        return
    plans = uniform_within([other.rows for other in graphs], counts, config, budget)
    for other, plan in zip(graphs, plans, strict=True):
        other.solved = replace(plan, graphs=(other.sites,))


def _companions(record: GraphRecord) -> tuple[list[GraphRecord], list[int]]:
    """Graphs with the same settings that a step calls, and how often."""
    known = {other: count for other, count in record.companions.items() if other.config == record.config}
    return list(known), list(known.values())


def solved_again(record: GraphRecord, current: Plan, num_steps: int) -> Plan | None:
    """A plan by the latest probe, when it is so much better than the one in use that compiling again is worth it.

    It takes no more bytes than that one; where noise is the target, as many as the target needs now. Logs one line.

    Args:
        record: A graph that was probed again.
        current: The plan in use.
        num_steps: Training steps since the probe before.

    Raises:
        CompileError: When rank 0's plan does not arrive.
    """
    found = plan_of_rank_0("train", record.sites, record.config, lambda: _better(record, current, num_steps))
    followed = follow(found, record.rows, record.config)
    if followed.decisions == current.decisions:
        return None
    record.solved = followed
    return followed


def _better(record: GraphRecord, current: Plan, num_steps: int) -> Plan:
    """``current``, or a plan that is worth compiling for."""
    # By itself: of a graph that hands all on, noise has the same share in what earlier graphs make of it.
    profile, target = None if record.probe is None else record.probe.profile, record.config.noise
    assert profile is not None
    budget = None if target is not None else counted_nbytes(record.rows, current)
    plan = solve([ProbedGraph(record.rows, profile, current)], record.config, budget)[0]
    before, after = (predicted_noise(record.rows, p, profile) / profile.gradient_square for p in (current, plan))
    if target is None:
        verdict = "new bits" if before > _WORTH * after else ""
    elif before > _DRIFT * target:
        verdict = f"the target of {target:g} is missed, bits go up"
    else:
        is_smaller = counted_nbytes(record.rows, current) > _WORTH * counted_nbytes(record.rows, plan)
        verdict = f"fewer bits reach the target of {target:g}" if is_smaller else ""
    log.info(
        "profiled again after %d steps: predicted noise %.2e of the gradient, %.2e with a new plan: %s",
        num_steps,
        before,
        after,
        verdict or "the plan stays",
    )
    return replace(plan, graphs=(record.sites,)) if verdict else current


def _budget_again(record: GraphRecord, earlier: GraphRecord) -> float | None:
    """Bytes for the graph of ``earlier`` at the sizes of ``record``: its share, whatever sizes others have by now."""
    budget = record.budget_nbytes()
    if budget is None:
        return None
    known = [(o, o.solved) for o in records.of_settings(record.config) if o.solved is not None]
    if isinstance(record.config.memory, float) and earlier.baseline_nbytes:
        total = sum(other.num_calls * (other.budget_nbytes() or 0) for other, _ in known)
        budget = total * record.baseline_nbytes / earlier.baseline_nbytes
    stored = sum(other.num_calls * _all_nbytes(other.rows, plan) for other, plan in known)
    return budget * _all_nbytes(earlier.rows, solved_plan(earlier)) / stored if stored else budget


def _all_nbytes(rows: Sequence[SavedTensor], plan: Plan) -> int:
    """Bytes stored on the device and in the host's memory, where a plan may move all that a graph saves."""
    moved = sum(host_nbytes(row, plan[row.key]) for row in rows)
    return counted_nbytes(rows, plan) + moved


def _serves(other: GraphRecord, record: GraphRecord) -> bool:
    """Whether what probing ``other`` found holds for ``record``: itself, or the same code at other sizes."""
    if other.own_profile is None:
        return False
    # A tensor that matters to no gradient here, or is there anyway, may be another's only copy there.
    is_same = other.sites == record.sites and other.need_gradients == record.need_gradients
    return other is record or (is_same and record.replaces(other))


def solved_plan(record: GraphRecord, purpose: str = "train") -> Plan:
    """The plan of a graph that was probed, solved once; with several ranks it is what rank 0 found for ``purpose``.

    Raises:
        ConfigError: When no plan reaches the target.
        CompileError: When rank 0's plan does not arrive.
    """
    if record.solved is None:
        plan = plan_of_rank_0(purpose, record.sites, record.config, lambda: _solve(record))
        record.solved = follow(plan, record.rows, record.config)
    return record.solved


def _solve(record: GraphRecord) -> Plan:
    """The plan of a probed graph, solved together with those of the other graphs with the same settings."""
    together = [other for other in records.of_settings(record.config) if other.own_profile is not None]
    graphs = [
        ProbedGraph(o.rows, o.own_profile, o.plan, record.companions.get(o, o.num_calls))
        for o in together
        if o.own_profile is not None
    ]
    # A share of each call, or one number of bytes for all of them.
    shares = [graph.num_calls * (o.budget_nbytes() or 0) for graph, o in zip(graphs, together, strict=True)]
    budget = sum(shares) if isinstance(record.config.memory, float) else record.budget_nbytes()
    plan = solve(graphs, record.config, budget)[together.index(record)]
    return replace(plan, graphs=(record.sites,))
