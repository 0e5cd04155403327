"""Peak memory of a GPT and how it grows with the number of blocks.

The marginal peak of a block is (peak at L=4 - peak at L=2) / 2 minus the gradients of the block's parameters, which
pile up during any backward. U is one residual stream: batch x tokens x width x 4 bytes.
"""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from actcompile.meter import measure_phases

from .harness import MIB, append_row, compile_act, pick_device
from .models import make_gpt

WIDTH = 256
VOCABULARY = 1000

VARIANTS: Mapping[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "torch.compile": torch.compile,
    "checkpoint": torch.compile,
    "act4 none": lambda model: compile_act(model, bits=4, recompute="none"),
    "act4 cheap": lambda model: compile_act(model, bits=4, recompute="cheap"),
}


def measure(variant: str, layers: int, batch: int, tokens: int) -> dict[str, Any]:
    """Bytes of one step: all counted from before the forward, with no gradients there yet."""
    torch._dynamo.reset()
    device = pick_device()
    workload = make_gpt(
        layers=layers,
        width=WIDTH,
        vocabulary=VOCABULARY,
        batch=batch,
        tokens=tokens,
        checkpointed=variant == "checkpoint",
        device=device,
    )
    compiled = VARIANTS[variant](workload.model)
    workload.loss(compiled).backward()
    workload.model.zero_grad(set_to_none=True)
    losses = []
    forward, backward = measure_phases(
        [lambda: losses.append(workload.loss(compiled)), lambda: losses.pop().backward()], device
    )
    block = workload.model.blocks[0]
    return {
        "variant": variant,
        "layers": layers,
        "batch": batch,
        "tokens": tokens,
        "forward_peak_nbytes": forward.peak_nbytes,
        "backward_peak_nbytes": backward.peak_nbytes,
        "stored_nbytes": forward.end_nbytes,
        "block_grad_nbytes": sum(parameter.nbytes for parameter in block.parameters()),
    }


def step_peak(row: Mapping[str, Any]) -> int:
    """The peak of forward and backward together."""
    return max(row["forward_peak_nbytes"], row["backward_peak_nbytes"])


def marginal_rows(rows: list[dict[str, Any]], unit: int) -> list[list[str]]:
    """Per variant that was measured at two depths: what one more block adds, in ``unit`` bytes."""
    table = []
    base: float | None = None
    for variant in VARIANTS:
        known = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["layers"])[:2]
        if len(known) < 2:
            continue
        low, high = known
        blocks = high["layers"] - low["layers"]
        peak = (step_peak(high) - step_peak(low)) / blocks - high["block_grad_nbytes"]
        forward = (high["forward_peak_nbytes"] - low["forward_peak_nbytes"]) / blocks
        stored = (high["stored_nbytes"] - low["stored_nbytes"]) / blocks
        base = peak if variant == "torch.compile" else base
        against = f"{peak / base:.3f}x" if base else ""
        cells = (f"{forward / unit:.2f}", f"{peak / unit:.2f}", f"{stored / unit:.2f}", f"{peak / stored:.2f}")
        table.append([variant, *cells, against])
    return table


def absolute_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Per row: forward, backward and stored bytes of the whole step."""
    base = {row["layers"]: step_peak(row) for row in rows if row["variant"] == "torch.compile"}
    table = []
    for row in sorted(rows, key=lambda row: row["layers"]):
        names = ("forward_peak_nbytes", "backward_peak_nbytes", "stored_nbytes")
        ratio = f"{base[row['layers']] / step_peak(row):.2f}x" if row["layers"] in base else ""
        table.append([row["layers"], row["variant"], *(f"{row[name] / MIB:.1f}" for name in names), ratio])
    return table


def main() -> None:
    """Measures, appends rows and prints both tables."""
    parser = argparse.ArgumentParser("python -m bench.peak", description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8], help="numbers of blocks")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what to measure")
    parser.add_argument("--batch", type=int, default=32, help="sequences")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per sequence")
    options = parser.parse_args()
    rows = []
    for layers in options.layers:
        for variant in options.variants:
            rows.append(measure(variant, layers, options.batch, options.tokens))
            append_row("peak", rows[-1])
            print(f"L={layers} {variant}: peak {step_peak(rows[-1]) / MIB:.1f} MiB", flush=True)
    unit = options.batch * options.tokens * WIDTH * 4
    print(f"\nMarginal, per added block, in U = {unit / MIB:g} MiB, parameter gradients left out:")
    headers = ("variant", "forward peak", "peak", "stored", "peak / stored", "of torch.compile's")
    print(tabulate(marginal_rows(rows, unit), headers, disable_numparse=True))
    print("\nWhole step, MiB:")
    headers = ("L", "variant", "forward peak", "backward peak", "stored", "less than torch.compile")
    print(tabulate(absolute_rows(rows), headers, disable_numparse=True))


if __name__ == "__main__":
    main()
