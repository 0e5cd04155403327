"""Gradients of one backward on exact saved tensors, and on rounded ones: all of them, or one alone."""

import functools
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ._measure import Rounding, measure, measure_along
from ._slices import Groups, Layout
from ._sweep import Sweep
from .choices import CODE_BITS
from .passes._fx import ROW_KEY, graph_outputs
from .plan import Role
from .triton_kernels._chunked import rounding_variance

actcompile = torch.ops.actcompile
dequantize = actcompile.dequantize.default

# What reads elements or rows that are left of others: how much is missing is as the settings say.
_PRUNED = frozenset(
    {actcompile.densify.default, actcompile.sparse_weight_grad.default, actcompile.sampled_weight_grad.default}
)
_COUNTED = (Role.PARAMETER, Role.BOUNDARY, Role.INPUT)


class Exact(NamedTuple):
    """What the forward rounded, and how."""

    value: Tensor
    bits: int
    group_size: int
    salt: int


class Gradients:
    """One backward, whose saved tensors are exact or rounded.

    Args:
        graph: The backward.
        arguments: Of the call.
        exact: By row key, what it decodes.
        roles: Of the graph's inputs; gradients of parameters count, and of what may come from parameters.
        results: The exact gradients.

    ``compared`` are positions among the results of what is finite there and nothing pruned reaches, ``counted`` those
    of them that count.
    """

    def __init__(
        self,
        graph: fx.Graph,
        arguments: MutableMapping[fx.Node, Any],
        exact: Mapping[str, Exact],
        roles: Sequence[Role],
        results: Sequence[Any],
    ) -> None:
        self.exact = results
        leaves = frozenset(
            node
            for node in graph.find_nodes(op="call_function", target=dequantize)
            if node.meta[ROW_KEY] in exact and not any(user.target in _PRUNED for user in node.users)
        )
        self._exact = {leaf.meta[ROW_KEY]: exact[leaf.meta[ROW_KEY]] for leaf in leaves}
        self._sweep = Sweep(graph, leaves, is_tiled=False)
        self._arguments = arguments
        pruned = _reached_by_pruned(graph)
        outputs = [
            (position, node)
            for position, node in enumerate(graph_outputs(graph))
            if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor) and node not in pruned
        ]
        self.compared = [position for position, node in outputs if _is_finite(results[position])]
        counts = {position for position, role in enumerate(roles) if role in _COUNTED}
        self.counted = [position for position in self.compared if position in counts]
        self._nodes = dict(outputs)
        self.restored = self._run(())

    @property
    def keys(self) -> list[str]:
        """Row keys of what is rounded."""
        return list(self._exact)

    @property
    def mean_bits(self) -> float:
        """Of all codes."""
        numel = sum(exact.value.numel() for exact in self._exact.values())
        return sum(exact.bits * exact.value.numel() for exact in self._exact.values()) / numel

    def bits(self, key: str) -> int:
        """Of the codes of a row."""
        return self._exact[key].bits

    def of(self, keys: Collection[str]) -> list[Any]:
        """The results where these tensors alone come from their codes."""
        return self._run(keys)

    def rounded(self, draw: int) -> list[Any]:
        """The results with all tensors rounded anew."""
        return self._run((), {key: functools.partial(_round, exact, draw) for key, exact in self._exact.items()})

    def predicted(self, seed: int) -> dict[str, float]:
        """By row key, what each adds to E|g' - g|^2 over what is counted, to first order."""
        self._run((), is_kept=True)
        targets = {self._nodes[position]: position for position in self.counted}
        found = measure(self._sweep, targets, self._keys(), self._roundings, seed)
        return {key: found[key].variance[exact.bits] for key, exact in self._exact.items()}

    def spread_along(self, directions: Mapping[int, Tensor]) -> dict[str, float] | None:
        """By row key, what each adds to the variance of the gradient's component along ``directions``, which are given
        by position; None where that is not known.
        """
        self._run((), is_kept=True)
        targets = {self._nodes[position]: direction for position, direction in directions.items()}
        found = measure_along(self._sweep, targets, self._keys(), self._roundings)
        return None if found is None else {key: found[key][exact.bits] for key, exact in self._exact.items()}

    def _keys(self) -> dict[fx.Node, str]:
        return {leaf: leaf.meta[ROW_KEY] for leaf in self._sweep.leaves}

    @functools.cached_property
    def _roundings(self) -> dict[str, Rounding]:
        return {
            key: Rounding(
                rounding_variance(exact.value, CODE_BITS, exact.group_size),
                exact.bits,
                Groups(Layout(tuple(exact.value.shape), exact.value.stride()), exact.group_size),
            )
            for key, exact in self._exact.items()
        }

    def _run(
        self,
        decoded: Collection[str],
        given: Mapping[str, Callable[[], Tensor]] | None = None,
        is_kept: bool = False,
    ) -> list[Any]:
        """The results on exact tensors but for those that are decoded, or given."""
        readers = {}
        for leaf, key in self._keys().items():
            if key not in decoded:
                exact = functools.partial(_give, self._exact[key].value)
                readers[leaf] = (given or {}).get(key, exact)
        self._sweep.feed(self._arguments, readers)  # type: ignore[arg-type]
        return self._sweep.run_and_keep() if is_kept else self._sweep.run()


def _is_finite(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and bool(value.isfinite().all())


def _give(value: Tensor) -> Tensor:
    return value


def _round(exact: Exact, draw: int) -> Tensor:
    value, bits, group_size, salt = exact
    seed = torch.tensor(draw, device=value.device)
    codes = actcompile.quantize(value, bits, group_size, seed, salt)
    return actcompile.dequantize(*codes, bits, group_size, value.shape, value.stride(), value.dtype)


def _reached_by_pruned(graph: fx.Graph) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in _PRUNED or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached
