"""Reports: what they count, how they fold and print it."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import actcompile
from actcompile._gpt import GPT
from actcompile.memory import Timeline
from actcompile.plan import Action
from actcompile.reporting import Report, ReportRow, fold_layers

from ..models import Task, bert, gpt, resnet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROW = ReportRow(
    name="gelu",
    op="gelu",
    module="blocks.0.fc",
    source="model.py:3",
    shape=(64, 128),
    dtype=torch.float32,
    nbytes=32768,
    action="quantize",
    bits=4,
    stored_nbytes=4288,
    kind="path",
    role="activation",
    reason="uniform bits",
)


def passed_nbytes(loss: Tensor, task: Task) -> int:
    """Bytes of the tensors that the compiled forward handed to autograd, what the caller holds left out."""
    node = loss.grad_fn
    while node is not None and "CompiledFunction" not in node.name():
        node = node.next_functions[0][0]
    assert node is not None
    saved = [*node.saved_tensors, *node._tensors_no_vc_check]  # type: ignore[attr-defined]
    held = {
        value.untyped_storage().data_ptr() for value in (*task.model.parameters(), *task.model.buffers(), *task.inputs)
    }
    return sum(t.numel() * t.element_size() for t in saved if t.untyped_storage().data_ptr() not in held)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: gpt(0.1), {}),
        (lambda: bert(0.1), {}),
        (resnet, {}),
        (gpt, {"bits": 3}),
        (gpt, {"level": "L0"}),
        (resnet, {"recompute": "none", "bits": 6, "group_size": 64}),
    ],
)
def test_total_is_what_crosses(make: Callable[[], Task], options: dict[str, object]) -> None:
    task = make()
    loss = task.loss(torch.compile(task.model, backend="act", options={"lowering": "eager", **options}))
    report = actcompile.report(task.model)
    assert report.saved_nbytes == passed_nbytes(loss, task) > 0
    if options != {"level": "L0"}:
        assert report.saved_nbytes < 0.3 * report.baseline_nbytes


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: gpt(0.1, layers=1), resnet])
def test_total_is_what_crosses_under_inductor(make: Callable[[], Task]) -> None:
    task = make()
    loss = task.loss(torch.compile(task.model, backend="act"))
    assert actcompile.report(task.model).saved_nbytes == passed_nbytes(loss, task) > 0


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_checkpointed_models_with_random_operators(dropout: float) -> None:
    """Attention draws random numbers, or may; the partitioner keeps the generator's state for the backward."""
    model = GPT(layers=2, width=64, vocabulary=64, tokens=32, dropout=dropout, checkpointed=True)
    tokens = torch.randint(64, (4, 32))
    torch.compile(model, backend="act", options={"lowering": "eager"})(tokens, tokens).backward()
    report = actcompile.report(model)
    plain = GPT(layers=2, width=64, vocabulary=64, tokens=32, dropout=dropout)
    torch.compile(plain, backend="act", options={"lowering": "eager"})(tokens, tokens).backward()
    assert report.saved_nbytes < report.baseline_nbytes < 0.5 * actcompile.report(plain).baseline_nbytes


def test_baseline_is_what_torch_compile_saves() -> None:
    """The bytes that a backend without compression hands to autograd."""
    task = gpt(0.1)
    loss = task.loss(torch.compile(task.model, backend="aot_eager_decomp_partition"))
    plain = passed_nbytes(loss, task)
    torch._dynamo.reset()
    task.loss(torch.compile(task.model, backend="act", options={"lowering": "eager"}))
    # Decompositions differ a little.
    assert actcompile.report(task.model).baseline_nbytes == pytest.approx(plain, rel=0.1)


def test_rows_say_everything() -> None:
    task = gpt()
    task.loss(torch.compile(task.model, backend="act", options={"lowering": "eager"}))
    report = actcompile.report(task.model)
    for row in report.rows:
        assert row.reason
        assert row.kind in ("leaf", "path")
        assert (row.bits is not None) == (row.action == "quantize")
        if row.action == "keep":
            assert row.stored_nbytes == row.nbytes
        else:
            assert row.stored_nbytes < row.nbytes
    assert report.ratio == report.baseline_nbytes / report.saved_nbytes > 5
    assert report.predicted_noise is None
    assert report.predicted_peak_nbytes >= report.saved_nbytes


