"""The plot of ``bench.step``: what each variant saves of the peak and what that takes in time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .harness import RESULTS
from .variants import BASELINE, VARIANTS

_PANELS = 3
_OURS = "act"


def best_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in one coordinate and equals or beats in the other, by the first one."""
    best: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def largest_steps(rows: Sequence[Mapping[str, str]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Title -> variant -> time and peak as shares of torch.compile's; per model where that has its largest peak."""
    points: dict[str, dict[str, tuple[float, float]]] = {}
    largest: dict[str, Mapping[str, str]] = {}
    for row in rows:
        if row["variant"] == BASELINE and row["peak_nbytes"]:
            known = largest.get(row["model"])
            if known is None or int(row["peak_nbytes"]) > int(known["peak_nbytes"]):
                largest[row["model"]] = row
    for model, base in largest.items():
        mine = [
            row for row in rows if all(row[key] == base[key] for key in ("model", "size", "batch", "dtype", "device"))
        ]
        points[f"{model} {base['size']}, batch {base['batch']}"] = {
            row["variant"]: (float(row["time_ratio"]), int(row["peak_nbytes"]) / int(base["peak_nbytes"]))
            for row in mine
            if row["time_ratio"]
        }
    return points


def plot(rows: Sequence[Mapping[str, str]]) -> Path:
    """Peak over time, one panel per model, a line through the best points."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    panels = largest_steps(rows)
    lines = max(1, -(-len(panels) // _PANELS))
    figure, axes = plt.subplots(lines, _PANELS, figsize=(4 * _PANELS + 2.5, 3.8 * lines), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, points) in zip(axes.flat, panels.items(), strict=False):
        axis.step(*zip(*best_points(list(points.values())), strict=True), where="post", color="0.7", zorder=0)
        for index, variant in enumerate(VARIANTS):
            marker = "o" if variant.startswith(_OURS) else "X"
            # Also where there is no point: the legend is made from the first panel.
            axis.plot(
                *points.get(variant, (float("nan"), float("nan"))),
                marker=marker,
                linestyle="",
                color=plt.get_cmap("tab20")(index),
                label=variant,
            )
        axis.set(xscale="log", title=title, xlabel="step time / torch.compile's")
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
    for axis in axes[:, 0]:
        axis.set_ylabel("peak / torch.compile's")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="center right", fontsize="small")
    figure.tight_layout(rect=(0, 0, 0.86, 1))
    path = RESULTS / "step.png"
    figure.savefig(path, dpi=150)
    return path
