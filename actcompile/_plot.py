"""The picture of a report: what is stored for every tensor, and the bytes that are alive while a step runs."""

import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
except ImportError as error:
    raise ImportError(
        "a report is drawn with matplotlib, which is not installed: pip install actcompile[report]"
    ) from error

from .memory import Timeline
from .plan import Action
from .reporting import MIB, Report, ReportRow, fold_layers, folded_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours that the color-blind can tell apart (Okabe and Ito, 2008).
_COLORS = {
    Action.KEEP: "#999999",
    Action.PACK: "#E69F00",
    Action.NARROW: "#CC79A7",
    Action.QUANTIZE: "#0072B2",
    Action.SPARSIFY: "#56B4E9",
    Action.SAMPLE: "#D55E00",
    Action.PRUNE: "#F0E442",
    Action.RECOMPUTE: "#009E73",
}
_REST, _FORWARD, _BACKWARD, _PEAK, _EXACT = "#666666", "#0072B2", "#D55E00", "#000000", "#DDDDDD"

_WIDTH, _BAR_HEIGHT, _TIMELINE_HEIGHT, _MARGINS = 10.0, 0.28, 3.2, 3.0
# Tensors below this share of all saved bytes, and those beyond this number of bars, share the last bar.
_MIN_SHARE = 0.003
_MAX_BARS = 40
_LEGEND_COLUMNS = 5


class ReportFigure(Figure):
    """A figure that notebooks show without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def plot_report(report: Report, path: str | Path | None) -> Figure:
    """Draws ``report``; writes the picture to ``path`` if that is given, in the format of its ending."""
    groups, rest = _by_size(fold_layers([row for row in report.rows if row.counts]))
    heights = [0.7, max(1, len(groups) + bool(rest)) * _BAR_HEIGHT + 0.4, _TIMELINE_HEIGHT]
    figure = ReportFigure(figsize=(_WIDTH, sum(heights) + _MARGINS), layout="constrained")
    total, tensors, memory = figure.subplots(3, 1, height_ratios=heights)
    _draw_total(total, report)
    _draw_tensors(tensors, groups, rest)
    _draw_memory(memory, report.timelines)
    _add_legend(figure, {Action(rows[0].action) for rows in groups})
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _by_size(groups: list[list[ReportRow]]) -> tuple[list[list[ReportRow]], list[ReportRow]]:
    """Groups that get a bar, in the order of the forward, and the rows of all others."""
    sizes = [sum(row.nbytes for row in rows) for rows in groups]
    largest = sorted(sizes, reverse=True)[:_MAX_BARS]
    limit = max(_MIN_SHARE * sum(sizes), largest[-1] if largest else 0)
    shown = [rows for rows, size in zip(groups, sizes, strict=True) if size >= limit]
    return shown, [row for rows, size in zip(groups, sizes, strict=True) if size < limit for row in rows]


def _draw_total(axes: "Axes", report: Report) -> None:
    """Bytes of all tensors together, beside those of torch.compile."""
    names = ["torch.compile", "stored instead"]
    _bars(axes, names, [report.baseline_nbytes, report.saved_nbytes], ["#999999", "#0072B2"])
    if report.host_nbytes:
        axes.barh(1, report.host_nbytes / MIB, 0.72, report.saved_nbytes / MIB, color=_EXACT)
    labels = [_size(report.baseline_nbytes), _size(report.saved_nbytes)]
    ends = [report.baseline_nbytes, report.saved_nbytes + report.host_nbytes]
    if report.host_nbytes:
        labels[1] += f", and {_size(report.host_nbytes)} in the host's memory"
    _annotate(axes, labels, ends)
    axes.set_title(f"Saved for the backward: {report.ratio:.1f}x less than torch.compile", fontsize=10, loc="left")


def _draw_tensors(axes: "Axes", groups: Sequence[Sequence[ReportRow]], rest: Sequence[ReportRow]) -> None:
    """Two bars for every tensor, from the first of the forward down: its own bytes, and in front what is stored."""
    bars = [*groups, rest] if rest else groups
    names = [*map(_name, groups), f"{len(rest)} smaller tensors"][: len(bars)]
    colors = [*(_COLORS[Action(rows[0].action)] for rows in groups), _REST][: len(bars)]
    exact, stored = [sum(row.nbytes for row in rows) for rows in bars], [_stored_nbytes(rows) for rows in bars]
    _bars(axes, names, exact, [_EXACT] * len(bars))
    _bars(axes, names, stored, colors)
    labels = []
    for rows, before, after in zip(bars, exact, stored, strict=True):
        label = _size(before) if before == after else f"{_size(before)} \N{RIGHTWARDS ARROW} {_size(after)}"
        labels.append(label + ", host" * any(row.host_nbytes for row in rows))
    _annotate(axes, labels, exact)
    axes.set_xlabel("MiB, scales and zero points included", fontsize=8)
    axes.set_title("Tensor by tensor", fontsize=10, loc="left")


def _add_legend(figure: Figure, used: Collection[Action]) -> None:
    """Above all axes, where the layout makes room for it."""
    handles = [Patch(color=_EXACT, label="without compression")]
    handles += [Patch(color=color, label=str(action)) for action, color in _COLORS.items() if action in used]
    figure.legend(handles=handles, loc="outside upper left", ncols=_LEGEND_COLUMNS, fontsize=8, frameon=False)


def _bars(axes: "Axes", names: Sequence[str], sizes: Sequence[int], colors: Sequence[str]) -> None:
    axes.barh(range(len(sizes)), [nbytes / MIB for nbytes in sizes], height=0.72, color=list(colors))
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    _strip(axes)


def _annotate(axes: "Axes", labels: Sequence[str], ends: Sequence[int]) -> None:
    """Writes each label behind the end of its bar, and leaves room for them."""
    for position, (label, nbytes) in enumerate(zip(labels, ends, strict=True)):
        place = (nbytes / MIB, position)
        axes.annotate(label, place, (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set_xlim(0, max(ends, default=0) / MIB * 1.25 or 1)


def _stored_nbytes(rows: Sequence[ReportRow]) -> int:
    """Bytes that take the place of ``rows``, wherever they wait."""
    return sum(row.stored_nbytes + row.host_nbytes for row in rows)


def _size(nbytes: int) -> str:
    """Bytes in the unit that reads best, with three digits."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024  # type: ignore[assignment]
    return f"{nbytes:.3g} GiB"


