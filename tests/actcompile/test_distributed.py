"""Two processes with data of their own: one plan for both, whatever the target, and errors that reach every rank."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from actcompile import Config, Plan
from actcompile.distributed import num_ranks, plan_of_rank_0

from .ranks import NUM_RANKS, TARGETS

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")


def run_ranks(case: str, folder: Path) -> list[dict[str, Any]]:
    """What each rank printed last."""
    command = [sys.executable, "-m", "tests.actcompile.ranks", case]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(NUM_RANKS)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]


def test_ranks_hold_one_plan(tmp_path: Path) -> None:
    """DDP with parts of a model: bits, memory and noise as targets, three steps and one of another size."""
    first, second = run_ranks("train", tmp_path)
    for name in TARGETS:
        mine, other = first[name], second[name]
        assert mine["num_graphs"] == 3, name
        assert mine["num_probed"] == other["num_probed"] == 3, name
        # Each rank measured its own data; rank 0's count.
        assert mine["sensitivities"] != other["sensitivities"]
        assert mine["plans"] == other["plans"]
        assert mine["gradients"] == other["gradients"]
        assert mine["norm"] > 0
    assert len(set(first["bits"]["bits"])) > 1


def test_errors_reach_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks("fail", tmp_path)
    assert first["out_of_reach"] == "ConfigError: no plan takes so few bytes"
    assert second["out_of_reach"] == "ConfigError: no plan takes so few bytes (found by rank 0)"
    assert first["profiled"] == second["profiled"]
    # A graph that rank 0 never trains, and what the message advises.
    assert second["alone"].startswith("CompileError: all ranks must train the same graphs, got one on rank 1")
    assert "within 3 s (the timeout of init_process_group): 3 calls, from '0/linear' to '2/linear'" in second["alone"]
    assert second["with_plan"] == ""


def test_one_process_asks_nobody() -> None:
    assert num_ranks() == 1
    plan = Plan()
    assert plan_of_rank_0("train", ["0/linear"], Config(), lambda: plan) is plan
