"""How close compressed gradients are to exact ones, and whether models train: ``python -m bench.gradients``.

On real data (bench/data.py). For each model, dropout off, at initialization and after some training steps in eager, on
a batch not seen before: the relative error at 8 bits, the cosine over all parameters and the smallest cosine of one
parameter at 4 bits, all against eager; the relative error of the lossless level against torch.compile. Then the loss of
a training run beside that of torch.compile, the mean of the last tenth of its steps.

A parameter whose exact gradient is zero but for rounding (the bias of attention's keys, biases in front of a batch
normalization) has no direction to compare and is left out.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from .data import real_batches
from .harness import append_row
from .models import WORKLOADS, Batch, Workload

# Norm, relative to that of all gradients together, below which a gradient is rounding noise.
_ZERO = 1e-6

OPTIMIZERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "gpt": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "llama": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "bert": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    "resnet": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "resnet18": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "vit": lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
    "gcn": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, weight_decay=5e-4),
}
_COLUMNS = ("model", "moment", "rel. error 8 bits", "cosine 4 bits", "smallest cosine", "of", "rel. error L0")


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of ``loss`` by parameter name."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def flat(values: dict[str, Tensor]) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([value.flatten().double() for value in values.values()])


def relative_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """|found - exact| / |exact| over all parameters."""
    return float((flat(found) - flat(exact)).norm() / flat(exact).norm())


def cosine(found: Tensor, exact: Tensor) -> float:
    """The cosine of the angle between two gradients."""
    return float(nn.functional.cosine_similarity(found.flatten().double(), exact.flatten().double(), 0))


def compiled(workload: Workload, batch: Batch, backend: str, **options: Any) -> dict[str, Tensor]:
    """Gradients through a fresh compilation."""
    torch._dynamo.reset()
    function = torch.compile(workload.model, backend=backend, **({"options": options} if options else {}))
    return gradients(workload.model, workload.loss(function, batch))


def compare(name: str, moment: str, workload: Workload, batch: Batch, lowering: str) -> dict[str, object]:
    """One row of the table."""
    exact = gradients(workload.model, workload.loss(workload.model, batch))
    eight = compiled(workload, batch, "act", bits=8, lowering=lowering)
    four = compiled(workload, batch, "act", bits=4, lowering=lowering)
    lossless = compiled(workload, batch, "act", level="L0", lowering=lowering)
    plain = compiled(workload, batch, "inductor" if lowering == "inductor" else "aot_eager")
    norm = flat(exact).norm()
    cosines = {name: cosine(four[name], value) for name, value in exact.items() if value.norm() > _ZERO * norm}
    worst = min(cosines, key=cosines.__getitem__)
    figures = (
        relative_error(eight, exact),
        cosine(flat(four), flat(exact)),
        cosines[worst],
        worst,
        relative_error(lossless, plain),
    )
    return dict(zip(_COLUMNS, (name, moment, *figures), strict=True))


def train(name: str, workload: Workload, batches: Iterator[Batch], steps: int, call: Callable[..., Any]) -> list[float]:
    """Losses of ``steps`` steps, each on a new batch."""
    optimizer = OPTIMIZERS[name](workload.model.parameters())
    losses = []
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = workload.loss(call, next(batches))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_both(name: str, steps: int, folder: Path) -> list[object]:
    """First and last losses of a run with torch.compile and of one with compressed activations at 4 bits."""
    cells: list[object] = [name]
    for backend in ("inductor", "act"):
        torch._dynamo.reset()
        workload = WORKLOADS[name]()
        batches = real_batches(name, workload.batch, folder)
        losses = train(name, workload, batches, steps, torch.compile(workload.model, backend=backend))
        cells += [losses[0], statistics.fmean(losses[-max(1, steps // 10) :])]
    return cells


def without_dropout(workload: Workload) -> Workload:
    """``workload`` with every dropout switched off."""
    for module in workload.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=["gpt", "bert", "resnet"])
    parser.add_argument("--steps", type=int, default=50, help="training steps before the second comparison")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with glue/SST-2 and cifar10")
    parser.add_argument("--lowering", choices=("inductor", "eager"), default="inductor")
    arguments = parser.parse_args()
    rows, runs = [], []
    for name in arguments.models:
        workload = without_dropout(WORKLOADS[name]())
        batches = real_batches(name, workload.batch, arguments.data)
        for moment in ("initialization", f"after {arguments.steps} steps"):
            if moment != "initialization":
                train(name, workload, batches, arguments.steps, workload.model)
            before = copy.deepcopy(workload.model.state_dict())
            row = compare(name, moment, workload, next(batches), arguments.lowering)
            workload.model.load_state_dict(before)
            append_row("gradients", row)
            rows.append(row)
            print(tabulate([row], headers="keys", floatfmt=".5f"), flush=True)
        if arguments.lowering == "inductor":
            runs.append(train_both(name, arguments.steps, arguments.data))
    print(tabulate(rows, headers="keys", floatfmt=".5f"))
    headers = ("model", "torch.compile, first loss", "last", "act 4 bits, first loss", "last")
    print(tabulate(runs, headers, floatfmt=".4f"))


if __name__ == "__main__":
    main()
