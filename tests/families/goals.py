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

# Of the gradient at 4 bits with that of plain torch, and the error at 8 bits.
COSINE = 0.97
ERROR = 0.05
# How many times less is stored than by torch.compile, by precision.
RATIOS: Mapping[str, float] = {"fp32": 7.0, "bf16": 3.5, "autocast": 3.5}
# The mean of a few draws on the exact gradient may be off by this, and what is stored from what the report says.
_BIAS = 0.05
_UNREPORTED = 0.02


@dataclass(frozen=True, kw_only=True)
class Exempt:
    """A family that may stay below a goal.

    Args:
        reason: Why.
        cosine: What it must reach instead.
        ratio: The same of bytes.
    """

    reason: str
    cosine: float | None = None
    ratio: float | None = None


_MASKS = "ReLU's backward reads a mask: one bit beside four of the code, 32 / 5.125 = 6.2 times less"
_POOLS = f"{_MASKS}; an index of max-pooling takes a byte"

EXEMPT: Mapping[tuple[str, str], Exempt] = {
    ("mlp, ReLU", "fp32"): Exempt(reason=_MASKS, ratio=6.1),
    ("nerf", "fp32"): Exempt(reason=_MASKS, ratio=6.2),
    ("vq-vae", "fp32"): Exempt(reason=_MASKS, ratio=6.2),
    ("normalizing flow", "fp32"): Exempt(
        reason=f"{_MASKS}; the logarithm of each determinant is exact; tanh's derivative has codes of its own",
        ratio=5.6,
    ),
    ("resnet", "fp32"): Exempt(reason=_POOLS, ratio=5.9),
    ("vgg", "fp32"): Exempt(reason=_POOLS, ratio=5.1),
}


def complaints(row: Row) -> list[str]:
    """The goals that ``row`` misses; exemptions that it does not need count as well."""
    exempt = EXEMPT.get((row.family, row.precision), Exempt(reason=""))
    cosine, ratio = exempt.cosine or COSINE, exempt.ratio or RATIOS[row.precision]
    found = []
    if not row.finite:
        found.append("a loss, a gradient or a weight is not finite")
    if row.bits == 8 and not row.error <= ERROR:
        found.append(f"error {row.error:.3g} at 8 bits, at most {ERROR}")
    if row.bits == 4:
        if not row.cosine >= cosine:
            found.append(f"cosine {row.cosine:.4f} at 4 bits, at least {cosine}")
        if not abs(row.projection - 1) <= _BIAS:
            found.append(f"the mean gradient is {row.projection:.3f} of the exact one, within {_BIAS} of 1")
        if not row.ratio >= ratio:
            found.append(f"{row.ratio:.2f} times less is stored, at least {ratio}")
        if exempt.cosine is not None and row.cosine >= COSINE:
            found.append(f"cosine {row.cosine:.4f} needs no exemption")
        if exempt.ratio is not None and row.ratio >= RATIOS[row.precision]:
            found.append(f"ratio {row.ratio:.2f} needs no exemption")
    if abs(row.stored_nbytes - row.reported_nbytes) > _UNREPORTED * row.stored_nbytes:
        found.append(f"{row.stored_nbytes} bytes are stored, {row.reported_nbytes} reported")
    return found


def is_installed(family: Family) -> bool:
    """Whether the package that the family comes from is there."""
    return not family.needs or importlib.util.find_spec(family.needs) is not None


def cases() -> list[tuple[Family, str]]:
    """Every family with every precision that it is measured in."""
    return [(family, precision) for family in FAMILIES for precision in RATIOS if precision == "fp32" or family.narrow]