def test_a_recompiled_graph_counts_once() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    step = torch.compile(model, backend="act", options={"lowering": "eager"})
    step(torch.randn(64, 64)).sum().backward()
    once = actcompile.report(model)
    step(torch.randn(128, 64)).sum().backward()
    again = actcompile.report(model)
    assert len(again.rows) == len(once.rows)
    assert again.baseline_nbytes == 2 * once.baseline_nbytes


def test_graphs_of_a_broken_model_add_up() -> None:
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)

    def function(x: Tensor) -> Tensor:
        y = first(x).exp().sin()
        torch._dynamo.graph_break()
        return second(y).exp().sin()

    torch.compile(function, backend="act", options={"lowering": "eager"})(torch.randn(64, 64)).sum().backward()
    total = actcompile.report()
    parts = [actcompile.report(first), actcompile.report(second)]
    assert all(part.rows for part in parts)
    assert total.saved_nbytes == sum(part.saved_nbytes for part in parts)
    assert len(total.timelines) == 2


def test_parameters_and_inputs_do_not_count() -> None:
    rows = (ROW, replace(ROW, role="parameter"), replace(ROW, role="input"), replace(ROW, role="boundary"))
    assert Report(rows, 4 * 4288).saved_nbytes == 2 * 4288
    assert Report(rows, 4 * 4288).ratio == 2.0


def test_offloaded_bytes_are_told_apart() -> None:
    moved = replace(ROW, module="blocks.1.fc", stored_nbytes=0, host_nbytes=4288)
    report = Report((ROW, moved), 4 * 4288)
    assert (report.saved_nbytes, report.host_nbytes, report.ratio) == (4288, 4288, 4.0)
    lines = [line for line in str(report).splitlines() if "gelu" in line]
    assert ["quantize, offload" in line for line in lines] == [False, True]
    assert "and in the host's memory 0.00 MiB" in str(report) and "host" not in str(Report((ROW,), 4288))
    document = json.loads(report.to_json())
    assert document["host_nbytes"] == 4288 and [row["host_nbytes"] for row in document["rows"]] == [0, 4288]


def test_nothing_left_on_the_device() -> None:
    report = Report((replace(ROW, stored_nbytes=0, host_nbytes=4288),), 32768)
    assert report.ratio == float("inf") and "inf" in str(report)
    assert json.loads(report.to_json())["ratio"] is None


def test_nothing_compiled_yet() -> None:
    empty = actcompile.report()
    assert not empty.rows
    assert "run a step first" in str(empty) and "run a step first" in empty._repr_html_()
    assert (empty.saved_nbytes, empty.ratio, empty.predicted_peak_nbytes) == (0, 1.0, 0)


def test_identical_layers_are_folded() -> None:
    rows = [replace(ROW, module=f"blocks.{i}.fc") for i in range(12)]
    (line,) = [line for line in str(Report(tuple(rows), 10**6)).splitlines() if "gelu" in line]
    assert line.startswith("blocks.0-11.fc (x12)")
    assert "0.375" in line and "0.049" in line


def test_different_layers_are_not_folded() -> None:
    rows = [
        ROW,
        replace(ROW, module="blocks.1.fc", bits=2),
        replace(ROW, module="blocks.2.fc", shape=(1,)),
        replace(ROW, module="blocks.3.up"),
        replace(ROW, module="blocks.4.fc", reason="by hand"),
    ]
    assert [len(group) for group in fold_layers(rows)] == [1] * 5


def test_the_same_operator_twice_in_a_layer_makes_two_lines() -> None:
    rows = [replace(ROW, module=f"blocks.{i // 2}.fc") for i in range(8)]
    assert [len(group) for group in fold_layers(rows)] == [4, 4]


