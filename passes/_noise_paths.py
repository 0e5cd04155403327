"""Which saved tensors of a pair of graphs must come back exact, since noise in them would pass what nobody listed."""

from collections.abc import Iterable

from torch import fx

from ._fx import GraphPair, graph_outputs, tangent_dependent
from ._noise import Noise, delicate_nodes, name_of
from .pin_unstable import EXACT


def unsafe_placeholders(pair: GraphPair, noisy: Iterable[fx.Node]) -> dict[fx.Node, str]:
    """Placeholders of the backward that must be exact, with the reason; the others of ``noisy`` may have noise."""
    graph = pair.backward.graph
    dependent, results = tangent_dependent(graph), graph_outputs(graph)
    delicate_sources = delicate_nodes(pair.forward.graph.nodes)
    delicate = {slot.placeholder for slot in pair.slots if slot.source in delicate_sources}
    candidates = set(noisy)
    found = {
        slot.placeholder: f"rounding it would do harm: {slot.source.meta[EXACT]}"
        for slot in pair.slots
        if slot.placeholder in candidates and slot.source.meta.get(EXACT)
    }
    candidates -= found.keys()
    while True:
        noise = Noise(graph.nodes, dependent, candidates, results=results, delicate=delicate)
        demands = noise.demands()
        unsafe: dict[fx.Node, str] = {}
        for node, reason in demands.fixed.items():
            unsafe |= dict.fromkeys(noise.above([node]) & candidates, f"rounding it would do harm: {reason}")
        for node in demands.cuts:
            above = noise.above(noise.culprits(node)) & candidates
            unsafe |= dict.fromkeys(above, f"rounding it would do harm: {name_of(node)} may make more of an error")
        if not unsafe:
            return found
        found |= unsafe
        candidates -= unsafe.keys()
