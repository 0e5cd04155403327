"""Tables of measured times: what they answer, how they grow."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from actcompile.triton_kernels import _weight_grad_times as times
from actcompile.triton_kernels._weight_grad_times import Product, Times

DEVICE = torch.device("cuda", 0)
PRODUCT = Product("Some GPU", 8192, 1024, 4096, 4, 256, "bfloat16", 0)
WIDE = PRODUCT._replace(out_features=4096)


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A table of the user's own, on a machine that seems to have a GPU on which everything takes 1, 3 and 0.5 ms."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(times, "is_measurable", lambda device: device.type == "cuda")
    monkeypatch.setattr(times, "measure", lambda product, device: Times(1.0, 3.0, 0.5))
    times._known.cache_clear()
    yield times.user_table()
    times._known.cache_clear()


def fail(product: Product, device: torch.device) -> Times:
    raise RuntimeError("CUDA out of memory")


def test_measured_once_and_kept(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert times.inside_pays([PRODUCT], DEVICE)
    assert table.read_text().splitlines() == [
        "device,rows,out_features,in_features,bits,group_size,dtype,transposed,inside_ms,apart_ms,decode_ms",
        "Some GPU,8192,1024,4096,4,256,bfloat16,0,1,3,0.5",
    ]
    assert [path.name for path in table.parent.iterdir()] == [table.name]
    monkeypatch.setattr(times, "measure", fail)
    assert times.inside_pays([PRODUCT], DEVICE)
    times._known.cache_clear()
    assert times.find_times(PRODUCT, DEVICE) == Times(1.0, 3.0, 0.5)


def test_rows_of_other_processes_stay(table: Path) -> None:
    assert times.find_times(PRODUCT, DEVICE) is not None
    other = times.key(PRODUCT._replace(device="Another GPU"))
    times.extend_table(table, {other: Times(2.0, 1.0, 0.5)})
    assert times.find_times(WIDE, DEVICE) is not None
    assert list(times.read_table(table)) == [times.key(PRODUCT), other, times.key(WIDE)]


def test_one_decoding_serves_several_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice 1.2 ms inside of the products; 0.4 ms of decoding, and products of 1 and 0.9 ms apart."""
    found = {PRODUCT: Times(1.2, 1.4, 0.4), WIDE: Times(1.2, 1.3, 0.4)}
    monkeypatch.setattr(times, "measure", lambda product, device: found[product])
    assert times.inside_pays([PRODUCT], DEVICE) and times.inside_pays([WIDE], DEVICE)
    assert not times.inside_pays([PRODUCT, WIDE], DEVICE)


def test_slower_inside_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "measure", lambda product, device: Times(3.0, 3.0, 0.5))
    assert not times.inside_pays([PRODUCT], DEVICE)


def test_nothing_known_and_nothing_to_measure(
    table: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not times.inside_pays([PRODUCT], torch.device("cpu"))
    monkeypatch.setattr(times, "measure", fail)
    with caplog.at_level(logging.WARNING):
        assert not times.inside_pays([PRODUCT, WIDE], DEVICE)
    assert "could not be measured" in caplog.text and "CUDA out of memory" in caplog.text
    assert not table.exists()


def test_tf32_products_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = PRODUCT._replace(dtype="float32")
    assert times.inside_pays([exact], DEVICE)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert not times.inside_pays([exact], DEVICE) and times.inside_pays([PRODUCT], DEVICE)
    finally:
        torch.set_float32_matmul_precision(before)


def test_table_that_cannot_be_written(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    table.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        assert times.inside_pays([PRODUCT], DEVICE)
    assert "could not be written" in caplog.text


def test_other_columns_are_not_read(table: Path, caplog: pytest.LogCaptureFixture) -> None:
    table.parent.mkdir()
    table.write_text("device,rows\nSome GPU,1\n")
    with caplog.at_level(logging.WARNING):
        assert times.read_table(table) == {}
    assert "other columns" in caplog.text


def test_shipped_table_has_the_columns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        known = times.read_table(times.SHIPPED)
    assert not caplog.text
    assert all(inside > 0 and apart > decode > 0 for inside, apart, decode in known.values())


def test_candidates_compute_the_same() -> None:
    """What is timed: the gradient twice, and the decoded tensor."""
    for transposed in (0, 1):
        product = Product("cpu", 12, 5, 128, 4, 64, "float32", transposed)
        state = torch.get_rng_state()
        inside, apart, decode = (run() for run in times.candidates(product, torch.device("cpu")))
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(inside, apart)
        assert inside.shape == ((128, 5) if transposed else (5, 128)) and decode.shape == (12, 128)


@pytest.mark.gpu
def test_measure() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    inside_ms, apart_ms, decode_ms = times.measure(PRODUCT, torch.device("cuda"))
    assert inside_ms > 0 and apart_ms > decode_ms > 0
