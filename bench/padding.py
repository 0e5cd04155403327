"""What storing no padding saves, and that gradients stay as they are: ``python -m bench.padding``.

The pretrained encoder of bench/tasks.py on batches of MRPC and RTE, padded to one length. ``rows`` is the share of
tokens that the fullest of these batches needs; everything else is stored exactly, so that all that differs is padding.
"""

import argparse
import itertools
from pathlib import Path

import torch
from tabulate import tabulate

import actcompile

from .gradients import flat, gradients
from .harness import append_row, compile_act, read_rows
from .tasks import TASKS


def measure(task: str, batches: int, data: Path) -> dict[str, object]:
    """Gradients and stored bytes over some batches of ``task``, without dropout."""
    torch._dynamo.reset()
    training = TASKS[task](0, data)
    model = training.model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config._attn_implementation = "sdpa"
    some = list(itertools.islice(training.batches, batches))
    shares = [float(mask.float().mean()) for _, mask, *_ in some]
    rows = min(1.0, max(shares) + 1 / 1024)
    nbytes, errors = {}, []
    for name, options in {"all": {}, "valid": {"rows": rows, "padding": "attention_mask"}}.items():
        actcompile.reset()
        call = compile_act(model, bits=32, recompute="none", **options)
        for batch in some:
            found = flat(gradients(model, training.loss(call, batch)))
            if name == "valid":
                exact = flat(gradients(model, training.loss(model, batch)))
                errors.append(float((found - exact).norm() / exact.norm()))
        report = actcompile.report(model)
        nbytes[name] = report.saved_nbytes
        sampled = [row for row in report.rows if row.action == "sample"]
    return {
        "task": task,
        "batches": batches,
        "mean_share": sum(shares) / batches,
        "rows": rows,
        "relative_error": max(errors),
        "inputs": len(sampled),
        "inputs_nbytes": sum(row.nbytes for row in sampled),
        "inputs_stored_nbytes": sum(row.stored_nbytes for row in sampled),
        "all_nbytes": nbytes["all"],
        "stored_nbytes": nbytes["valid"],
    }


def main() -> None:
    """Measures, appends rows and prints a table."""
    parser = argparse.ArgumentParser("python -m bench.padding", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tasks", nargs="+", choices=("mrpc", "rte"), default=["mrpc", "rte"])
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with glue/MRPC and glue/RTE")
    arguments = parser.parse_args()
    for task in arguments.tasks:
        append_row("padding", measure(task, arguments.batches, arguments.data))
    print(tabulate(read_rows("padding", ("task",)), "keys", floatfmt=".3g"))


if __name__ == "__main__":
    main()
