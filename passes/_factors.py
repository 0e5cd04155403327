"""Factors of gradients: what they are made of, and which of them belong together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ._fx import hint
from ._noise import SMALLEST_GROUP, Kind, Noise

# A factor: a node, a number, or an operator on factors.
Factor = fx.Node | float | tuple[Any, ...]


@dataclass(frozen=True)
class Product:
    """``base``, a node or one that is repeated, times ``factor``; ``steps`` are the nodes between."""

    base: Any
    factor: Factor
    steps: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Group:
    """Factors ``over`` and divisors ``under``, made of the same elements, and zero where one of ``masks`` says so."""

    origins: frozenset[Any]
    over: list[Factor]
    under: list[Factor]
    masks: tuple[tuple[Any, ...], ...] = ()


def _parts(factor: Factor) -> set[fx.Node]:
    """What ``factor`` is made of, masks left out."""
    if isinstance(factor, fx.Node):
        return set() if factor.meta["val"].dtype == torch.bool else {factor}
    if isinstance(factor, tuple) and factor[0] == "spread":
        return _parts(factor[2])
    return set().union(*map(_parts, factor[1:])) if isinstance(factor, tuple) else set()


def is_worth_it(group: Group) -> bool:
    """Whether there is more to a factor than one value as it was computed."""
    if not group.origins:
        return False
    pieces = [*group.over, *group.under]
    return (
        bool(group.under or group.masks)
        or len(pieces) > 1
        or any(isinstance(piece, tuple) and _has_choice(piece) for piece in pieces)
    )


def _has_choice(factor: Factor) -> bool:
    """Whether it has a divisor, is a sum, or selects more than a mask's zero."""
    if not isinstance(factor, tuple):
        return False
    kind, *operands = factor
    if kind == "spread":
        return _has_choice(operands[1])
    is_one = kind in ("add", "sub", "div") or (kind == "where" and 0.0 not in operands[1:])
    return is_one or any(map(_has_choice, operands))


def groups_of(node: fx.Node, product: Product, noise: Noise) -> list[Group]:
    """The factors of a product, in groups that are made of different elements; one group is exact."""
    over: list[Factor] = []
    under: list[Factor] = []
    _flatten(product.factor, over, under)
    masks = [piece for piece in over if isinstance(piece, tuple) and _is_mask(piece)]
    over = [piece for piece in over if not _is_mask(piece)]
    groups = [Group(frozenset(), [], [])]
    for piece, is_over in [*((piece, True) for piece in over), *((piece, False) for piece in under)]:
        origins = frozenset().union(*(noise.origins(part) for part in _parts(piece)))
        group = Group(origins, [piece], []) if is_over else Group(origins, [], [piece])
        alike = [one for one in groups if (one.origins & origins) or (not origins and not one.origins)]
        groups = [one for one in groups if one not in alike] + [_merged([*alike, group])]
    for mask in masks:
        groups = _masked(groups, mask, noise)
    exact = [group for group in groups if not group.origins]
    noisy = [group for group in groups if group.origins]
    if noisy and any(_is_of_short_rows(node, piece) for group in noisy for piece in group.over):
        noisy = [_merged(noisy)]
    return [*exact, *noisy]


def _is_mask(piece: Factor) -> bool:
    """Whether it is a number where a mask says so, and zero elsewhere."""
    if not isinstance(piece, tuple) or piece[0] != "where":
        return False
    return 0.0 in piece[2:] and all(isinstance(value, int | float) for value in piece[2:])


def _masked(groups: Sequence[Group], mask: tuple[Any, ...], noise: Noise) -> list[Group]:
    """``groups``, of which those with a cut made of what ``mask`` is made of select; else it is a factor as others."""
    _, condition, left, right = mask
    origins = noise.origins(condition)
    alike = [
        group
        for group in groups
        if group.origins & origins and (group.under or any(noise.kind(root) is Kind.CUT for root, _ in group.origins))
    ]
    ones = ("where", condition, float(left != 0), float(right != 0))
    rest = left + right if alike else mask
    return [
        replace(group, masks=(*group.masks, ones))
        if group in alike
        else (group if group.origins or rest == 1.0 else replace(group, over=[*group.over, rest]))
        for group in groups
    ]


def _merged(groups: Sequence[Group]) -> Group:
    return Group(
        frozenset().union(*(group.origins for group in groups)),
        [piece for group in groups for piece in group.over],
        [piece for group in groups for piece in group.under],
        tuple(mask for group in groups for mask in group.masks),
    )


def _is_of_short_rows(node: fx.Node, piece: Factor) -> bool:
    """Whether a factor is one for each row, and groups cannot end where rows do."""
    if not isinstance(piece, tuple) or piece[0] != "spread":
        return False
    numel = max((hint(part.meta["val"].numel()) for part in _parts(piece)), default=0)
    length = hint(node.meta["val"].numel()) // max(1, numel)
    return length > 1 and length % SMALLEST_GROUP != 0


def _flatten(factor: Factor, over: list[Factor], under: list[Factor]) -> None:
    if isinstance(factor, tuple) and factor[0] == "mul":
        _flatten(factor[1], over, under)
        _flatten(factor[2], over, under)
    elif isinstance(factor, tuple) and factor[0] == "div":
        _flatten(factor[1], over, under)
        _flatten(factor[2], under, over)
    elif isinstance(factor, tuple) and factor[0] == "neg":
        _flatten(factor[1], over, under)
        over.append(-1.0)
    elif factor != 1.0:
        over.append(factor)
