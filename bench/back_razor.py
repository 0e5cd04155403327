"""What Back Razor claims, beside this package: ``python -m bench.back_razor``.

Parts: ``accounting``, the bytes of ViT-B/16 counted as its authors count (``bench/back_razor_accounting.py``);
``energy``, what is left of tensors at equal bits (``bench/back_razor_energy.py``); ``memory``, measured peaks and times
of its models (``bench/back_razor_memory.py``). Accuracy is a matter of ``bench.training``.
"""

import argparse
import json
from pathlib import Path

from . import back_razor_accounting, back_razor_energy, back_razor_memory
from .back_razor_memory import Case, variants
from .back_razor_models import MODELS

PARTS = ("accounting", "energy", "memory")


def list_cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases of ``memory`` that the arguments ask for."""
    return [
        Case(model, batch, variant, str(arguments.data))
        for model in arguments.models
        for batch in arguments.batches or [MODELS[model].batch]
        for variant in arguments.variants or variants(model)
    ]


def main() -> None:
    """Runs parts, each of which appends rows and prints a table."""
    parser = argparse.ArgumentParser("python -m bench.back_razor", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    names = list(variants(next(iter(MODELS))))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="of memory")
    parser.add_argument("--variants", nargs="+", choices=names, help="of memory; all when left out")
    parser.add_argument("--batches", nargs="+", type=int, help="of memory, in the place of the model's own")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each variant; 0: only bytes")
    parser.add_argument("--limit-s", type=int, default=600, help="seconds that one variant may take")
    parser.add_argument("--steps", type=int, default=20, help="of energy: training steps before")
    parser.add_argument("--data", type=Path, default=Path("data"), help="see bench/data.py; and glue/RTE/train.tsv")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(back_razor_memory.measure(Case(**arguments.case), arguments.rounds)))
        return
    if "accounting" in arguments.parts:
        back_razor_accounting.run()
    if "energy" in arguments.parts:
        back_razor_energy.run(arguments.steps, arguments.data)
    if "memory" in arguments.parts:
        back_razor_memory.run(list_cases(arguments), arguments.rounds, arguments.limit_s)


if __name__ == "__main__":
    main()