def test_layers_in_the_order_of_the_backward_are_named_in_order() -> None:
    rows = tuple(replace(ROW, module=f"blocks.{i}.fc") for i in range(11, -1, -1))
    assert "blocks.0-11.fc (x12)" in str(Report(rows, 1))


def test_html_escapes_and_shows_the_total() -> None:
    report = Report((replace(ROW, module="<lambda>"),), 32768)
    page = report._repr_html_()
    assert page.startswith("<table>") and "&lt;lambda&gt;" in page and "<lambda>" not in page
    assert "7.6x less" in page


def test_json() -> None:
    document = json.loads(Report((ROW,), 32768).to_json())
    assert document["ratio"] == 32768 / 4288
    (row,) = document["rows"]
    assert row["dtype"] == "float32" and row["shape"] == [64, 128] and row["stored_nbytes"] == 4288


def assert_nothing_overlaps(figure: "Figure") -> None:
    """All that is written in the picture lies inside of it, and apart from all else that is written."""
    figure.draw_without_rendering()
    axes = figure.axes
    texts = [t for ax in axes for t in (*ax.texts, ax.title, ax._left_title, ax.xaxis.label, ax.yaxis.label)]
    texts += [
        tick.label1
        for ax in axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in axis.get_major_ticks()
        if min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    ]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    written = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]
    for position, (text, box) in enumerate(written):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
        for other, place in written[position + 1 :]:
            assert not box.overlaps(place), (text, other)


@pytest.mark.parametrize("actions", [["quantize"], list(map(str, Action))], ids=["one", "all"])
def test_plot_of_every_action(actions: list[str]) -> None:
    pytest.importorskip("matplotlib")
    rows = tuple(
        replace(ROW, action=action, module=f"layer_with_a_long_name.{action}.projection") for action in actions
    )
    timelines = (Timeline(("a", "b", "c", "d"), (10, 20, 40, 5), 2),)
    assert_nothing_overlaps(Report(rows, 32768 * len(rows), timelines).plot())
    moved = replace(ROW, stored_nbytes=0, host_nbytes=4288, module="moved")
    figure = Report((*rows, moved), 32768 * len(rows), timelines).plot()
    assert_nothing_overlaps(figure)
    assert any("in the host's memory" in text.get_text() for text in figure.axes[0].texts)


@pytest.mark.parametrize("make", [gpt, resnet], ids=["gpt", "resnet"])
def test_plot(make: Callable[[], Task], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    task = make()
    report = actcompile.explain(lambda: task.loss(task.model))
    figure = report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert figure._repr_png_()[:4] == b"\x89PNG"  # type: ignore[attr-defined]
    total, tensors, memory = figure.axes
    groups = fold_layers([row for row in report.rows if row.counts])
    widths = [patch.get_width() * 2**20 for patch in tensors.patches if patch.get_width()]
    assert 10 < len(widths) <= 2 * (len(groups) + 1)
    exact, stored = widths[: len(widths) // 2], widths[len(widths) // 2 :]
    assert sum(exact) == pytest.approx(sum(row.nbytes for row in report.rows if row.counts))
    assert sum(stored) == pytest.approx(report.saved_nbytes)
    assert [patch.get_width() * 2**20 for patch in total.patches] == pytest.approx(
        [report.baseline_nbytes, report.saved_nbytes]
    )
    assert f"{report.ratio:.1f}x less" in total.get_title(loc="left")
    assert_nothing_overlaps(figure)
    (line,) = (line for line in memory.lines if len(line.get_ydata()) == len(report.timelines[0].live_nbytes))
    assert max(line.get_ydata()) == pytest.approx(report.timelines[0].peak_nbytes / 2**20)
    assert {"forward", "backward"} <= {text.get_text() for text in memory.texts}


def test_plot_of_nothing() -> None:
    pytest.importorskip("matplotlib")
    assert len(Report((), 0).plot().axes) == 3


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "actcompile._plot", raising=False)
    with pytest.raises(ImportError, match=r"pip install actcompile\[report\]"):
        Report((ROW,), 1).plot()
