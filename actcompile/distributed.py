"""Ranks share one plan: rank 0's, which travels through the store that the ranks met at.

No collective is called: ranks may reach this at different times, and not all may. Each graph has an entry of its own in
the store, named by what the graph computes and by the settings, not by sizes, which may differ from rank to rank. Only
the sensitivities of rank 0 count; what other ranks measured is dropped.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.distributed as dist

from ._torch import default_store
from .config import Config
from .errors import CompileError, ConfigError
from .plan import Plan

# How often each graph was solved; all ranks count alike. Never cleared: entries in the store stay, too.
_num_solved: Counter[str] = Counter()


def num_ranks() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def plan_of_rank_0(purpose: str, sites: Sequence[str], config: Config, solve: Callable[[], Plan]) -> Plan:
    """The plan that ``solve`` finds on rank 0, on every rank.

    Args:
        purpose: "train" or "profile": rank 0 may profile alone.
        sites: What the graph computes, as of ``call_sites``.
        config: The settings.
        solve: Finds the plan; called on rank 0 alone.

    Raises:
        ConfigError: When ``solve`` does on rank 0, on every rank.
        CompileError: When no plan arrives within the timeout of the process group.
    """
    if num_ranks() == 1:
        return solve()
    name = f"{purpose}/{_digest(sites, config)}"
    _num_solved[name] += 1
    key = f"{name}/{_num_solved[name]}"
    if dist.get_rank() == 0:
        return _publish(key, solve)
    return _await(key, sites)


def _digest(sites: Sequence[str], config: Config) -> str:
    """The same on all ranks for the same graph; seeds may differ."""
    settings = replace(config, seed=None, lowering="inductor")
    return hashlib.sha256(repr((tuple(sites), settings)).encode()).hexdigest()[:24]


def _publish(key: str, solve: Callable[[], Plan]) -> Plan:
    store = default_store()
    try:
        plan = solve()
    except ConfigError as error:
        store.set(key, json.dumps({"error": str(error)}))
        raise
    store.set(key, json.dumps({"plan": plan.to_json()}))
    return plan


def _await(key: str, sites: Sequence[str]) -> Plan:
    store = default_store()
    try:
        message = json.loads(store.get(key))
    # Every kind of store has an error of its own below this one.
    except RuntimeError as error:
        rank, seconds = dist.get_rank(), store.timeout.total_seconds()  # type: ignore[attr-defined]
        raise CompileError(
            f"all ranks must train the same graphs, got one on rank {rank} for which rank 0 found no plan within "
            f"{seconds:g} s (the timeout of init_process_group): {_describe(sites)}; let rank 0 call the same model in "
            "the same order and run its backward, or give every rank the same plan=, of actcompile.profile"
        ) from error
    if "error" in message:
        raise ConfigError(f"{message['error']} (found by rank 0)")
    return Plan.from_json(message["plan"], "the plan of rank 0")


def _describe(sites: Sequence[str]) -> str:
    return f"{len(sites)} calls, from {sites[0]!r} to {sites[-1]!r}" if sites else "no calls"
