"""bench.kernels: rows of weight gradients, with times made up, and of sampled ones, with small operands."""

from pathlib import Path

import pytest

from actcompile.triton_kernels import _weight_grad_times as weight_grad_times
from bench import harness, kernels


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Results and the package's table are files of the test's own."""
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(weight_grad_times, "SHIPPED", tmp_path / "shipped.csv")


def test_nothing_is_measured_without_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weight_grad_times, "is_measurable", lambda device: False)
    assert list(kernels.weight_grad_rows(["bfloat16"], [4], ships=True)) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ships", [False, True])
def test_rows_of_weight_gradients(ships: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    times = weight_grad_times.Times(1.0, 1.5, 0.25)
    monkeypatch.setattr(weight_grad_times, "is_measurable", lambda device: True)
    monkeypatch.setattr(weight_grad_times, "device_name", lambda device: "Some GPU")
    monkeypatch.setattr(weight_grad_times, "measure", lambda product, device: times)
    rows = list(kernels.weight_grad_rows(["bfloat16"], [2, 4], ships))
    assert len(rows) == 2 * len(kernels.LAYERS)
    assert rows[1]["rows"] == 8192 and rows[1]["bits"] == 4 and rows[1]["speedup"] == 1.5
    assert len((tmp_path / "kernels_weight_grad.csv").read_text().splitlines()) == 1 + len(rows)
    assert len(weight_grad_times.read_table(weight_grad_times.SHIPPED)) == (len(rows) if ships else 0)


def test_rows_of_sampled_gradients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "SAMPLED", [(100, 16, 8)])
    (row,) = kernels.sampling_rows(["float32"], 2)
    assert (row["num_rows"], row["stored_ratio"]) == (30, 0.375)
    assert min(row["dense_ms"], row["sample_ms"], row["product_ms"], row["speedup"]) > 0
    assert len((tmp_path / "kernels_rows.csv").read_text().splitlines()) == 2
