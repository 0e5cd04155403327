"""What rounding noise in each saved tensor adds to the gradient, for all of them from one extra backward.

Let g be the gradient of the trainable parameters, computed by the backward graph from saved tensors x. Independent
rounding noise of variance V_i in the elements of one of them adds, to first order, the variance sum_i V_i |dg/dx_i|^2.
With random signs v over g, one vector-Jacobian product through the backward graph yields u = d<v, g>/dx for all saved
tensors at once, and E[u_i^2] = |dg/dx_i|^2. V_i depends on the bits and on where x_i lies between two levels; its mean
over each group is noted for every width while the forward encodes. One draw of v predicts the noise at every width.

    forward     interpreted; of each group that is encoded, the variance of its rounding noise at every width
    backward    interpreted; then, on the codes, the product for a few samples at a time, always with the same v
                (_batch.py, _slices.py), in segments (_sweep.py)
    pruning     what dropping small elements adds, from the same products and from the backward (_pruned.py)
    opaque      what only reaches the gradient through an operator without a derivative is measured instead: the
                backward runs once more with noise in that tensor alone (_measure.py)

A gradient is a sum over samples, and so is the variance that noise adds to it: some samples stand for all, by what they
count in it (_weights.py). For a few of them the product is taken once more with noise in all tensors, which says what
pairs of tensors on few bits add. Where samples cannot be told apart, the product takes the whole batch at once.

Source: GACT, section 4, whose rule needs three training steps per tensor; the product through the backward graph is
this project's.
"""

import functools
import logging
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from ._batch import find_batch
from ._dropped import GROUP, Dropped, dropped_moments, is_promising, shapes_of
from ._measure import Rounding, measure
from ._pruned import PruningNoise
from ._seeded import SeededInterpreter
from ._slices import Groups, Layout, Part, SlicedBackward, cut, decode, samples_meet, slice_backward
from ._sweep import Sweep
from ._tiles import call_node, find_tilings, ordered, run_graph
from ._torch import preserve_rng_state
from ._weights import bottleneck, squares
from .choices import CODE_BITS
from .distributed import num_ranks
from .passes._fx import ROW_KEY, GraphPair, graph_outputs, is_tensor
from .passes.place_codecs import DECODERS
from .plan import PAIR_BITS, Profile, Pruning, Role, Sensitivity
from .triton_kernels._chunked import rounding_variance
from .triton_kernels._hash import mix_seed

log = logging.getLogger(__name__)

quantize = torch.ops.actcompile.quantize.default
dequantize = torch.ops.actcompile.dequantize.default

# Shares of the batch that are probed: as it is stored, and with more noise. Beside the backward itself, a product
# takes as long as 2.6 more of its samples.
_SHARE = 0.75
_NOISY_SHARE = 0.125
# Whose gradients count.
_COUNTED = (Role.PARAMETER, Role.BOUNDARY, Role.INPUT)
# Bits at which shares of noise are found; they hardly depend on them.
_SHARE_BITS = 4
# Mixed into the seed of the next probe.
_NEXT = 2**31


