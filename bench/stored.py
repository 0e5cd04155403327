"""Bytes that the forward hands to the backward, by the meter and by the report, beside plain torch.compile's."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tabulate import tabulate

import actcompile
from actcompile.meter import measure_peak

from .harness import MIB, append_row, compile_act, pick_device
from .models import Workload, make_bert, make_gpt, make_resnet

MODELS: Mapping[str, Callable[..., Workload]] = {
    "gpt": make_gpt,
    "gpt dropout": lambda **settings: make_gpt(dropout=0.1, **settings),
    "bert": make_bert,
    "resnet": make_resnet,
}


@dataclass(frozen=True)
class Variant:
    """Options of this package; None for torch.compile."""

    name: str
    options: Mapping[str, Any] | None = field(default=None)


VARIANTS = (
    Variant("torch.compile"),
    Variant("L0", {"level": "L0"}),
    Variant("act4 none", {"bits": 4, "recompute": "none"}),
    Variant("act4 cheap", {"bits": 4, "recompute": "cheap"}),
)


def measure(name: str, variant: Variant) -> dict[str, Any]:
    """Bytes alive after the forward, parameters, inputs and the model's output left out."""
    torch._dynamo.reset()
    device = pick_device()
    workload = MODELS[name](device=device)
    model = workload.model
    compiled = torch.compile(model) if variant.options is None else compile_act(model, **variant.options)
    workload.loss(compiled).backward()
    stored = measure_peak(lambda: workload.loss(compiled), device).end_nbytes
    reported = "" if variant.options is None else actcompile.report(model).saved_nbytes
    return {"model": name, "variant": variant.name, "stored_nbytes": stored, "reported_nbytes": reported}


def main() -> None:
    """Measures, appends rows and prints the table."""
    names = [variant.name for variant in VARIANTS]
    parser = argparse.ArgumentParser("python -m bench.stored", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which models")
    parser.add_argument("--variants", nargs="+", choices=names, default=names, help="what to measure")
    options = parser.parse_args()
    table = []
    for name in options.models:
        base = None
        for variant in (variant for variant in VARIANTS if variant.name in options.variants):
            row = measure(name, variant)
            append_row("stored", row)
            stored = row["stored_nbytes"]
            base = stored if variant.options is None else base
            reported = f"{row['reported_nbytes'] / MIB:.2f}" if variant.options is not None else ""
            ratios = (f"{base / stored:.2f}x", f"{stored / base:.3f}") if base else ("", "")
            table.append([name, variant.name, f"{stored / MIB:.2f}", reported, *ratios])
            print("  ".join(table[-1]), flush=True)
    print()
    print(tabulate(table, ("model", "variant", "stored MiB", "reported MiB", "less", "share"), disable_numparse=True))


if __name__ == "__main__":
    main()
