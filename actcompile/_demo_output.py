"""What the demo leaves behind: a table, a CSV file, two pictures and a page that holds them."""

import base64
import csv
import html
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from .demo import Options, Result
from .reporting import MIB, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINE = "compile"
SMOOTHED_STEPS = 10
COLORS = {
    "eager": "#999999",
    "compile": "#222222",
    "budget": "#c98a1b",
    "checkpoint": "#a33ea1",
    "act8": "#8ecae6",
    "act4": "#1f77b4",
    "act2": "#0b3d66",
}
DASHES = {"eager": ":", "budget": "--", "checkpoint": "--"}
_HEADERS = (
    "run",
    "peak MiB",
    "less",
    "stored MiB",
    "less",
    "step ms",
    "time",
    "loss on held-out files",
)
_NOTE = (
    "Peak: the most memory that forward and backward take on top of parameters and optimizer state, the gradients "
    "included. Stored: alive between forward and backward. Less, time: against torch.compile. Step: the median of "
    "steps that all runs took in turn, optimizer included. Loss: nats per byte."
)


def results_table(results: Sequence[Result], tablefmt: str = "simple") -> str:
    """All runs, one per line, each beside torch.compile where that was run."""
    base = next((result for result in results if result.name == BASELINE), None)
    rows = []
    for result in results:
        peak, stored = result.peak.peak_nbytes, result.stored_nbytes
        rows.append(
            [
                result.label,
                f"{peak / MIB:.1f}",
                f"{base.peak.peak_nbytes / peak:.1f}x" if base else "",
                f"{stored / MIB:.1f}",
                f"{base.stored_nbytes / stored:.1f}x" if base else "",
                f"{result.step_ms:.0f}",
                f"{result.step_ms / base.step_ms:.2f}x" if base else "",
                f"{result.held_out_loss:.4f}",
            ]
        )
    align = ("left", *["right"] * (len(_HEADERS) - 1))
    table = tabulate(rows, _HEADERS, tablefmt=tablefmt, colalign=align, disable_numparse=True)
    return f"{table}\n{textwrap.fill(_NOTE, 110)}" if tablefmt == "simple" else f"{table}<p>{_NOTE}</p>"


def write_output(options: Options, results: Sequence[Result], saved: Report | None, setting: str) -> None:
    """Writes results.csv, loss_curves.png, memory_timelines.png and report.html into ``options.out``.

    Args:
        options: Of this demo.
        results: One per run.
        saved: The report on one of the compressed runs, if any.
        setting: The text, the device and the versions.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    _write_csv(options.out / "results.csv", results)
    _plot_losses(options.out / "loss_curves.png", results)
    _plot_timelines(options.out / "memory_timelines.png", results)
    _write_page(options, results, saved, setting)


def _write_csv(path: Path, results: Sequence[Result]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "peak_nbytes", "stored_nbytes", "step_ms", "first_step_s", "held_out_loss"))
        for result in results:
            times = (f"{result.step_ms:.2f}", f"{result.first_step_s:.2f}")
            writer.writerow(
                (result.name, result.peak.peak_nbytes, result.stored_nbytes, *times, f"{result.held_out_loss:.5f}")
            )


def _plot_losses(path: Path, results: Sequence[Result]) -> None:
    base = next((result for result in results if result.name == BASELINE), results[0])
    with _picture(path, num_panels=2) as (left, right):
        smooth_base = _smooth(base.losses)
        for result in results:
            losses = _smooth(result.losses)
            steps = range(1, len(losses) + 1)
            _line(left, result, steps, losses)
            _line(right, result, steps, [loss - other for loss, other in zip(losses, smooth_base, strict=True)])
        left.set(title="Training loss", xlabel="step", ylabel=f"nats per byte, mean of {SMOOTHED_STEPS} steps")
        right.set(title=f"Training loss minus that of {base.label}", xlabel="step", ylabel="nats per byte")
        left.legend()


def _plot_timelines(path: Path, results: Sequence[Result]) -> None:
    with _picture(path, num_panels=1) as (axes,):
        for result in results:
            seconds = [time for time, _ in result.peak.timeline]
            duration = seconds[-1] if seconds and seconds[-1] > 0 else 1.0
            shares = [100 * second / duration for second in seconds]
            _line(axes, result, shares, [nbytes / MIB for _, nbytes in result.peak.timeline], drawstyle="steps-post")
        axes.set(
            title="Memory of one forward and backward, without parameters and optimizer state",
            xlabel="share of the run's own forward and backward, %",
            ylabel="MiB",
            xlim=(0, 100),
        )
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


@contextmanager
def _picture(path: Path, num_panels: int) -> Iterator[Sequence["Axes"]]:
    """Axes side by side, written to ``path`` at the end."""
    # The object interface needs no display and leaves the user's pyplot alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    yield panels
    figure.savefig(path)


def _line(axes: "Axes", result: Result, x: Sequence[float], y: Sequence[float], drawstyle: str = "default") -> None:
    style = DASHES.get(result.name, "-")
    axes.plot(x, y, label=result.label, color=COLORS[result.name], linestyle=style, linewidth=1.4, drawstyle=drawstyle)


def _smooth(losses: Sequence[float]) -> list[float]:
    """The mean of the last steps at each step."""
    windows = (losses[max(0, end - SMOOTHED_STEPS) : end] for end in range(1, len(losses) + 1))
    return [sum(window) / len(window) for window in windows]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>actcompile demo</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2em auto; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; margin: 1em 0; font-size: 14px; }}
th, td {{ padding: 3px 10px; border-bottom: 1px solid #ddd; text-align: left; }}
img {{ max-width: 100%; }}
.wide {{ overflow-x: auto; }}
</style></head><body>
<h1>actcompile demo</h1>
<p>{setting}</p>
<p>{options}</p>
{table}
<h2>Memory of one step</h2><img alt="memory timelines" src="data:image/png;base64,{timelines}">
<h2>Training</h2><img alt="loss curves" src="data:image/png;base64,{losses}">
{saved}
</body></html>
"""


def _write_page(options: Options, results: Sequence[Result], saved: Report | None, setting: str) -> None:
    model = (
        f"GPT of {options.layers} blocks, {options.width} hidden units, {options.heads} heads; {options.batch} "
        f"sequences of {options.tokens} bytes per step, {options.steps} steps, seed {options.seed}."
    )
    section = f"<h2>What was saved</h2><div class='wide'>{saved._repr_html_()}</div>" if saved else ""
    page = _PAGE.format(
        setting=html.escape(setting),
        options=html.escape(model),
        table=results_table(results, "html"),
        timelines=_base64(options.out / "memory_timelines.png"),
        losses=_base64(options.out / "loss_curves.png"),
        saved=section,
    )
    (options.out / "report.html").write_text(page, encoding="utf-8")


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")
