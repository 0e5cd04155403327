"""Cold compile time beside torch.compile, on the demo's model.

Each compilation happens in a process of its own with an empty cache and all caches off, after a tiny module was
compiled there, so that what happens once per machine (precompiled headers, the workers' start) stays outside; the
variants alternate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from actcompile.meter import synchronize

from .harness import append_row, compile_act, pick_device
from .models import Workload, make_gpt

VARIANTS: Mapping[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "torch.compile": torch.compile,
    "act4": lambda model: compile_act(model, bits=4),
    "act4 none": lambda model: compile_act(model, bits=4, recompute="none"),
    "checkpoint": torch.compile,
}
BASELINE = "torch.compile"


def make_step(variant: str, device: torch.device) -> Callable[[], None]:
    """Forward and backward of the demo's model, without the optimizer."""
    workload = make_gpt(checkpointed=variant == "checkpoint", device=device)
    compiled = VARIANTS[variant](workload.model)
    return lambda: _step(workload, compiled)


def _step(workload: Workload, compiled: Callable[..., Any]) -> None:
    workload.model.zero_grad(set_to_none=True)
    workload.loss(compiled).backward()


def compile_once(variant: str) -> tuple[float, float]:
    """Seconds, and seconds of processor time, that the first step takes longer than the second in this process."""
    device = pick_device()
    tiny = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.GELU()).to(device))
    tiny(torch.ones(8, 8, device=device)).sum().backward()
    step = make_step(variant, device)
    (first_s, first_cpu_s), (second_s, second_cpu_s) = _seconds(step), _seconds(step)
    return first_s - second_s, first_cpu_s - second_cpu_s


def _seconds(fn: Callable[[], None]) -> tuple[float, float]:
    """Elapsed time and processor time, that of finished child processes (compilers) included."""
    synchronize()
    before = os.times()
    fn()
    synchronize()
    after = os.times()
    return after.elapsed - before.elapsed, sum(after[:4]) - sum(before[:4])


def compile_in_process(variant: str) -> tuple[float, float]:
    """``compile_once`` in a fresh process with nothing cached."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "bench.compile_time", "--compile-once", variant]
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    elapsed_s, cpu_s = json.loads(done.stdout.splitlines()[-1])
    return elapsed_s, cpu_s


def measure_variants(variants: list[str], pairs: int) -> dict[str, dict[str, list[float]]]:
    """Compile times in s of each variant."""
    measured: dict[str, dict[str, list[float]]] = {
        variant: {"compile_s": [], "compile_cpu_s": []} for variant in variants
    }
    for _ in range(pairs):
        for variant in variants:
            elapsed_s, cpu_s = compile_in_process(variant)
            measured[variant]["compile_s"].append(elapsed_s)
            measured[variant]["compile_cpu_s"].append(cpu_s)
            print(f"compile {variant}: {elapsed_s:.1f} s, {cpu_s:.1f} s of processor time", flush=True)
    return measured


def summarize(variant: str, times: Mapping[str, list[float]], base: Mapping[str, list[float]] | None) -> dict[str, Any]:
    """One row: medians, their ratios to ``base``, and the best values, which other work disturbs least."""
    row: dict[str, Any] = {"variant": variant}
    for name, values in times.items():
        for prefix, pick in (("", statistics.median), ("best_", min)):
            row[prefix + name] = round(pick(values), 2)
            row[f"{prefix}{name}_ratio"] = round(pick(values) / pick(base[name]), 3) if base else None
    return row


def main() -> None:
    """Measures, appends rows and prints the table."""
    parser = argparse.ArgumentParser("python -m bench.compile_time", description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="compilations of each variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:2], help="what to measure")
    parser.add_argument("--compile-once", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile_once:
        print(json.dumps(compile_once(options.compile_once)))
        return
    measured = measure_variants(options.variants, options.pairs)
    table = []
    for variant, times in measured.items():
        table.append(summarize(variant, times, measured.get(BASELINE)))
        append_row("compile_time", {**table[-1], "pairs": options.pairs})
    print(tabulate(table, headers="keys"))


if __name__ == "__main__":
    main()
