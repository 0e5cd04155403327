"""What rounding each saved tensor adds to the gradient of one backward, or of one on a part of the batch."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ._dropped import Dropped
from ._pruned import PruningNoise
from ._slices import Groups
from ._sweep import Sweep
from .choices import CODE_BITS
from .passes._fx import graph_outputs
from .plan import Sensitivity
from .triton_kernels._hash import mix_seed
from .triton_kernels.pack_bool import packed_nbytes

unpack_bool = torch.ops.actcompile.unpack_bool.default

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rounding:
    """The rounding noise of one saved tensor.

    Args:
        variance: Of an element's noise, the mean over each group, at every width: [num_groups, len(CODE_BITS)].
        bits: Of the codes that are stored now.
        groups: Those of the elements that are read.
        dropped: What pruning would drop, where that is asked for.
    """

    variance: Tensor
    bits: int
    groups: Groups
    dropped: Dropped | None = None

    def weigh(self, cotangent: Tensor) -> list[float]:
        """For every width, the sum over all elements of the noise's variance times the cotangent's square."""
        return (self.groups.sums(cotangent.float().square()) @ self.variance.float()).tolist()

    def add_noise(self, value: Tensor, seed: int, bits: int | None = None) -> Tensor:
        """``value`` with noise as large as that of codes of ``bits``, those that are stored when left out."""
        deviation = self.variance[:, CODE_BITS.index(bits or self.bits)].float().sqrt()
        return torch.addcmul(value, self.groups.spread(deviation).to(value.dtype), draw(value, seed))


def measure(
    sweep: Sweep,
    targets: Mapping[fx.Node, int],
    keys: Mapping[fx.Node, str],
    roundings: Mapping[str, Rounding],
    seed: int,
    pruning: PruningNoise | None = None,
) -> dict[str, Sensitivity]:
    """Sensitivities by row key; needs ``run_and_keep`` or ``keep`` before it.

    Args:
        sweep: The backward.
        targets: Gradients that count, with their positions among the results.
        keys: Row keys of the leaves of ``sweep``; a tensor that is decoded twice has two.
        roundings: By row key.
        seed: Of the random direction.
        pruning: Takes what a product through the backward reaches.
    """
    products = _Products(keys, roundings, sweep.readers, pruning)
    unknown: set[str] = set()
    try:
        sweep.pull_back(targets, lambda node, value: draw(value, mix_seed(seed, targets[node])), products.see)
        unknown = {keys[node] for node in sweep.behind_opaque()}
    except RuntimeError as error:
        log.warning("sensitivities are measured one by one, autograd refuses the backward graph: %s", error)
        unknown = set(keys.values())
    found = products.sensitivities()
    if unknown:
        exact = sweep.run()
        for key in unknown:
            found[key] = _perturbed(
                sweep, targets, exact, {n for n, k in keys.items() if k == key}, roundings[key], seed
            )
    return found


def measure_along(
    sweep: Sweep,
    directions: Mapping[fx.Node, Tensor],
    keys: Mapping[fx.Node, str],
    roundings: Mapping[str, Rounding],
) -> dict[str, dict[int, float]] | None:
    """By row key and bits, the variance of the gradient's component along ``directions``, exact to first order.

    None where some tensor reaches it through what autograd cannot differentiate. Needs ``run_and_keep`` before it.
    """
    products = _Products(keys, roundings, sweep.readers, None)
    try:
        sweep.pull_back(directions, lambda node, value: directions[node].to(value.dtype), products.see)
    except RuntimeError:
        return None
    if sweep.behind_opaque():
        return None
    return {key: dict(found.variance) for key, found in products.sensitivities().items()}


def draw(value: Tensor, seed: int) -> Tensor:
    """Random signs in the shape and dtype of ``value``; no generator of torch's own is drawn from.

    Of all independent numbers of variance one, signs spread the squares of their products least: these are exact where
    a tensor reaches each number of the gradient by elements of its own.
    """
    generator = torch.Generator(value.device).manual_seed(seed)
    packed = torch.empty(packed_nbytes(value.numel()), dtype=torch.uint8, device=value.device)
    packed.random_(generator=generator)
    return unpack_bool(packed, value.shape).to(value.dtype).mul_(2).sub_(1)


def _perturbed(
    sweep: Sweep,
    targets: Mapping[fx.Node, int],
    exact: list[Tensor],
    leaves: set[fx.Node],
    rounding: Rounding,
    seed: int,
) -> Sensitivity:
    """From the change of the gradient by noise in one tensor."""
    noisy = sweep.run({node: lambda value: rounding.add_noise(value, seed) for node in leaves})
    positions = {node: position for position, node in enumerate(graph_outputs(sweep.graph))}
    change = sum(float((noisy[positions[n]] - exact[positions[n]]).float().square().sum()) for n in targets)
    totals = rounding.variance.float()[rounding.groups.ids().reshape(-1)].sum(0).tolist()
    per_unit = change / max(totals[CODE_BITS.index(rounding.bits)], torch.finfo(torch.float32).tiny)
    return Sensitivity({bits: per_unit * total for bits, total in zip(CODE_BITS, totals, strict=True)}, "perturbed")


class _Products:
    """Sums up the cotangents of each tensor, and weighs their squares once all of them are there."""

    def __init__(
        self,
        keys: Mapping[fx.Node, str],
        roundings: Mapping[str, Rounding],
        readers: Mapping[fx.Node, Callable[[], Tensor]],
        pruning: PruningNoise | None,
    ) -> None:
        self._keys = keys
        self._roundings = roundings
        self._pruning = pruning
        # Several decodings of a tensor give the same.
        self._readers = {key: readers[node] for node, key in keys.items()}
        self._pending = {key: list(keys.values()).count(key) for key in keys.values()}
        self._sums: dict[str, Tensor] = {}
        self._variances: dict[str, list[float]] = {}

    def see(self, node: fx.Node, cotangent: Tensor) -> None:
        """Takes one decoding's cotangent; a tensor that is decoded twice has their sum."""
        key = self._keys[node]
        self._sums[key] = self._sums[key] + cotangent if key in self._sums else cotangent
        self._pending[key] -= 1
        if self._pending[key] == 0:
            self._finish(key)

    def sensitivities(self) -> dict[str, Sensitivity]:
        """Of every tensor; what no cotangent reached has none."""
        for key in list(self._sums):
            self._finish(key)
        nothing = [0.0] * len(CODE_BITS)
        return {
            key: Sensitivity(dict(zip(CODE_BITS, self._variances.get(key, nothing), strict=True)), "probed")
            for key in self._pending
        }

    def _finish(self, key: str) -> None:
        cotangent = self._sums.pop(key)
        self._variances[key] = self._roundings[key].weigh(cotangent)
        dropped = self._roundings[key].dropped
        if dropped is not None and self._pruning is not None:
            self._pruning.weigh(key, self._readers[key](), cotangent, dropped)
