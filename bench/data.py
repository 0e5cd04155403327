"""Real batches for the benchmarks that look at values: endless, shuffled, always the same.

    gpt, llama               the Python standard library's own sources, as in the demo
    bert                     sentences of SST-2, each word the id of its rank among the words of the file
    resnet, resnet18, vit    CIFAR-10
    gcn                      Cora, the whole graph every time

All but the first come from a folder that the user names. It holds ``glue/SST-2/train.tsv`` as GLUE distributes it,
``cifar10/*.npz`` with ``x`` uint8 ``[N, 32, 32, 3]`` and ``y`` uint8 ``[N]``, and ``cora/*.npz``, the data set of the
Planetoid split: ``edges [E, 2]``, each once, features in ``feat_row``, ``feat_col`` and ``feat_val``, ``label [N]`` and
``train_idx``.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from actcompile._text import load_corpus, training_batches

from .models import BERT_VOCABULARY, IGNORED, Batch

_PADDING, _START, _UNKNOWN, _NUM_SPECIAL = 0, 1, 2, 3


def real_batches(name: str, like: Batch, folder: Path) -> Iterator[Batch]:
    """Batches of the shapes of ``like`` for the workload ``name``.

    Args:
        name: Of a workload.
        like: A batch of that workload.
        folder: See the module docstring.

    Raises:
        FileNotFoundError: When ``folder`` lacks the files.
    """
    if name in ("gpt", "llama"):
        batch, tokens = like[0].shape
        return training_batches(load_corpus(None, tokens), batch, tokens, seed=0)
    if name == "bert":
        return _sentences(folder / "glue" / "SST-2" / "train.tsv", *like[0].shape)
    if name == "gcn":
        return itertools.repeat(_citations(folder / "cora"))
    return _images(folder / "cifar10", len(like[0]))


def _sentences(path: Path, batch: int, tokens: int) -> Iterator[Batch]:
    """Ids, attention masks and labels; sentences are padded to the same length."""
    if not path.exists():
        raise FileNotFoundError(
            f"the data must hold glue/SST-2/train.tsv, got none at {str(path)!r}: name it by --data"
        )
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    counts = Counter(word for text, _ in rows for word in text.split())
    ranks = {word: rank for rank, (word, _) in enumerate(counts.most_common(BERT_VOCABULARY - _NUM_SPECIAL))}
    for chosen in _shuffled(len(rows), batch):
        ids = torch.full((batch, tokens), _PADDING)
        for row, index in zip(ids, chosen.tolist(), strict=True):
            words = rows[index][0].split()[: tokens - 1]
            known = [ranks[word] + _NUM_SPECIAL if word in ranks else _UNKNOWN for word in words]
            row[: len(known) + 1] = torch.tensor([_START, *known])
        labels = torch.tensor([int(rows[index][1]) for index in chosen.tolist()])
        yield ids, (ids != _PADDING).long(), labels


def _images(folder: Path, batch: int) -> Iterator[Batch]:
    """Images fp32 ``[batch, 3, 32, 32]``, about in [-2, 2], and labels."""
    with np.load(_archive(folder)) as arrays:
        pixels, labels = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]).long()
    images = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    for chosen in _shuffled(len(images), batch):
        yield images[chosen].contiguous(), labels[chosen]


def _citations(folder: Path) -> Batch:
    """Features ``[N, F]`` with rows that sum to one, edges ``[2, E]``, their weights ``[E]``, and labels ``[N]``.

    Only nodes to train on have a label. The weights are those of D^-1/2 (A + I) D^-1/2, with the degrees D of A + I.
    """
    with np.load(_archive(folder)) as arrays:
        edges = torch.from_numpy(arrays["edges"]).long().T
        labels, training = (torch.from_numpy(arrays[name]).long() for name in ("label", "train_idx"))
        counts = np.zeros(arrays["shape"], np.float32)
        counts[arrays["feat_row"], arrays["feat_col"]] = arrays["feat_val"]
    features = F.normalize(torch.from_numpy(counts), p=1)
    loops = torch.arange(len(features)).expand(2, -1)
    edges = torch.cat([edges, edges.flip(0), loops], 1)
    scale = edges[0].bincount().rsqrt()
    known = torch.full_like(labels, IGNORED)
    known[training] = labels[training]
    return features, edges, scale[edges[0]] * scale[edges[1]], known


def _archive(folder: Path) -> Path:
    path = next(iter(sorted(folder.glob("*.npz"))), None)
    if path is None:
        raise FileNotFoundError(
            f"the data folder must hold {folder.name}/*.npz, got none in {str(folder)!r}: name it by --data"
        )
    return path


def _shuffled(count: int, batch: int) -> Iterator[Tensor]:
    """Endless batches of indices, each epoch in another order."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // batch * batch].view(-1, batch)
