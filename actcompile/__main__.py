"""The command line: ``python -m actcompile demo | explain SCRIPT``."""

import argparse
import runpy
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from .demo import VARIANTS, Options, run_demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command == "explain":
        return explain_script(options.script, options.arguments)
    settings = {option.name: getattr(options, option.name) for option in fields(Options)}
    try:
        run_demo(Options(**settings))
    except (ImportError, ValueError) as error:
        parser.exit(1, f"actcompile demo: {error}\n")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser("python -m actcompile", description="Activation-compressed training.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands.add_parser("demo", formatter_class=argparse.ArgumentDefaultsHelpFormatter, help=_DEMO_HELP))
    explain = commands.add_parser("explain", help=_EXPLAIN_HELP, description=_EXPLAIN_HELP)
    explain.add_argument("script", type=Path, help="a Python file that trains with backend='act', run as __main__")
    explain.add_argument("arguments", nargs=argparse.REMAINDER, help="handed on to the script")
    return parser


_DEMO_HELP = "train a small GPT on real text with and without compression; a table, curves and a report at the end"
_EXPLAIN_HELP = "run a training script, then print what its compiled graphs saved and what was stored instead"


def _add_demo(demo: argparse.ArgumentParser) -> None:
    default = Options()
    demo.description = _DEMO_HELP
    demo.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help="folder of text files to train on; by default the sources of the Python standard library",
    )
    counts = {
        "steps": "training steps of each run",
        "batch": "sequences per step",
        "tokens": "bytes per sequence",
        "layers": "transformer blocks",
        "width": "hidden units",
        "heads": "attention heads",
        "warmup": "steps over which the learning rate rises",
    }
    for name, text in counts.items():
        demo.add_argument(f"--{name}", type=_positive, metavar="N", default=getattr(default, name), help=text)
    demo.add_argument("--dropout", type=float, metavar="P", default=default.dropout, help="dropout in training")
    demo.add_argument("--lr", type=float, default=default.lr, help="AdamW's learning rate")
    labels = "; ".join(f"{name}: {variant.label}" for name, variant in VARIANTS.items())
    demo.add_argument(
        "--runs", nargs="+", choices=VARIANTS, metavar="RUN", default=default.runs, help=f"which runs ({labels})"
    )
    demo.add_argument(
        "--out", type=Path, metavar="PATH", default=default.out, help="folder for results.csv, the PNGs and report.html"
    )
    demo.add_argument("--seed", type=int, default=default.seed, help="of the weights, the batches and the rounding")
    demo.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default=default.device,
        help="auto takes a CUDA device if there is one; on CUDA the model runs in bfloat16 (autocast)",
    )


def explain_script(script: Path, arguments: Sequence[str]) -> int:
    """Runs ``script`` as its own main program, then prints the report on all training graphs it compiled."""
    from .api import report

    if not script.is_file():
        print(f"actcompile explain: no such file: {str(script)!r}", file=sys.stderr)
        return 1
    sys.argv = [str(script), *arguments]
    # As the interpreter does for a script: its neighbours can be imported.
    sys.path[0] = str(script.resolve().parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    found = report()
    if not found.rows:
        print(
            f"actcompile explain: {str(script)!r} compiled no training graph with this package: call "
            'torch.compile(model, backend="act") and run a training step',
            file=sys.stderr,
        )
        return 1
    print(found)
    return 0


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
