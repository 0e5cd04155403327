"""The passes, in order, and their runner."""

import logging
import time
from collections import Counter
from collections.abc import Callable

from torch import fx

from actcompile.plan import Plan

from ._fx import GraphPair
from .insert_codecs import insert_codecs
from .offload import offload_stored
from .pack_masks import pack_masks
from .place_codecs import place_codecs
from .recompute import recompute_saved
from .sample_rows import sample_rows
from .sparsify_linear import sparsify_linear
from .verify import verify

log = logging.getLogger(__name__)

Pass = Callable[[GraphPair, Plan], None]

PIPELINE: tuple[Pass, ...] = (
    recompute_saved,
    insert_codecs,
    sparsify_linear,
    sample_rows,
    pack_masks,
    place_codecs,
    offload_stored,
)


def run_passes(pair: GraphPair, plan: Plan, passes: tuple[Pass, ...] = PIPELINE) -> None:
    """Rewrites ``pair`` by ``plan``, and lints, verifies, times and logs every pass.

    Raises:
        PassError: Naming the pass that failed and those that ran before it.
    """
    done: list[str] = []
    for apply in passes:
        before, start = _count(pair), time.perf_counter()
        try:
            apply(pair, plan)
            for module in (pair.forward, pair.backward):
                module.graph.lint()
            verify(pair, plan)
        except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise PassError(f"pass {apply.__name__} failed after {', '.join(done) or 'none'}: {error!r}") from error
        elapsed_ms = (time.perf_counter() - start) * 1e3
        log.debug("%s: %.1f ms, operators %s", apply.__name__, elapsed_ms, dict(_difference(before, _count(pair))))
        done.append(apply.__name__)
    for module in (pair.forward, pair.backward):
        module.graph.eliminate_dead_code()
        module.recompile()


class PassError(RuntimeError):
    """A rewrite that broke the graphs: a defect of this package, not of the model."""


def _count(pair: GraphPair) -> Counter[str]:
    graphs: tuple[fx.Graph, fx.Graph] = (pair.forward.graph, pair.backward.graph)
    return Counter(str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function")


def _difference(before: Counter[str], after: Counter[str]) -> Counter[str]:
    return Counter({name: after[name] - before[name] for name in before | after if after[name] != before[name]})