def _name(rows: Sequence[ReportRow]) -> str:
    module = folded_name([row.module for row in rows])
    count = f" (x{len(rows)})" if len(rows) > 1 else ""
    return f"{module}{count}  {rows[0].op}" if module else f"{rows[0].op}{count}"


def _draw_memory(axes: "Axes", timelines: Sequence[Timeline]) -> None:
    """Live bytes over the operators of a step: forwards in order, then backwards in the reverse order."""
    live, num_forward = _joined(timelines)
    end = len(live)
    axes.fill_between(range(num_forward), live[:num_forward], step="mid", color=_FORWARD, alpha=0.55, linewidth=0)
    axes.fill_between(range(num_forward, end), live[num_forward:], step="mid", color=_BACKWARD, alpha=0.55, linewidth=0)
    axes.step(range(end), live, where="mid", color="#333333", linewidth=0.8)
    top = max(live, default=0.0)
    if live:
        peak = live.index(top)
        axes.plot(peak, top, "v", color=_PEAK, markersize=5)
        side = "right" if peak > 0.75 * end else "left"
        axes.annotate(f"peak {top:.3g} MiB", (peak, top), (0, 6), textcoords="offset points", ha=side, fontsize=8)
        axes.axvline(num_forward - 0.5, color="#333333", linewidth=0.8, linestyle=":")
        for name, place in (("forward", num_forward / 2), ("backward", (num_forward + end) / 2)):
            axes.annotate(name, (place, top * 1.12), ha="center", fontsize=8)
    axes.set_xlim(-0.5, max(1, end) - 0.5)
    axes.set_ylim(0, top * 1.25 if top else 1)
    axes.set_xlabel("operators in the order of the graphs", fontsize=8)
    axes.set_ylabel("MiB alive", fontsize=8)
    axes.set_title("A step's memory, without parameters and before operators are fused", fontsize=10, loc="left")
    _strip(axes)


def _joined(timelines: Sequence[Timeline]) -> tuple[list[float], int]:
    """MiB after every operator of all graphs: each graph runs on top of what the ones before it keep."""
    forward: list[float] = []
    backward: list[float] = []
    kept = 0.0
    for timeline in timelines:
        live = [nbytes / MIB for nbytes in timeline.live_nbytes]
        forward += [kept + value for value in live[: timeline.num_forward]]
        backward = [kept + value for value in live[timeline.num_forward :]] + backward
        kept = forward[-1] if forward else kept
    return forward + backward, len(forward)


def _strip(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=7)