class Probe:
    """Interprets a pair of graphs with codecs, and measures sensitivities in its first backward.

    Args:
        roles: Roles of the inputs of the graph; gradients of parameters count, and those handed to earlier graphs.
        seed: Of the random directions; no generator of torch's is drawn from.
        prunings: What tensors may be pruned to.
        rows: The share of rows that may be sampled of layer inputs.
        is_choosy: Whether pruning is measured only where it promises much, to save time.
    """

    def __init__(
        self,
        roles: Sequence[Role],
        seed: int = 0,
        prunings: Sequence[Pruning] = (),
        rows: float | None = None,
        is_choosy: bool = False,
    ) -> None:
        self.profile: Profile | None = None
        self.is_armed = True
        self.saw_finite = True
        self._roles = roles
        self._seed = seed
        self._prunings = prunings
        self._rows = rows
        self._is_choosy = is_choosy and rows is None
        self._rounding: dict[str, Tensor] = {}
        self._dropped: dict[str, Tensor] = {}
        self._pair: GraphPair | None = None
        self._nbytes = 0

    def see(self, pair: GraphPair, nbytes: int) -> None:
        """Takes the pair that is interpreted, and the bytes that its operators take beside what is stored; once."""
        if self._pair is None:
            self._pair, self._nbytes = pair, nbytes

    def arm(self) -> None:
        """Lets the next backward be probed, with another seed than those before."""
        self.is_armed = True
        self._seed = mix_seed(self._seed, _NEXT)

    def interpret(self, graph: fx.GraphModule, is_backward: bool) -> Callable[[list[Any]], Any]:
        """What is called in place of one of the two graphs, with its arguments in a list that it empties."""
        run = self._backward if is_backward else self._forward

        def call(args: list[Any]) -> Any:
            if not self.is_armed:
                return SeededInterpreter(graph).boxed_run(args)
            return run(graph, args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def _forward(self, graph: fx.GraphModule, args: list[Any]) -> Any:
        arguments = dict(zip(graph.graph.find_nodes(op="placeholder"), args, strict=True))
        args.clear()
        pieces, results = find_tilings(ordered(graph.graph)), graph_outputs(graph.graph)
        return run_graph(pieces, results, arguments, {}, self._note_rounding)

    def _note_rounding(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """The operator's result; of what is encoded, the rounding noise of every group is noted first."""
        if node.target is quantize:
            # bf16: the sum over many groups is what counts.
            args: Any = node.args
            x, key, group_size = values[args[0]], node.meta[ROW_KEY], args[2]
            noise = rounding_variance(x, CODE_BITS, group_size)
            self._rounding[key] = noise.bfloat16()
            if self._prunings and (not self._is_choosy or is_promising(x, noise, self._prunings, group_size)):
                self._dropped[key] = dropped_moments(x, shapes_of(self._prunings))
        return call_node(node, values)

    def _backward(self, graph: fx.GraphModule, args: list[Any]) -> Any:
        arguments = dict(zip(graph.graph.find_nodes(op="placeholder"), args, strict=True))
        args.clear()
        whole = _sweep_of(graph.graph)
        whole.feed(arguments)
        counted, handed = self._counted(graph.graph), self._counted(graph.graph, (Role.BOUNDARY,))
        sliced = self._sliced(whole)
        if sliced is None:
            whole = _sweep_of(graph.graph, is_short=True)
            whole.feed(arguments)
        noted = {node: key for node, key in _keys(whole).items() if key in self._dropped}
        pruning = PruningNoise(graph.graph, self._roles, noted, self._prunings, self._rows)
        if sliced is None:
            results = whole.run_and_keep(pruning.see)
            roundings = self._roundings(whole, _readers(whole))
            found = _measure(whole, counted, roundings, mix_seed(self._seed, 0), pruning)
            if 0 < len(handed) < len(counted):
                whole.keep()
                found = _with_shares(found, found, _measure(whole, handed, roundings, mix_seed(self._seed, 0), None))
            sensitivities = pruning.added_to(found)
        else:
            whole.note_readers()
            sensitivities, scale = self._sum_over_parts(sliced, whole, arguments, counted, handed, pruning)
            # What was saved is let go while the backward runs, as in compiled code.
            results = whole.run_last(pruning.see)
            sensitivities = pruning.added_to(sensitivities, scale)
        self._rounding.clear()
        self._dropped.clear()
        squares = {position: float(results[position].float().square().sum()) for position in counted}
        square, handed_square = sum(squares.values()), sum(squares[position] for position in handed)
        self.saw_finite = math.isfinite(square)
        if not self.saw_finite and num_ranks() == 1:
            # As in the first steps with a scaled loss. Ranks wait for each other's first probe.
            log.warning("the gradient is not finite: sensitivities are measured in the next backward")
            return results
        unknown = [
            key
            for key, found in sensitivities.items()
            if not all(math.isfinite(found.noise(bits)) for bits in CODE_BITS)
        ]
        if unknown:
            log.warning("sensitivities that are not finite are taken as unknown: %s", ", ".join(unknown))
        if len(handed) == len(counted):
            sensitivities = {key: replace(found, handed_on=1.0) for key, found in sensitivities.items()}
        known = {key: found for key, found in sensitivities.items() if key not in unknown}
        self.profile = Profile(known, square, handed_square)
        self.is_armed = False
        return results

    def _counted(self, graph: fx.Graph, counting: Sequence[Role] = _COUNTED) -> list[int]:
        """Positions among the results of gradients of parameters and of what earlier graphs computed."""
        return [
            position
            for position, (node, role) in enumerate(zip(graph_outputs(graph), self._roles, strict=False))
            if isinstance(node, fx.Node) and role in counting and is_tensor(node)
        ]

    def _sliced(self, whole: Sweep) -> SlicedBackward | None:
        """The backward of so few samples that the product takes no more bytes than it may; None for all at once."""
        # It runs operators that draw random numbers, which would shift those of the training.
        with preserve_rng_state():
            batch = None if self._pair is None else find_batch(self._pair)
        decoders = [node for node in whole.nodes if node.target in DECODERS]
        is_separable = batch is not None and all(node.name in batch[1] for node in decoders)
        if self._pair is None or batch is None or not is_separable or samples_meet(whole.graph, batch[1]):
            log.info("sensitivities are measured on the whole batch at once: no sample stands for others")
            return None
        size, dims = batch
        counts = [count for count in range(1, size + 1) if size % count == 0]
        count = next((count for count in counts if whole.nbytes / count <= self._nbytes), size)
        return None if count == 1 else slice_backward(self._pair, size, dims, count)

    def _sum_over_parts(
        self,
        sliced: SlicedBackward,
        whole: Sweep,
        arguments: Mapping[fx.Node, Any],
        counted: Sequence[int],
        handed: Sequence[int],
        pruning: PruningNoise,
    ) -> tuple[dict[str, Sensitivity], float]:
        """Sensitivities over the samples of the first parts of the batch, scaled to all of them, and that scale."""
        sweep, readers, dims = _sweep_of(sliced.graph, is_tiled=False), _readers(whole), sliced.dims
        sweep.cut_like(whole)
        given = {node.name: value for node, value in arguments.items()}
        length = sliced.size // sliced.count

        def measure_part(index: int, is_noisy: bool, targets: Sequence[int] = counted) -> dict[str, Sensitivity]:
            part = Part(index * length, length, sliced.size)
            placeholders = {node: given[node.name] for node in sliced.graph.find_nodes(op="placeholder")}
            values = {n: cut(v, dims[n.name], part) if n.name in dims else v for n, v in placeholders.items()}
            decoders = {node: readers[node.name] for node in sweep.nodes if node.name in readers}
            reading = {n: functools.partial(decode, r.func, r.args, dims[n.name], part) for n, r in decoders.items()}
            roundings = self._roundings(sweep, readers, part, dims)
            if is_noisy:
                for leaf in sweep.leaves:
                    key = leaf.meta[ROW_KEY]
                    salt = mix_seed(mix_seed(self._seed, index), zlib.crc32(key.encode()))
                    reading[leaf] = functools.partial(_read_with_noise, reading[leaf], roundings[key], salt)
            sweep.feed(values, reading)
            sweep.keep()
            # The same direction in all parts: a bias adds up over samples, and only then its square counts.
            takes = pruning if targets is counted and not is_noisy else None
            return _measure(sweep, targets, roundings, mix_seed(self._seed, 0), takes)

        num_parts, num_noisy = (math.ceil(share * sliced.count) for share in (_SHARE, _NOISY_SHARE))
        scale = _scale(whole, sliced, num_parts)
        exact = [measure_part(index, is_noisy=False) for index in range(num_parts)]
        noisy = [measure_part(index, is_noisy=True) for index in range(num_noisy)]
        found = {}
        for key, first in exact[0].items():
            noises = {bits: scale * sum(one[key].variance[bits] for one in exact) for bits in CODE_BITS}
            ratio = _ratio([one[key] for one in noisy], [one[key] for one in exact[:num_noisy]])
            found[key] = Sensitivity(noises, first.method, _excess(noises[PAIR_BITS], ratio))
        if 0 < len(handed) < len(counted):
            found = _with_shares(found, exact[0], measure_part(0, is_noisy=False, targets=handed))
        return found, scale

    def _roundings(
        self,
        sweep: Sweep,
        readers: Mapping[str, "functools.partial[Tensor]"],
        part: Part | None = None,
        dims: Mapping[str, int] | None = None,
    ) -> dict[str, Rounding]:
        """By row key; of ``part``, which lies along ``dims``, if that is all that is read."""
        found = {}
        for leaf in sweep.leaves:
            _, _, _, bits, group_size, shape, stride, _ = readers[leaf.name].args
            layout, dim = Layout(tuple(shape), tuple(stride)), None if dims is None else dims[leaf.name]
            key = leaf.meta[ROW_KEY]
            moments, dropped = self._dropped.get(key), None
            if moments is not None:
                dropped = Dropped(moments, shapes_of(self._prunings), Groups(layout, GROUP, dim, part))
            found[key] = Rounding(self._rounding[key], bits, Groups(layout, group_size, dim, part), dropped)
        return found


def _with_shares(
    found: Mapping[str, Sensitivity], all_parts: Mapping[str, Sensitivity], handed: Mapping[str, Sensitivity]
) -> dict[str, Sensitivity]:
    """``found`` with the shares of the noise that is handed on, ``handed`` of what ``all_parts`` say."""

    def share(key: str) -> float:
        noise = all_parts[key].variance[_SHARE_BITS]
        return min(1.0, handed[key].variance[_SHARE_BITS] / noise) if noise else 0.0

    return {key: replace(value, handed_on=share(key)) for key, value in found.items()}


def _scale(whole: Sweep, sliced: SlicedBackward, num_parts: int) -> float:
    """How many times what the first parts add all of them add."""
    node = bottleneck(whole.graph, sliced.dims)
    if node is not None:
        parts = squares(whole.value(node), sliced.dims[node.name], sliced.count)
        if sum(parts[:num_parts]):
            return sum(parts) / sum(parts[:num_parts])
    return sliced.count / num_parts


def _measure(
    sweep: Sweep,
    counted: Sequence[int],
    roundings: Mapping[str, Rounding],
    seed: int,
    pruning: PruningNoise | None,
) -> dict[str, Sensitivity]:
    outputs = graph_outputs(sweep.graph)
    targets = {outputs[position]: position for position in counted}
    return measure(sweep, targets, _keys(sweep), roundings, seed, pruning)


def _keys(sweep: Sweep) -> dict[fx.Node, str]:
    """Row keys of the leaves."""
    return {leaf: leaf.meta[ROW_KEY] for leaf in sweep.leaves}


def _read_with_noise(read: Callable[[], Tensor], rounding: Rounding, seed: int) -> Tensor:
    """What ``read`` gives, with the noise of few bits."""
    return rounding.add_noise(read(), seed, PAIR_BITS)


def _sweep_of(graph: fx.Graph, is_tiled: bool = True, is_short: bool = False) -> Sweep:
    return Sweep(graph, frozenset(graph.find_nodes(op="call_function", target=dequantize)), is_tiled, is_short)


def _readers(sweep: Sweep) -> dict[str, "functools.partial[Tensor]"]:
    return {node.name: reader for node, reader in sweep.readers.items()}


def _ratio(some: Sequence[Sensitivity], others: Sequence[Sensitivity]) -> float:
    """How many times the noise of ``others`` that of ``some`` is."""
    noise, usual = (sum(part.variance[PAIR_BITS] for part in parts) for parts in (some, others))
    return noise / usual if usual else 1.0


def _excess(noise: float, ratio: float) -> float:
    """What pairs of tensors add: queries and keys on few bits, say, more than each of them alone.

    To second order that is V_i V_j |d^2 g / dx_i dx_j|^2 for each pair. Where all tensors are rounded to few bits, the
    square of a product is larger by V_j |d^2 g / dx_i dx_j|^2, summed over j. The others are taken to have as many bits
    as the tensor itself, and each of a pair has half of what both add.

    Args:
        noise: Of the tensor on few bits, to first order.
        ratio: How many times as large the squares are where all tensors have few bits.
    """
    return max(0.0, ratio - 1) / 2 / noise if noise else 0.0
