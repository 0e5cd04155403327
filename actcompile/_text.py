"""The text that the demo trains on: the files of a folder as bytes, some held out."""

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Every tenth file is held out; of a folder with fewer files, the last tenth of each.
HOLD_OUT = 10
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes held out, both uint8 ``[N]``."""

    train: Tensor
    held_out: Tensor
    description: str


def load_corpus(folder: Path | None, tokens: int) -> Corpus:
    """Reads all text files below ``folder``, or the Python standard library's sources when left out.

    Args:
        folder: Any folder; files that are not UTF-8 are left out.
        tokens: Bytes of one training sequence, which the text has to be longer than.

    Raises:
        ValueError: For what is no folder, or too little text.
    """
    if folder is None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = [path for path in sorted(folder.rglob("*.py")) if not _NOT_LIBRARY & set(path.parts)]
    elif folder.is_dir():
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    else:
        raise ValueError(f"the data must be a folder of text files, got {str(folder)!r}")
    texts = [text for text in map(Path.read_bytes, files) if text and _is_text(text)]
    train, held_out = _split(texts)
    if min(len(train), len(held_out)) <= tokens:
        raise ValueError(
            f"the text must be longer than one sequence of {tokens} bytes, got {len(train)} bytes to train on and "
            f"{len(held_out)} held out from {len(texts)} text files in {str(folder)!r}: choose another folder"
        )
    description = f"{len(texts)} files of {folder}, {len(train) / 1e6:.1f} MB, {len(held_out) / 1e6:.1f} MB held out"
    return Corpus(_to_tensor(train), _to_tensor(held_out), description)


def training_batches(corpus: Corpus, batch: int, tokens: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows: token ids and the ids one further on, both int64 ``[batch, tokens]``."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(corpus.train) - tokens, (batch,), generator=generator)
        yield _windows(corpus.train, starts, tokens)


def held_out_batches(corpus: Corpus, batch: int, tokens: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` batches of windows at even distances over the held-out text."""
    starts = torch.linspace(0, len(corpus.held_out) - tokens - 1, batch * count, dtype=torch.float64).long()
    for part in starts.view(count, batch):
        yield _windows(corpus.held_out, part, tokens)


def _windows(text: Tensor, starts: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(tokens + 1)].long()  # [batch, tokens + 1]
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _split(texts: Sequence[bytes]) -> tuple[bytes, bytes]:
    if len(texts) >= HOLD_OUT:
        held_out = texts[HOLD_OUT - 1 :: HOLD_OUT]
        train = [text for index, text in enumerate(texts) if index % HOLD_OUT != HOLD_OUT - 1]
    else:
        ends = [len(text) - len(text) // HOLD_OUT for text in texts]
        train = [text[:end] for text, end in zip(texts, ends, strict=True)]
        held_out = [text[end:] for text, end in zip(texts, ends, strict=True)]
    return b"\n".join(train), b"\n".join(held_out)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


def _to_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
