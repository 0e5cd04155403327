"""Cold compile time of a GPT beside torch.compile's, and where it goes.

What is measured lasts until the first step that runs compiled code is over, less a steady step: with ``auto`` that is
the interpreted step, its probe, and the compilation in the second step. Every compilation happens in a process of its
own with an empty cache and all caches off, after a tiny module was compiled there, so that what happens once per
machine (precompiled headers, the workers' start) stays outside; the variants alternate. The batch is small, because
steps are not what is measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from actcompile.meter import synchronize

from .compile_phases import Phases
from .harness import append_row, compile_act, pick_device
from .models import Workload, make_gpt

VARIANTS: Mapping[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "torch.compile": torch.compile,
    "act4": lambda model: compile_act(model, bits=4),
    "act4 auto": lambda model: compile_act(model, bits=4, auto=True),
    "act4 none": lambda model: compile_act(model, bits=4, recompute="none"),
    "checkpoint": torch.compile,
}
BASELINE = "torch.compile"
# Steps until code is compiled, where it is not one.
NUM_STEPS = {"act4 auto": 2}
BATCH, TOKENS = 4, 128


def make_step(variant: str, layers: int, device: torch.device) -> Callable[[], None]:
    """Forward and backward of the demo's model with ``layers`` blocks, without the optimizer."""
    workload = make_gpt(layers=layers, batch=BATCH, tokens=TOKENS, checkpointed=variant == "checkpoint", device=device)
    compiled = VARIANTS[variant](workload.model)
    return lambda: _step(workload, compiled)


def _step(workload: Workload, compiled: Callable[..., Any]) -> None:
    workload.model.zero_grad(set_to_none=True)
    workload.loss(compiled).backward()


def compile_once(variant: str, layers: int) -> dict[str, Any]:
    """Seconds and seconds of processor time that compiling takes in this process, and seconds by phase."""
    device = pick_device()
    tiny = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.GELU()).to(device))
    tiny(torch.ones(8, 8, device=device)).sum().backward()
    step, phases = make_step(variant, layers, device), Phases()

    def compile_all() -> None:
        for _ in range(NUM_STEPS.get(variant, 1)):
            step()

    with phases.measured():
        elapsed_s, cpu_s = _seconds(compile_all)
    steady_s, steady_cpu_s = _seconds(step)
    return {"compile_s": elapsed_s - steady_s, "compile_cpu_s": cpu_s - steady_cpu_s, "phases": phases.seconds}


def _seconds(fn: Callable[[], None]) -> tuple[float, float]:
    """Elapsed time and processor time, that of finished child processes (compilers) included."""
    synchronize()
    before = os.times()
    fn()
    synchronize()
    after = os.times()
    return after.elapsed - before.elapsed, sum(after[:4]) - sum(before[:4])


def compile_in_process(variant: str, layers: int) -> dict[str, Any]:
    """``compile_once`` in a fresh process with nothing cached."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "bench.compile_time", "--compile-once", variant]
        command += ["--layers", str(layers)]
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure_variants(variants: list[str], layers: int, pairs: int) -> dict[str, list[dict[str, Any]]]:
    """What ``compile_once`` measured for each variant."""
    measured: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    for _ in range(pairs):
        for variant in variants:
            measured[variant].append(compile_in_process(variant, layers))
            last = measured[variant][-1]
            print(
                f"compile {variant}: {last['compile_s']:.1f} s, {last['compile_cpu_s']:.1f} s of processor time",
                flush=True,
            )
    return measured


def summarize(
    variant: str,
    runs: Sequence[Mapping[str, Any]],
    base: Sequence[Mapping[str, Any]] | None,
    names: Sequence[str] = ("compile_s", "compile_cpu_s"),
) -> dict[str, str | float | None]:
    """One row: medians, their ratios to ``base``, and the best values, which other work disturbs least."""
    row: dict[str, str | float | None] = {"variant": variant}
    for name in names:
        for prefix, pick in (("", statistics.median), ("best_", min)):
            value = pick([run[name] for run in runs])
            row[prefix + name] = round(value, 2)
            row[f"{prefix}{name}_ratio"] = round(value / pick([run[name] for run in base]), 3) if base else None
    return row


def profile_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by phase, of the run with the least elapsed time, longest first."""
    phases: dict[str, float] = min(runs, key=lambda run: run["compile_s"])["phases"]
    return {name: round(seconds, 2) for name, seconds in sorted(phases.items(), key=lambda item: -item[1])}


def main() -> None:
    """Measures, appends rows and prints the tables."""
    parser = argparse.ArgumentParser("python -m bench.compile_time", description=__doc__)
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model")
    parser.add_argument("--pairs", type=int, default=3, help="compilations of each variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:3], help="what to measure")
    parser.add_argument("--compile-once", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile_once:
        print(json.dumps(compile_once(options.compile_once, options.layers)))
        return
    measured = measure_variants(options.variants, options.layers, options.pairs)
    table, profiles = [], {variant: profile_of(runs) for variant, runs in measured.items()}
    for variant, runs in measured.items():
        table.append({"layers": options.layers, **summarize(variant, runs, measured.get(BASELINE))})
        append_row("compile_time", {**table[-1], "pairs": options.pairs})
        for phase, seconds in profiles[variant].items():
            append_row("compile_phases", {"variant": variant, "layers": options.layers, "phase": phase, "s": seconds})
    print(tabulate(table, headers="keys"))
    names = sorted(
        {name for profile in profiles.values() for name in profile}, key=lambda name: _longest(profiles, name)
    )
    cells = [[name, *(profile.get(name) for profile in profiles.values())] for name in reversed(names)]
    print(tabulate(cells, headers=["phase", *profiles]))


def _longest(profiles: Mapping[str, Mapping[str, float]], phase: str) -> float:
    return max(profile.get(phase, 0.0) for profile in profiles.values())


if __name__ == "__main__":
    main()
