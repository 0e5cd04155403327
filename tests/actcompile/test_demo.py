"""The demo in miniature: real text, several runs, and what it leaves behind."""

import csv
from pathlib import Path

import pytest
import torch

from actcompile._demo_output import results_table
from actcompile._text import held_out_batches, load_corpus, training_batches
from actcompile.demo import Options, run_demo

PNG = b"\x89PNG"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty text files and one that is none."""
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"file {number}\n" + "some words to learn, " * 40)
    (tmp_path / "image.bin").write_bytes(b"\0\1\2\xff" * 400)
    return tmp_path


def test_files_are_held_out_whole(folder: Path) -> None:
    corpus = load_corpus(folder, tokens=32)
    train, held_out = (bytes(part.tolist()) for part in (corpus.train, corpus.held_out))
    names = [f"file {number}\n".encode() for number in range(20)]
    assert [name for name in names if name in held_out] == [names[9], names[19]]
    assert [name for name in names if name in train] == names[:9] + names[10:19]
    assert b"\xff" not in train + held_out


def test_targets_are_the_next_bytes(folder: Path) -> None:
    corpus = load_corpus(folder, tokens=32)
    for tokens, targets in [
        next(training_batches(corpus, 4, 32, seed=0)),
        *held_out_batches(corpus, 4, 32, count=2),
    ]:
        assert tokens.shape == targets.shape == (4, 32)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_training_text_is_the_same_for_every_run(folder: Path) -> None:
    corpus = load_corpus(folder, tokens=32)
    first, again, other = (next(training_batches(corpus, 4, 32, seed=seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("content", ["", "short"])
def test_too_little_text_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ValueError, match=r"longer than one sequence of 32 bytes, got \d+ bytes"):
        load_corpus(tmp_path, tokens=32)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a folder"):
        load_corpus(tmp_path / "absent", tokens=32)


@pytest.mark.slow
def test_runs_are_measured_and_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(
        data=folder,
        steps=3,
        batch=4,
        tokens=64,
        layers=1,
        width=64,
        heads=2,
        runs=("compile", "act4"),
        out=tmp_path / "out",
        device="cpu",
    )
    baseline, compressed = run_demo(options)
    assert baseline.losses[0] == pytest.approx(compressed.losses[0], rel=1e-5)
    assert compressed.stored_nbytes < baseline.stored_nbytes / 4
    assert compressed.peak.peak_nbytes < baseline.peak.peak_nbytes
    assert results_table([baseline, compressed]) in capsys.readouterr().out
    with (options.out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["compile", "act4"]
    assert int(rows[1]["stored_nbytes"]) == compressed.stored_nbytes
    assert (options.out / "loss_curves.png").read_bytes().startswith(PNG)
    assert (options.out / "memory_timelines.png").read_bytes().startswith(PNG)
    page = (options.out / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 2 and "act, 4 bits" in page
