"""What one of several ranks does in test_distributed.

``python -m tests.actcompile.ranks CASE RANK STORE`` prints what the case found as JSON.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import actcompile
from actcompile import CompileError, ConfigError, records, solving

NUM_RANKS = 2
TARGETS: dict[str, dict[str, Any]] = {
    "bits": {"bits": 3, "auto": True},
    "memory": {"memory": 0.12},
    "noise": {"noise": 0.01},
}


class Model(nn.Module):
    """Large enough for DDP to cut it into parts of 1 MiB of parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 512, 1024, 512, 8)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 64] -> [B, 8]."""
        for layer in self.layers:
            x = torch.sin(layer(x)) * torch.sigmoid(x.mean())
        return x


def compiled(model: nn.Module, **options: object) -> Callable[..., Tensor]:
    return torch.compile(model, backend="act", options={"lowering": "eager", "min_numel": 0, **options})


def train(rank: int) -> dict[str, object]:
    """Three steps on data of this rank's own, for each target, then one of another size."""
    found: dict[str, object] = {}
    for name, target in TARGETS.items():
        actcompile.reset()
        torch.manual_seed(0)
        model = Model()
        call = compiled(DistributedDataParallel(model, bucket_cap_mb=1), **target)
        torch.manual_seed(1 + rank)
        for batch in (16, 16, 16, 24):
            model.zero_grad()
            # Ranks whose data differ in scale, so that each would choose other bits.
            call((1 + 20 * rank) * torch.randn(batch, 64)).square().mean().backward()
        known = records.finished()
        probed = [record for record in records._records if record.own_profile is not None]
        gradients = torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])
        found[name] = {
            "num_graphs": len(known),
            "num_probed": len(probed),
            "bits": [decision.bits for record in known for decision in record.plan.values() if decision.bits],
            "plans": [record.plan.to_json() for record in known],
            "sensitivities": [
                value.variance[4]
                for record in probed
                if record.profile
                for value in record.profile.sensitivities.values()
            ],
            "gradients": hashlib.sha256(gradients.numpy().tobytes()).hexdigest(),
            "norm": float(gradients.norm()),
        }
    return found


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))


def step_twice(**options: object) -> str:
    """Two steps without DDP; the message of what they raise."""
    call = compiled(layers(), **options)
    try:
        for _ in range(2):
            call(torch.randn(16, 64)).square().mean().backward()
    except (CompileError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fail(rank: int) -> dict[str, object]:
    """A target that rank 0 finds to be out of reach, and a graph that it never trains."""
    with mock.patch.object(solving, "solve", side_effect=ConfigError("no plan takes so few bytes")):
        found = {"out_of_reach": step_twice(auto=True)}
    actcompile.reset()
    plan = actcompile.profile(layers(), (1 + 20 * rank) * torch.randn(4, 64), loss=torch.sum)
    found["profiled"] = plan.to_json()
    if rank > 0:
        found["alone"] = step_twice(auto=True, bits=2)
        actcompile.reset()
        found["with_plan"] = step_twice(plan=plan)
    return found


CASES: dict[str, Callable[[int], dict[str, object]]] = {"train": train, "fail": fail}


def main(case: str, rank: str, store: str) -> None:
    """Meets the other rank at ``store`` and prints what ``case`` found."""
    torch.set_num_threads(1)
    file = dist.FileStore(store, NUM_RANKS)
    dist.init_process_group("gloo", store=file, rank=int(rank), world_size=NUM_RANKS)
    if case == "fail":
        file.set_timeout(timedelta(seconds=3))
    print(json.dumps(CASES[case](int(rank))))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
