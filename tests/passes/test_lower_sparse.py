"""lower: pruned tensors on the CPU, and that nothing in a graph that prunes waits for values or has sizes from them."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import actcompile
from actcompile import Config, backend
from actcompile.passes import lower, run_passes
from actcompile.passes._fx import GraphPair
from actcompile.passes.fuse_weight_grad import fuse_weight_grad
from actcompile.passes.lower import lower_codecs, start_compiling_bodies
from actcompile.passes.sparsify_linear import sparsify_linear
from actcompile.plan import Action, Decision, Plan

from ..models import Task, bert, gpt, resnet
from .pairs import text, trace

aten = torch.ops.aten
TASKS: dict[str, Callable[[], Task]] = {"gpt": gpt, "bert": bert, "resnet": resnet}
PRUNE = Decision(Action.SPARSIFY, "test", bits=16, keep=51, block=256)

# What waits for the device to know a number, or has results whose sizes depend on values.
SYNCING = frozenset(
    {
        aten._local_scalar_dense.default,
        aten.item.default,
        aten.nonzero.default,
        aten.nonzero_static.default,
        aten.masked_select.default,
        aten._unique.default,
        aten._unique2.default,
        aten.unique_dim.default,
        aten.unique_consecutive.default,
        aten.is_nonzero.default,
        aten.equal.default,
        aten.repeat_interleave.Tensor,
        aten.argwhere.default,
    }
)
INDEXING = frozenset({aten.index.Tensor, aten.index_put.default, aten.index_put_.default})


def lowered(task: Task, config: Config, monkeypatch: pytest.MonkeyPatch) -> GraphPair:
    """The graphs of one step, as Inductor gets them."""
    found: list[GraphPair] = []

    def run(pair: GraphPair, plan: Plan) -> None:
        run_passes(pair, plan)
        lower_codecs(pair, plan)
        fuse_weight_grad(pair, plan)
        found.append(pair)

    with monkeypatch.context() as patched:
        patched.setattr(backend, "run_passes", run)
        actcompile.explain(lambda: task.loss(task.model), config=config)
    (pair,) = found
    return pair


def nodes(pair: GraphPair) -> Iterator[fx.Node]:
    for module in (pair.forward, pair.backward):
        yield from module.graph.nodes


def offence(node: fx.Node) -> str:
    """Why ``node`` could wait for values, or have sizes from them; nothing when it cannot."""
    if node.target in SYNCING or any(name in str(node.target) for name in ("nonzero", "masked_select", "unique")):
        return "its result depends on values"
    if node.target in INDEXING and any(
        isinstance(index, fx.Node) and index.meta["val"].dtype in (torch.bool, torch.uint8)
        for index in node.args[1]  # type: ignore[union-attr]
    ):
        return "it is indexed by a mask"
    values = node.meta.get("val")
    for value in values if isinstance(values, list | tuple) else [values]:
        sizes = (*value.shape, *value.stride()) if isinstance(value, torch.Tensor) else (value,)
        if any(isinstance(size, torch.SymInt | torch.SymFloat) and free_unbacked_symbols(size) for size in sizes):
            return "its size comes from values"
    return ""


FORMATS = [(51, 256, 16), (51, 256, 4), (2, 16, 8), (2, 16, 4), (26, 256, 8)]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("is_plan", [False, True], ids=["sparsity", "every row"])
def test_nothing_in_the_graphs_waits_for_values(name: str, is_plan: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    task, config = TASKS[name](), Config(sparsity=0.8, min_numel=0)
    if is_plan:
        plans: list[Plan] = []
        with monkeypatch.context() as patched:
            patched.setattr(backend, "run_passes", lambda pair, plan: (plans.append(plan), run_passes(pair, plan))[1])  # type: ignore[func-returns-value]
            actcompile.explain(lambda: task.loss(task.model), config=Config(min_numel=0))
        rows = [key for key, decision in plans[0].items() if decision.action is Action.QUANTIZE]
        decisions = {
            key: Decision(Action.SPARSIFY, "test", bits=bits, keep=keep, block=block)
            for number, key in enumerate(rows)
            for keep, block, bits in [FORMATS[number % len(FORMATS)]]
        }
        config = Config(plan=replace(plans[0], decisions={**plans[0], **decisions}), min_numel=0)
    pair = lowered(task, config, monkeypatch)
    targets = [node.target for node in nodes(pair)]
    num_encoders = targets.count(torch.ops.actcompile.sparsify_compiled.default)
    if is_plan:
        # Few are so small that codes take fewer bytes and pruned ones do not.
        assert num_encoders > 0.9 * len(rows) and torch.ops.actcompile.densify_compiled.default in targets
    assert num_encoders >= 2
    assert {str(node): offence(node) for node in nodes(pair) if offence(node)} == {}


@pytest.mark.parametrize("name", ["nonzero", "mask", "item"])
def test_what_waits_for_values_is_seen(name: str) -> None:
    """The walk above finds the operators that it looks for."""
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "nonzero": lambda x: x.nonzero(),
        "mask": lambda x: x[x > 0],
        "item": lambda x: x * x.sum().item(),
    }
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        graph = make_fx(functions[name], tracing_mode="symbolic")(torch.ones(4))
    assert any(offence(node) for node in graph.graph.nodes)


def test_pruned_tensors_point_to_their_compiled_bodies() -> None:
    x, w = torch.randn(64, 96), (torch.randn(32, 64) / 8).requires_grad_()
    images, kernel = torch.randn(2, 8, 8, 8), (torch.randn(4, 8, 3, 3) / 8).requires_grad_()

    def model(x: torch.Tensor, w: torch.Tensor, images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(torch.sin(x.t()), w)
        return y.square().sum() + torch.conv2d(torch.sin(images), kernel).square().sum()

    traced = trace(model, x.t().contiguous().t(), w, images, kernel)
    keep = Decision(Action.KEEP, "test")
    plan = Plan({row.key: PRUNE if row.is_layer_input else keep for row in traced.rows()})
    sparsify_linear(traced.pair, plan)
    before = text(traced.pair.forward), text(traced.pair.backward)
    assert before[0].count("= sparsify(") == 2 and before[1].count("= densify(") >= 1
    assert before[1].count("= sparse_weight_grad(") + before[1].count("= densify(") == 2
    lower_codecs(traced.pair, plan)
    after = text(traced.pair.forward), text(traced.pair.backward)
    for name in ("sparsify", "densify", "sparse_weight_grad"):
        before = tuple(graph.replace(f"= {name}(", f"= {name}_compiled(") for graph in before)  # type: ignore[assignment]
    assert after == before
    lower_codecs(traced.pair, plan)
    assert (text(traced.pair.forward), text(traced.pair.backward)) == after


def test_bodies_of_pruned_tensors_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(lower, "start_compiling_sparse", started.extend)
    x, w = torch.randn(16, 64, dtype=torch.bfloat16), torch.randn(32, 64, dtype=torch.bfloat16).requires_grad_()
    traced = trace(lambda x, w: torch.nn.functional.linear(torch.sin(x), w).square(), x, w)
    keep = Decision(Action.KEEP, "test")
    plan = Plan({row.key: PRUNE if row.is_layer_input else keep for row in traced.rows()})
    sparsify_linear(traced.pair, plan)
    start_compiling_bodies(traced.pair)
    assert started == []
    lower_codecs(traced.pair, plan)
    start_compiling_bodies(traced.pair)
    assert started == [(256, torch.bfloat16)]
