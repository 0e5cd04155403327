"""The largest batch: what ``max_batch_size`` predicts against what the meter finds by bisection.

The bisection compiles a step for each batch that it tries, as training with that batch would, and takes parameters,
buffers, the batch and the measured peak of a step that starts without gradients.
"""

import argparse
import bisect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import actcompile
from actcompile._config_checks import parse_nbytes
from actcompile.meter import measure_phases

from .harness import append_row, pick_device
from .models import Batch, Workload, make_bert, make_gpt, make_resnet

EXAMPLE_BATCH = 4

# Model -> how it is made, and the memory it is given.
MODELS: Mapping[str, tuple[Callable[..., Workload], Mapping[str, Any], str]] = {
    "gpt": (make_gpt, {"layers": 2, "width": 128, "ff": 512, "tokens": 128}, "64MiB"),
    "bert": (make_bert, {"layers": 2, "tokens": 64}, "96MiB"),
    "resnet": (make_resnet, {"size": 32}, "48MiB"),
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "4 bits, cheap": {"bits": 4},
    "4 bits, none": {"bits": 4, "recompute": "none"},
    "L0": {"level": "L0"},
}


def compare(model: str, settings: str, memory: str) -> dict[str, Any]:
    """Predicts and bisects for one model and one setting."""
    torch._dynamo.reset()
    make, sizes, _ = MODELS[model]
    workload = make(**sizes, batch=EXAMPLE_BATCH, device=pick_device())
    config = actcompile.Config(**SETTINGS[settings])

    def step(*batch: Tensor) -> Tensor:
        return workload.loss(workload.model, batch)

    predicted = actcompile.max_batch_size(step, *workload.batch, memory=memory, config=config)
    nbytes = parse_nbytes(memory)

    def fits(size: int) -> bool:
        torch._dynamo.reset()
        actcompile.reset()
        compiled = torch.compile(step, backend="act", dynamic=False, options={"config": config})
        return training_nbytes(workload, compiled, resized(workload.batch, size)) <= nbytes

    bisected = largest(fits, predicted)
    return {
        "model": model,
        "settings": settings,
        "memory_nbytes": nbytes,
        "predicted": predicted,
        "bisected": bisected,
        "ratio": round(predicted / bisected, 4),
    }


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest number that ``fits``, 0 when none does; looked for around ``guess`` first."""
    low, high, width = 0, guess, max(1, guess // 16)
    if fits(guess):
        low, high = guess, guess + width
        while fits(high):
            low, width = high, 2 * width
            high = low + width
    else:
        while high - width > 0 and not fits(high - width):
            high, width = high - width, 2 * width
        low = max(0, high - width)
    return low + bisect.bisect_left(range(low + 1, high), True, key=lambda size: not fits(size))


def training_nbytes(workload: Workload, compiled: Callable[..., Tensor], batch: Batch) -> int:
    """The most bytes at once while training on ``batch``, parameters and batch included."""
    lasting = sum(value.nbytes for value in (*workload.model.parameters(), *workload.model.buffers(), *batch))
    step_peak(workload, compiled, batch)
    return lasting + step_peak(workload, compiled, batch)


def resized(batch: Batch, size: int) -> Batch:
    """``batch`` repeated or cut to ``size`` samples."""
    return tuple(value[torch.arange(size, device=value.device) % value.shape[0]] for value in batch)


def step_peak(workload: Workload, compiled: Callable[..., Tensor], batch: Batch) -> int:
    """The most bytes alive at once in one step, the batch and parameters left out."""
    losses: list[Tensor] = []
    workload.model.zero_grad(set_to_none=True)
    phases = measure_phases([lambda: losses.append(compiled(*batch)), lambda: losses.pop().backward()], batch[0].device)
    workload.model.zero_grad(set_to_none=True)
    return max(phase.peak_nbytes for phase in phases)


def main() -> None:
    """Compares, appends rows and prints them."""
    parser = argparse.ArgumentParser("python -m bench.max_batch", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="what to train")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="what to store")
    parser.add_argument("--memory", help="of the device; by default a size that suits each model")
    options = parser.parse_args()
    rows = []
    for model in options.models:
        for settings in options.settings:
            rows.append(compare(model, settings, options.memory or MODELS[model][2]))
            append_row("max_batch", rows[-1])
            print(
                f"{model}, {settings}: predicted {rows[-1]['predicted']}, bisected {rows[-1]['bisected']}", flush=True
            )
    print(tabulate(rows, headers="keys"))


if __name__ == "__main__":
    main()
