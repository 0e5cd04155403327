"""Predicted against measured noise, tensor by tensor: ``python -m bench.sensitivity``.

Models of bench/cases.py. The noise of a tensor is the mean of |g' - g|^2 over draws of its rounding noise, g the
gradient of all parameters, measured by bench/replay.py; the prediction is that of one probed step. Every tensor that is
rounded has a row, and all of them together have two: "all", by replay, and "all, trained", in ordinary training steps.

With ``--plans``, bits by sensitivity beside uniform ones instead, both in ordinary training steps: stored bytes, noise,
and what was predicted of it; also of model families (tests/families), on their own batch.
"""

import argparse
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

import actcompile
from actcompile import records
from actcompile.plan import Profile

from .cases import SIZES, Case, mean_noise, predicted, prepare, prepare_family, ways_of
from .gradients import gradients
from .harness import RESULTS, append_row, read_rows

# A prediction is good when its ratio to what is measured lies here.
BAND = (0.7, 1.4)
ALL, TRAINED = "all", "all, trained"
_PLANS = (
    *("model", "steps", "bits", "noise, auto", "noise, uniform", "auto / uniform", "bytes auto / uniform"),
    *("predicted / measured, auto", "the same, uniform"),
)


def measure_tensors(case: Case, widths: Sequence[int], draws: int, pattern: str) -> None:
    """Appends a row per tensor whose key holds ``pattern`` and per width, then those for all tensors together."""
    _, profile = case.profile()
    replay = case.replay()
    for width in widths:
        every = {row.key: width for row in replay.rows}
        nbytes = sum(row.nbytes for row in replay.rows)
        wanted = [(row.key, row.nbytes, {row.key: width}) for row in replay.rows if pattern in row.key]
        for tensor, size, bits in [*wanted, (ALL, nbytes, every)]:
            found = mean_noise(functools.partial(replay.noise, bits), draws)
            _append(case, tensor, size, bits, profile, found)
        call = case.compiled(bits=width)
        _append(case, TRAINED, nbytes, every, profile, mean_noise(functools.partial(case.noise, call), draws))


def _append(
    case: Case, tensor: str, nbytes: int, bits: Mapping[str, int], profile: Profile, found: tuple[float, float, int]
) -> None:
    guess, (mean, error, draws) = predicted(bits, profile), found
    known = profile.sensitivities.get(tensor)
    width = next(iter(bits.values()))
    # Both are zero for a tensor that does not reach the gradient.
    ratio = guess / mean if mean else 1.0 if not guess else float("inf")
    row = {
        "model": case.name,
        "tensor": tensor,
        "method": "" if known is None else known.method,
        "bits": width,
        "nbytes": nbytes,
        "draws": draws,
        "predicted": guess,
        "measured": mean,
        "standard_error": error,
        "ratio": ratio,
    }
    append_row("sensitivity", row)
    mark = "" if BAND[0] <= ratio <= BAND[1] else "  outside"
    print(
        f"{case.name:9}{width} {tensor:72}{guess:11.3e}{mean:11.3e} ±{error / mean:4.0%}{ratio:7.2f}{mark}", flush=True
    )


