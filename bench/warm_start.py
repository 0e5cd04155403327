"""Time until a GPT's first training steps are over in a second process, beside torch.compile's.

The first process of each variant fills torch's caches, those after it are measured: from the moment at which torch is
imported and the model is there, with everything that compiling imports, until the first step that runs compiled code is
over, less a steady step. Variants alternate. The batch is small, because steps are not what is measured.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from .harness import append_row, compile_act, pick_device

VARIANTS: Mapping[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "torch.compile": torch.compile,
    "act4": lambda model: compile_act(model, bits=4),
    "act4 auto": lambda model: compile_act(model, bits=4, auto=True),
}
BASELINE = "torch.compile"
# Steps until code is compiled, where it is not one.
NUM_STEPS = {"act4 auto": 2}
BATCH, TOKENS, WIDTH, VOCABULARY = 4, 128, 256, 256
# The package's own model, read from its file: importing the package is part of what is measured.
MODEL = Path(__file__).resolve().parents[1] / "actcompile" / "_gpt.py"


def start_once(variant: str, layers: int) -> dict[str, float]:
    """Seconds and seconds of processor time until this process has trained its first step."""
    spec = importlib.util.spec_from_file_location("gpt", MODEL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpt"] = module
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    model = module.GPT(layers=layers, width=WIDTH, vocabulary=VOCABULARY, tokens=TOKENS).to(pick_device())
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS), device=pick_device())

    def step() -> None:
        model.zero_grad(set_to_none=True)
        compiled(ids, ids).backward()

    before = os.times()
    compiled = VARIANTS[variant](model)
    for _ in range(NUM_STEPS.get(variant, 1)):
        step()
    started = os.times()
    step()
    after = os.times()
    cpu = [sum(times[:4]) for times in (before, started, after)]
    return {
        "warm_s": 2 * started.elapsed - before.elapsed - after.elapsed,
        "warm_cpu_s": 2 * cpu[1] - cpu[0] - cpu[2],
    }


def start_in_process(variant: str, layers: int, cache: str) -> dict[str, float]:
    """``start_once`` in a process of its own, with torch's caches in the folder ``cache``."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.warm_start", "--start-once", variant]
    command += ["--layers", str(layers)]
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure_variants(variants: list[str], layers: int, pairs: int) -> dict[str, list[dict[str, float]]]:
    """What ``start_once`` measured for each variant in ``pairs`` warm processes."""
    measured: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        caches = {variant: str(Path(folder) / variant.replace(" ", "_")) for variant in variants}
        for variant in variants:
            start_in_process(variant, layers, caches[variant])
        for _ in range(pairs):
            for variant in variants:
                last = start_in_process(variant, layers, caches[variant])
                measured[variant].append(last)
                print(
                    f"warm {variant}: {last['warm_s']:.2f} s, {last['warm_cpu_s']:.2f} s of processor time", flush=True
                )
    return measured


def main() -> None:
    """Measures, appends rows and prints the table."""
    parser = argparse.ArgumentParser("python -m bench.warm_start", description=__doc__)
    parser.add_argument("--layers", type=int, default=4, help="blocks of the model")
    parser.add_argument("--pairs", type=int, default=5, help="warm processes of each variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[:2], help="what to measure")
    parser.add_argument("--start-once", choices=VARIANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start_once:
        print(json.dumps(start_once(options.start_once, options.layers)))
        return
    # It imports this package, which the processes above must not have done before they are measured.
    from .compile_time import summarize

    measured = measure_variants(options.variants, options.layers, options.pairs)
    table = [
        {"layers": options.layers, **summarize(variant, runs, measured.get(BASELINE), ("warm_s", "warm_cpu_s"))}
        for variant, runs in measured.items()
    ]
    for row in table:
        append_row("warm_start", {**row, "pairs": options.pairs})
    print(tabulate(table, headers="keys"))


if __name__ == "__main__":
    main()
