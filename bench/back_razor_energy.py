"""Energy kept per stored bit: 1 - |x' - x|^2 / |x|^2 of tensors that were stored and read back.

Formats, all as the package stores them, scales, zero points, masks and positions counted:

    samples    the largest elements of each sample, in fp16: Back Razor's rule
    of 256     exactly so many of each 256 elements, values in 16 (bfloat16), 8 or 4 bits
    3:16 ...   the largest of each 16 or 4 elements
    n bits     codes of all elements, groups of 256, unbiased rounding

Where values are exact, this is the share of |x|^2 that pruning keeps. Unbiased rounding has about twice the squared
error of rounding to the nearest code, which is what makes its mean exact; pruning's error has no mean of zero. Energy
says how far tensors are off, and not gradients (``bench.pruning``).

Distributions are [16, 128, 768], but for softmax rows: GELU of a gaussian; gaussian with a scale per channel, itself
the exponential of a gaussian of deviation 1.5; softmax over 256 keys of scores of deviation 3. Real tensors are those
that the package encodes in a BERT of two layers, attention in plain math, after some training steps on SST-2; the
energy of a kind is the mean over its tensors.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

import actcompile  # noqa: F401  registers the operators
from actcompile.plan import Pruning
from actcompile.triton_kernels.sample_topk import prune_samples, restore_samples

from .cases import GROUP_SIZE, prepare
from .harness import append_row, read_rows

_CASE = "bert_plain"
# What the saved operators are in that model.
_KINDS = {
    "mul": "normalized",
    "exp": "softmax, before its sum",
    "view": "attention's output",
    "addmm": "GELU's input",
    "permute": "Q, K, V",
}
# Bytes stored, and what is read back.
Format = Callable[[Tensor], tuple[int, Tensor]]


def _samples(share: float) -> Format:
    def store(x: Tensor) -> tuple[int, Tensor]:
        parts = prune_samples(x, 1 - share, torch.float16)
        return sum(part.nbytes for part in parts), restore_samples(parts, x.shape, x.dtype)

    return store


def _blocks(keep: int, block: int, value_bits: int) -> Format:
    way = Pruning(keep, block, value_bits)

    def store(x: Tensor) -> tuple[int, Tensor]:
        parts = torch.ops.actcompile.sparsify(x, *way, torch.tensor(0), 0)
        dense = torch.ops.actcompile.densify(*parts, *way, x.shape, x.stride(), x.dtype)
        return sum(part.nbytes for part in parts), dense

    return store


def _codes(bits: int) -> Format:
    def store(x: Tensor) -> tuple[int, Tensor]:
        parts = torch.ops.actcompile.quantize(x, bits, GROUP_SIZE, torch.tensor(0), 0)
        dense = torch.ops.actcompile.dequantize(*parts, bits, GROUP_SIZE, x.shape, x.stride(), x.dtype)
        return sum(part.nbytes for part in parts), dense

    return store


FORMATS: Mapping[str, Format] = {
    "samples 20%, fp16": _samples(0.2),
    "samples 10%, fp16": _samples(0.1),
    **{f"20% of 256, {bits} bits": _blocks(51, 256, bits) for bits in (16, 8, 4)},
    **{f"10% of 256, {bits} bits": _blocks(26, 256, bits) for bits in (16, 8, 4)},
    **{f"2:4, {bits} bits": _blocks(2, 4, bits) for bits in (16, 8, 4)},
    **{f"3:16, {bits} bits": _blocks(3, 16, bits) for bits in (16, 8, 4)},
    **{f"2:16, {bits} bits": _blocks(2, 16, bits) for bits in (16, 8, 4)},
    **{f"{bits} bits": _codes(bits) for bits in (4, 3, 2, 1)},
}


def energy_kept(x: Tensor, stored: Tensor) -> float:
    """1 - |stored - x|^2 / |x|^2."""
    return 1 - float((stored.double() - x.double()).square().sum() / x.double().square().sum())


def synthetic() -> dict[str, Tensor]:
    """Tensors of the distributions of the module docstring, float32."""
    torch.manual_seed(0)
    shape = (16, 128, 768)
    gaussian = torch.randn(shape)
    return {
        "gaussian": gaussian,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample(torch.Size(shape)),
        "student-t3": torch.distributions.StudentT(3.0).sample(torch.Size(shape)),
        "GELU": F.gelu(gaussian),
        "outlier channels": gaussian * (1.5 * torch.randn(shape[-1])).exp(),
        "softmax rows": (3 * torch.randn(16, 4, 128, 256)).softmax(-1),
    }


def real(steps: int, data: Path) -> dict[str, list[Tensor]]:
    """Kind -> the tensors of that kind, with samples first."""
    case = prepare(_CASE, steps, data)
    replay, samples = case.replay(), len(case.batch[0])
    found: dict[str, list[Tensor]] = {}
    for row in replay.rows:
        # [samples * heads, ...] and [samples * tokens, ...] hold one sample after the other.
        x = replay.value(row.key).contiguous()
        found.setdefault(f"BERT: {_KINDS.get(row.op, row.op)}", []).append(x.view(samples, -1))
    return found


def run(steps: int, data: Path) -> None:
    """Appends a row per distribution and format and prints them all."""
    everything: dict[str, Iterable[Tensor]] = {name: [x] for name, x in synthetic().items()}
    everything.update(real(steps, data))
    for name, tensors in everything.items():
        for format_name, store in FORMATS.items():
            stored = [(x, *store(x)) for x in tensors]
            energies = [energy_kept(x, dense) for x, _, dense in stored]
            numel = sum(x.numel() for x, _, _ in stored)
            row = {
                "tensors": name,
                "format": format_name,
                "bits_per_element": round(8 * sum(nbytes for _, nbytes, _ in stored) / numel, 4),
                "energy": round(statistics.fmean(energies), 5),
                "smallest_energy": round(min(energies), 5),
            }
            append_row("back_razor_energy", row)
    print_table()


def print_table() -> None:
    """A row per format, from the most bits: bits on gaussian data, and the energy kept of each distribution."""
    rows = read_rows("back_razor_energy", ("tensors", "format"))
    names = list(dict.fromkeys(row["tensors"] for row in rows))
    cells = {(row["format"], row["tensors"]): row for row in rows}
    bits = {name: float(cells[name, names[0]]["bits_per_element"]) for name in FORMATS}
    table = [
        [name, f"{bits[name]:.2f}", *(f"{float(cells[name, other]['energy']):.3f}" for other in names)]
        for name in sorted(FORMATS, key=lambda name: -bits[name])
    ]
    print("\nEnergy kept")
    print(tabulate(table, ("format", "bits", *names), disable_numparse=True))
