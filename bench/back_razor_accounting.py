"""ViT-B/16 counted as Back Razor's profiler counts: bytes for the backward, and parameters in fp32.

Per layer, with T tokens and width W, the profiler charges

    2 LayerNorm inputs             T * W each
    query, key and value input     T * W each, though it is one tensor
    Q, K, V                        T * W each: the operands of QK^T, and V of PV
    softmax output                 heads * T * T
    attention-output input         T * W
    fc1 input, GELU input          T * W, T * 4W
    fc2 input                      T * 4W

and once the image. Its peak is the most that is alive in the forward: that of the last layer's fc2, where the input and
output of fc2 and the residual are added to all that was charged before. Gradients, optimizer state and temporaries of
the backward count nothing. Back Razor's values are charged as the profiler does it: LayerNorm's in fp32 beside 16-bit
ones, GELU's input dense, the values of linear layers in half a byte where 8 bits were meant (it halves them for fp16
first), and no mask keeps more than its share. The profiler's MB are 2**20 bytes, and so are all here.

Ours is what ``actcompile.explain`` reports for the same batch, traced whole: saved bytes are affine in the batch only
from where no tensor is below ``min_numel`` any more and all fill whole groups. To that are added what the profiler
charges beyond: the images, and, for the peak, the same fc2 beside everything that is stored, the last layer's too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate

import actcompile
from actcompile import Config
from actcompile.reporting import Report

from .harness import MIB, append_row, read_rows

BATCH = 128
_IMAGE_SIZE, _PATCH_SIZE, _WIDTH, _FF, _HEADS, _LAYERS = 224, 16, 768, 3072, 12, 12
_TOKENS = (_IMAGE_SIZE // _PATCH_SIZE) ** 2 + 1
_IMAGE_NBYTES = 4 * 3 * _IMAGE_SIZE**2
# CIFAR-10's, of their scripts.
_CLASSES = 10
DENSE_ROW = "dense fp32"


@dataclass(frozen=True)
class Charge:
    """What the profiler charges for an element of each kind.

    Args:
        density: Share of elements that are kept; GELU's input is never pruned.
        linear: Bytes of a kept value of a linear layer's input.
        attention: Bytes of a kept value of Q, K, V and of the softmax output.
        norm: Bytes of a kept value of LayerNorm's input.
        gelu: Bytes of an element of GELU's input.
        mask_bits: Bits of the mask per element, kept or not.
    """

    density: float = 1
    linear: float = 4
    attention: float = 4
    norm: float = 4
    gelu: float = 4
    mask_bits: int = 0

    def pruned(self, numel: int, value_nbytes: float) -> float:
        """Bytes of a tensor of which the largest elements are kept."""
        return numel * (self.density * value_nbytes + self.mask_bits / 8)

    def kept_nbytes(self) -> float:
        """Bytes per sample that the backward of all layers needs, and the image."""
        x = _TOKENS * _WIDTH
        linear = 5 * self.pruned(x, self.linear) + self.pruned(_TOKENS * _FF, self.linear)
        attention = 3 * self.pruned(x, self.attention) + self.pruned(_HEADS * _TOKENS**2, self.attention)
        other = 2 * self.pruned(x, self.norm) + _TOKENS * _FF * self.gelu
        return _LAYERS * (linear + attention + other) + _IMAGE_NBYTES

    def peak_nbytes(self) -> float:
        """The most bytes per sample in the forward: at the last fc2, whose own input is not charged yet."""
        return self.kept_nbytes() - self.pruned(_TOKENS * _FF, self.linear) + FC2_NBYTES


# Input and output of fc2 and the residual, per sample.
FC2_NBYTES = 4 * _TOKENS * (_FF + 2 * _WIDTH)

THEIRS: Mapping[str, Charge] = {
    DENSE_ROW: Charge(),
    **{
        f"Back Razor {sparsity:.0%}, fp16": Charge(1 - sparsity, linear=2, attention=2, norm=4, gelu=2, mask_bits=1)
        for sparsity in (0.8, 0.9, 0.95, 0.97)
    },
    **{
        f"Back Razor {sparsity:.0%}, 8 bits": Charge(1 - sparsity, linear=0.5, attention=1, norm=1, gelu=1, mask_bits=1)
        for sparsity in (0.8, 0.9, 0.97)
    },
}

COMPILED_ROW = "torch.compile fp32"
OURS: Mapping[str, Config] = {
    "act 80%, 8-bit values": Config(sparsity=0.8, sparse_value_bits=8),
    "act 90%, 8-bit values": Config(sparsity=0.9, sparse_value_bits=8),
    "act 80%, 8-bit values, 2 bits": Config(sparsity=0.8, sparse_value_bits=8, bits=2),
    "act 4 bits": Config(bits=4),
    "act 2 bits": Config(bits=2),
}


def make_vit(**settings: Any) -> torch.nn.Module:
    """ViT-B/16 of transformers in training; ``settings`` are fields of its config."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**{"num_labels": _CLASSES, "problem_type": "single_label_classification", **settings})
    return ViTForImageClassification(config).train()


def explain_vit(model: torch.nn.Module, batch: int, config: Config) -> Report:
    """The report on a step with a batch of images, of which none is computed."""
    size = model.config.image_size  # type: ignore[union-attr]
    images, labels = torch.zeros(batch, 3, size, size), torch.zeros(batch, dtype=torch.long)  # type: ignore[call-overload]
    return actcompile.explain(model, images, labels=labels, config=config)


def run() -> None:
    """Appends a row per way to store and prints them all."""
    model = make_vit()
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    for name, charge in THEIRS.items():
        _append(name, charge.kept_nbytes() * BATCH, charge.peak_nbytes() * BATCH, parameters)
    for name, config in OURS.items():
        report = explain_vit(model, BATCH, config)
        if name == next(iter(OURS)):
            _append_ours(COMPILED_ROW, report.baseline_nbytes, parameters)
        _append_ours(name, report.saved_nbytes, parameters)
    print_table()


def _append_ours(name: str, saved_nbytes: int, parameter_nbytes: int) -> None:
    kept = saved_nbytes + BATCH * _IMAGE_NBYTES
    _append(name, kept, kept + BATCH * FC2_NBYTES, parameter_nbytes)


def _append(name: str, kept_nbytes: float, peak_nbytes: float, parameter_nbytes: int) -> None:
    row = {
        "method": name,
        "batch": BATCH,
        "kept_nbytes": round(kept_nbytes),
        "peak_nbytes": round(peak_nbytes),
        "parameter_nbytes": parameter_nbytes,
    }
    append_row("back_razor_accounting", row)
    print(name, f"{(peak_nbytes + parameter_nbytes) / MIB:.0f}", flush=True)


def print_table() -> None:
    """Per sample and in all, by the profiler's peak and by what is kept alone."""
    rows = read_rows("back_razor_accounting", ("method", "batch"))
    dense = next(row for row in rows if row["method"] == DENSE_ROW)
    table = []
    for row in rows:
        cells: list[str] = [row["method"]]
        for column in ("peak_nbytes", "kept_nbytes"):
            total, base = (int(one[column]) + int(one["parameter_nbytes"]) for one in (row, dense))
            sample = int(row[column]) / int(row["batch"]) / MIB
            cells += [f"{sample:.1f}", f"{total / MIB:,.0f}", f"{base / total:.2f}x"]
        table.append(cells)
    print("\nViT-B/16, batch 128, MB of 2**20 bytes: peak of the forward, and what is kept for the backward")
    headers = ("stored as", "peak, sample", "with parameters", "less", "kept, sample", "with parameters", "less")
    print(tabulate(table, headers, disable_numparse=True))