def measure_plans(case: Case, steps: int, widths: Sequence[int], draws: int) -> list[list[object]]:
    """Appends a row per width, and returns what is printed of them."""
    table: list[list[object]] = []
    for width in widths:
        stored, noise, guess = {}, {}, {}
        for auto in (True, False):
            call = case.compiled(bits=width, auto=auto)
            gradients(case.workload.model, case.workload.loss(call, case.batch))
            probed = [record.profile for record in records.finished()]
            if auto:
                guess[False] = sum(
                    predicted(dict.fromkeys(profile.sensitivities, width), profile) for profile in probed if profile
                )
            # Where both plans are the same, so is the noise.
            actcompile.set_rng_state({"position": 0})
            noise[auto] = mean_noise(functools.partial(case.noise, call), draws)
            stored[auto] = actcompile.report(case.workload.model).saved_nbytes
            if auto:
                graphs = [(record.plan, record.profile) for record in records.finished() if record.profile]
                guess[True] = sum(predicted(ways_of(plan), profile) for plan, profile in graphs)
        (mean, error, drawn), (uniform, uniform_error, _) = noise[True], noise[False]
        row = {
            "model": case.name,
            "steps": steps,
            "bits": width,
            "draws": drawn,
            "nbytes_auto": stored[True],
            "nbytes_uniform": stored[False],
            "noise_auto": mean / case.square,
            "noise_uniform": uniform / case.square,
            "error_auto": error / case.square,
            "error_uniform": uniform_error / case.square,
            "auto_to_uniform": mean / uniform if uniform else 1.0,
            "ratio_auto": guess[True] / mean if mean else 1.0,
            "ratio_uniform": guess[False] / uniform if uniform else 1.0,
        }
        append_row("sensitivity_plans", row)
        names = ("model", "steps", "bits", "noise_auto", "noise_uniform", "auto_to_uniform")
        share = stored[True] / stored[False]
        table.append([*(row[name] for name in names), share, row["ratio_auto"], row["ratio_uniform"]])
        print("  ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in table[-1]), flush=True)
    return table


def summarize(rows: Sequence[Mapping[str, str]]) -> list[list[object]]:
    """Per model and width: tensors whose ratio lies in the band, their share of bytes, the ratio of all together."""
    table: list[list[object]] = []
    for model, width in dict.fromkeys((row["model"], row["bits"]) for row in rows):
        mine = {row["tensor"]: row for row in rows if (row["model"], row["bits"]) == (model, width)}
        tensors = [row for key, row in mine.items() if key not in (ALL, TRAINED)]
        good = [row for row in tensors if BAND[0] <= float(row["ratio"]) <= BAND[1]]
        nbytes = [sum(int(row["nbytes"]) for row in some) for some in (good, tensors)]
        together = [float(mine[key]["ratio"]) if key in mine else None for key in (ALL, TRAINED)]
        share = nbytes[0] / nbytes[1] if nbytes[1] else 0
        table.append([model, width, f"{len(good)} of {len(tensors)}", f"{share:.1%}", *together])
    return table


def plot(rows: Sequence[Mapping[str, str]]) -> Path:
    """Every tensor as a point, one panel per width."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    widths = sorted({row["bits"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(1, len(widths), figsize=(5.5 * len(widths), 5), squeeze=False)
    for axis, width in zip(axes.flat, widths, strict=True):
        points = [row for row in rows if row["bits"] == width and float(row["measured"]) > 0]
        for index, model in enumerate(models):
            mine = [row for row in points if row["model"] == model and row["tensor"] not in (ALL, TRAINED)]
            x, y = ([float(row[name]) for row in mine] for name in ("measured", "predicted"))
            axis.scatter(x, y, s=14, color=f"C{index}", label=model)
        ends = [pick(float(row["measured"]) for row in points) for pick in (min, max)]
        axis.fill_between(ends, *([ratio * end for end in ends] for ratio in BAND), color="0.85", zorder=0)
        axis.plot(ends, ends, color="0.5", linewidth=0.8, zorder=1)
        axis.set(xscale="log", yscale="log", xlabel="measured $E|g' - g|^2$", title=f"{width} bits")
    axes[0, 0].set_ylabel("predicted by one probed step")
    axes[0, 0].legend(title=f"band: {BAND[0]} to {BAND[1]}")
    figure.tight_layout()
    path = RESULTS / "sensitivity.png"
    figure.savefig(path, dpi=150)
    return path


def main() -> None:
    """Measures, appends rows, prints a table and draws all rows that there are."""
    parser = argparse.ArgumentParser("python -m bench.sensitivity", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--models", nargs="*", choices=SIZES, default=list(SIZES), help="none: only draw")
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 2], help="widths of the codes")
    parser.add_argument("--draws", type=int, default=32, help="of the rounding noise, at the least")
    parser.add_argument("--steps", type=int, default=20, help="training steps before")
    parser.add_argument("--tensors", default="", metavar="TEXT", help="only tensors whose key holds this")
    parser.add_argument("--plans", action="store_true", help="bits by sensitivity beside uniform ones")
    parser.add_argument("--families", nargs="*", default=[], metavar="NAME", help="of tests/families, with --plans")
    parser.add_argument("--data", type=Path, default=Path("data"), help="see bench/data.py")
    arguments = parser.parse_args()
    if arguments.plans:
        cases = (prepare(name, arguments.steps, arguments.data) for name in arguments.models)
        families = (prepare_family(name, arguments.steps) for name in arguments.families)
        table = [
            row
            for case in itertools.chain(cases, families)
            for row in measure_plans(case, arguments.steps, arguments.bits, arguments.draws)
        ]
        print(tabulate(table, _PLANS, floatfmt=".3g"))
        return
    for name in arguments.models:
        case = prepare(name, arguments.steps, arguments.data)
        measure_tensors(case, arguments.bits, arguments.draws, arguments.tensors)
    rows = read_rows("sensitivity", ("model", "tensor", "bits"))
    headers = ("model", "bits", f"tensors within {BAND}", "of their bytes", "ratio, all", "ratio, all in training")
    print(tabulate(summarize(rows), headers, floatfmt=".2f"))
    print(f"Drawn: {plot(rows)}")


if __name__ == "__main__":
    main()
