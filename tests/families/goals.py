"""What a family must reach at 4 bits, and the families that may stay below, with the reason."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from tests.families import convolutions, generators, graphs, images, networks, objectives, texts
from tests.families.family import Family
from tests.families.measuring import Row

FAMILIES: tuple[Family, ...] = (
    *texts.FAMILIES,
    *images.FAMILIES,
    *networks.FAMILIES,
    *convolutions.FAMILIES,
    *generators.FAMILIES,
    *graphs.FAMILIES,
    *objectives.FAMILIES,
)

# Of the gradient at 4 bits with that of plain torch, and the error at 8 bits: this, or what rounding to 16 bits makes,
# as torch.compile's own error shows.
COSINE = 0.97
ERROR = 0.05
_OF_COMPILE = 1.5
# How many times less is stored than by torch.compile, by precision.
RATIOS: Mapping[str, float] = {"fp32": 7.0, "bf16": 3.5, "autocast": 3.5}
# The mean of a few draws on the exact gradient may be off by this or by chance, and what is stored from what the report
# says by that.
_BIAS = 0.05
_UNREPORTED = 0.02


@dataclass(frozen=True, kw_only=True)
class Exempt:
    """A family that may stay below a goal.

    Args:
        reason: Why.
        cosine: What it must reach instead.
        ratio: The same of bytes.
        has_loss_of_its_own: Whether something outside of the graphs stores as well, which no report counts.
    """

    reason: str
    cosine: float | None = None
    ratio: float | None = None
    has_loss_of_its_own: bool = False


_MASKS = "ReLU's backward reads a mask: one bit beside four of the code, 32 / 5.125 = 6.2 times less"
_POOLS = f"{_MASKS}; an index of max-pooling takes a byte"
_TANH = "tanh's derivative has codes of its own beside those of tanh"
_CTC = "torch runs the loss outside of the graph, and keeps what it computed"
_EDGES = "edges are integers of eight bytes, which are the caller's"

EXEMPT: Mapping[tuple[str, str], Exempt] = {
    ("mlp, ReLU", "fp32"): Exempt(reason=_MASKS, ratio=6.1),
    ("nerf", "fp32"): Exempt(reason=_MASKS, ratio=6.2),
    ("vq-vae", "fp32"): Exempt(reason=_MASKS, ratio=6.2),
    ("pointnet", "fp32"): Exempt(reason=f"{_MASKS}; another mask says where each maximum is", ratio=6.0),
    ("normalizing flow", "fp32"): Exempt(
        reason=f"{_MASKS}; the logarithm of each determinant is exact; {_TANH}", ratio=5.6
    ),
    ("resnet", "fp32"): Exempt(reason=_POOLS, ratio=5.9),
    ("vgg", "fp32"): Exempt(reason=_POOLS, ratio=5.1),
    ("mlp, Tanh", "fp32"): Exempt(reason=_TANH, ratio=3.8),
    ("neural ode", "fp32"): Exempt(reason=_TANH, ratio=5.09),
    ("gru by hand", "fp32"): Exempt(reason=_TANH, ratio=6.7),
    ("wavenet", "fp32"): Exempt(reason=_TANH, ratio=6.1),
    ("mixture density network", "fp32"): Exempt(reason=_TANH, ratio=3.9),
    ("kolmogorov-arnold", "fp32"): Exempt(reason="derivatives of its bumps have codes, six for each value", ratio=5.9),
    ("perceiver", "fp32"): Exempt(
        reason="queries that parameters alone make, one for each sample, and a mask of huge constants are exact",
        ratio=6.8,
    ),
    ("pyg GCNConv", "fp32"): Exempt(reason=_EDGES, ratio=6.9),
    ("pyg GATConv", "fp32"): Exempt(reason=_EDGES, ratio=6.8),
    ("pyg GATv2Conv", "fp32"): Exempt(reason=f"{_EDGES}; so is the input; {_MASKS}", ratio=5.0),
    ("peft dora, llama", "fp32"): Exempt(reason="at its graph breaks an attention mask in floats crosses", ratio=6.0),
    ("triplet loss, cdist", "fp32"): Exempt(
        reason="a quotient by distances, which may be near zero, is exact", ratio=5.5
    ),
    ("vae", "autocast"): Exempt(
        reason="its input, whose cast the loss reads again, is copied: others may write it before the backward",
        ratio=2.4,
    ),
    ("ctc", "fp32"): Exempt(reason=_CTC, ratio=6.8, has_loss_of_its_own=True),
    ("wav2vec2", "fp32"): Exempt(reason=_CTC, has_loss_of_its_own=True),
    ("hubert", "fp32"): Exempt(reason=_CTC, has_loss_of_its_own=True),
}


def complaints(row: Row) -> list[str]:
    """The goals that ``row`` misses; exemptions that it does not need count as well."""
    exempt = EXEMPT.get((row.family, row.precision), Exempt(reason=""))
    cosine, ratio = exempt.cosine or COSINE, exempt.ratio or RATIOS[row.precision]
    found = []
    if not row.finite:
        found.append("a loss, a gradient or a weight is not finite")
    error = max(ERROR, _OF_COMPILE * row.compile_error)
    if row.bits == 8 and not row.error <= error:
        found.append(f"error {row.error:.3g} at 8 bits, at most {error:.2g}")
    if row.bits == 4:
        if not row.cosine >= cosine:
            found.append(f"cosine {row.cosine:.4f} at 4 bits, at least {cosine}")
        off = max(_BIAS, 3 * row.projection_error)
        if not abs(row.projection - 1) <= off:
            found.append(f"the mean gradient is {row.projection:.3f} of the exact one, within {off:.2g} of 1")
        if not row.ratio >= ratio:
            found.append(f"{row.ratio:.2f} times less is stored, at least {ratio}")
        if exempt.cosine is not None and row.cosine >= COSINE:
            found.append(f"cosine {row.cosine:.4f} needs no exemption")
        if exempt.ratio is not None and row.ratio >= RATIOS[row.precision]:
            found.append(f"ratio {row.ratio:.2f} needs no exemption")
    if (
        not exempt.has_loss_of_its_own
        and abs(row.stored_nbytes - row.reported_nbytes) > _UNREPORTED * row.stored_nbytes
    ):
        found.append(f"{row.stored_nbytes} bytes are stored, {row.reported_nbytes} reported")
    return found


def is_installed(family: Family) -> bool:
    """Whether the package that the family comes from is there."""
    return not family.needs or importlib.util.find_spec(family.needs) is not None


def cases() -> list[tuple[Family, str]]:
    """Every family with every precision that it is measured in."""
    return [(family, precision) for family in FAMILIES for precision in RATIOS if precision == "fp32" or family.narrow]
