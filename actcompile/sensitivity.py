"""What rounding noise in each saved tensor adds to the gradient, for all of them from one extra backward.

Let g be the gradient of the trainable parameters, computed by the backward graph from saved tensors x. Independent
rounding noise of variance V_i in the elements of one of them adds, to first order, the variance sum_i V_i |dg/dx_i|^2.
With v ~ N(0, I) over g, one vector-Jacobian product through the backward graph yields u = d<v, g>/dx for all saved
tensors at once, and E[u_i^2] = |dg/dx_i|^2. V_i depends on the bits and on where x_i lies between two levels; its mean
over each group is noted for every width while the forward encodes. One draw of v predicts the noise at every width.

    forward     interpreted; of each group that is encoded, the variance of its rounding noise at every width
    backward    interpreted; then the product, in segments (_sweep.py), on the decoded tensors
    opaque      what only reaches the gradient through an operator without a derivative is measured instead: the
                backward runs once more with noise in that tensor alone

Source: GACT, section 4, whose rule needs three training steps per tensor; the product through the backward graph is
this project's.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ._sweep import Sweep
from .config import CODE_BITS
from .passes._fx import ROW_KEY, graph_outputs
from .plan import Profile, Role, Sensitivity
from .triton_kernels._chunked import rounding_variance
from .triton_kernels._layout import from_storage_order, to_storage_order
from .triton_kernels.quantize import group

log = logging.getLogger(__name__)

quantize = torch.ops.actcompile.quantize.default
dequantize = torch.ops.actcompile.dequantize.default


class Probe:
    """Interprets a pair of graphs with codecs, and measures sensitivities in its first backward.

    Args:
        roles: Roles of the inputs of the graph; gradients of parameters count, and those handed to earlier graphs.
        seed: Of the random directions; no generator of torch's is drawn from.
    """

    def __init__(self, roles: Sequence[Role], seed: int = 0) -> None:
        self.profile: Profile | None = None
        self._roles = roles
        self._seed = seed
        self._rounding: dict[str, Tensor] = {}

    def interpret(self, graph: fx.GraphModule, is_backward: bool) -> Callable[[list[Any]], Any]:
        """What is called in place of one of the two graphs, with its arguments in a list that it empties."""
        run = self._backward if is_backward else self._forward

        def call(args: list[Any]) -> Any:
            if self.profile is not None:
                return fx.Interpreter(graph).boxed_run(args)
            return run(graph, args)

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def _forward(self, graph: fx.GraphModule, args: list[Any]) -> Any:
        return _RoundingNoted(graph, self._rounding).boxed_run(args)

    def _backward(self, graph: fx.GraphModule, args: list[Any]) -> Any:
        arguments = dict(zip(graph.graph.find_nodes(op="placeholder"), args, strict=True))
        args.clear()
        decoders = {node: node.meta[ROW_KEY] for node in graph.graph.nodes if node.target is dequantize}
        sweep = Sweep(graph.graph, arguments, frozenset(decoders))
        results = sweep.run_and_keep()
        targets = self._targets(graph.graph, results)
        found = _Squares(decoders, self._rounding)

        def draw(node: fx.Node, value: Tensor) -> Tensor:
            generator = torch.Generator(value.device).manual_seed(self._seed + targets[node])
            return torch.randn(value.shape, generator=generator, device=value.device).to(value.dtype)

        try:
            sweep.pull_back(targets, draw, found.see)
            unknown = {decoders[node] for node in sweep.behind_opaque()}
        except RuntimeError as error:
            log.warning("sensitivities are measured one by one, autograd refuses the backward graph: %s", error)
            unknown = set(decoders.values())
        sensitivities = found.sensitivities()
        gradients = {node: results[position] for node, position in targets.items()}
        for key in unknown:
            sensitivities[key] = self._measured(sweep, key, decoders, gradients)
        self.profile = Profile(sensitivities, sum(float(g.float().square().sum()) for g in gradients.values()))
        self._rounding.clear()
        return results

    def _targets(self, graph: fx.Graph, results: Sequence[Any]) -> dict[fx.Node, int]:
        """Gradients of parameters and of what earlier graphs computed, with their positions among the results."""
        counted = (Role.PARAMETER, Role.BOUNDARY)
        return {
            node: position
            for position, (node, role) in enumerate(zip(graph_outputs(graph), self._roles, strict=False))
            if isinstance(node, fx.Node) and role in counted and isinstance(results[position], Tensor)
        }

    def _measured(
        self, sweep: Sweep, key: str, decoders: Mapping[fx.Node, str], exact: Mapping[fx.Node, Tensor]
    ) -> Sensitivity:
        """From the change of the gradient by noise in one tensor, as large as that of its codes in training."""
        bits, group_size = next(_format(node) for node, name in decoders.items() if name == key)
        rounding = self._rounding[key].float()
        variance = rounding[:, CODE_BITS.index(bits)]

        def add_noise(value: Tensor) -> Tensor:
            flat = to_storage_order(value)
            generator = torch.Generator(value.device).manual_seed(self._seed)
            noise = torch.randn(flat.shape, generator=generator, device=flat.device)
            noise *= variance.sqrt().repeat_interleave(group_size)[: flat.numel()]
            return torch.empty_like(value).copy_(
                from_storage_order(flat + noise.to(flat.dtype), value.shape, value.stride())
            )

        noisy = sweep.run({node: add_noise for node, name in decoders.items() if name == key})
        positions = {node: position for position, node in enumerate(graph_outputs(sweep.graph))}
        change = sum(float((noisy[positions[n]] - g).float().square().sum()) for n, g in exact.items())
        per_unit = change / max(float(variance.sum()), torch.finfo(torch.float32).tiny)
        totals = rounding.sum(0).tolist()
        return Sensitivity({b: per_unit * t for b, t in zip(CODE_BITS, totals, strict=True)}, "perturbed")


def _format(decoder: fx.Node) -> tuple[int, int]:
    """Bits and group size."""
    _, _, _, bits, group_size, *_ = decoder.args
    assert isinstance(bits, int) and isinstance(group_size, int)
    return bits, group_size


class _RoundingNoted(fx.Interpreter):
    """Notes the rounding noise of every group that is encoded."""

    def __init__(self, graph: fx.GraphModule, rounding: dict[str, Tensor]) -> None:
        super().__init__(graph)
        self._rounding = rounding

    def run_node(self, n: fx.Node) -> Any:
        if n.target is quantize:
            args, _ = self.fetch_args_kwargs_from_env(n)
            # bf16: the sum over many groups is what counts.
            self._rounding[n.meta[ROW_KEY]] = rounding_variance(args[0], CODE_BITS, args[2]).bfloat16()
        return super().run_node(n)


class _Squares:
    """Sums the squares of cotangents over groups, weighted with their rounding noise."""

    def __init__(self, decoders: Mapping[fx.Node, str], rounding: Mapping[str, Tensor]) -> None:
        self._decoders = decoders
        self._rounding = rounding
        self._group_sizes = {key: _format(node)[1] for node, key in decoders.items()}
        self._pending = {key: list(decoders.values()).count(key) for key in decoders.values()}
        self._sums: dict[str, Tensor] = {}
        self._variances: dict[str, list[float]] = {}

    def see(self, node: fx.Node, cotangent: Tensor) -> None:
        """Takes one decoding's cotangent; a tensor that is decoded twice has their sum."""
        key = self._decoders[node]
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
        rounding = self._rounding[key].float()
        flat = to_storage_order(self._sums.pop(key)).float()
        group_size = self._group_sizes[key]
        squares = group(flat, group_size).square().sum(1)
        missing = -flat.numel() % group_size
        if missing:
            # The last group was filled up with copies of its last element.
            squares[-1] -= missing * flat[-1].square()
        self._variances[key] = (squares @ rounding).tolist()
