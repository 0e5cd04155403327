"""The segmented product against autograd on the whole graph."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from actcompile import _derivatives, _segments, _short
from actcompile._sweep import Sweep

from ..passes.pairs import trace


def deep(w: Tensor, x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + torch.tanh(F.layer_norm(x, (8,)) @ w)
    return x.square()


def attention(w: Tensor, x: Tensor) -> Tensor:
    q, k, v = (part.view(2, 4, 2, 4).transpose(1, 2) for part in (x @ w.repeat(1, 3)).split(8, dim=-1))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 4, 8) @ w


def pooled(w: Tensor, x: Tensor) -> Tensor:
    return F.max_pool2d(torch.conv2d(x.view(2, 1, 4, 8), w.view(4, 1, 4, 4)[:, :, :3, :3], padding=1).sin(), 2)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"deep": deep, "attention": attention, "pooled": pooled}


def sweep_of(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Sweep, list[fx.Node]]:
    """A backward whose leaves are copies of what was saved, and its gradients."""
    traced = trace(function, torch.randn(8, 8, requires_grad=True), torch.randn(2, 4, 8))
    traced.pair.forward.recompile()
    results = traced.pair.forward(*(value.detach() for value in traced.inputs))
    saved = results[len(traced.pair.user_outputs) :]
    graph = traced.pair.backward.graph
    leaves = []
    for slot in traced.pair.slots:
        if slot.placeholder.meta["val"].is_floating_point():
            users = list(slot.placeholder.users)
            with graph.inserting_before(next(node for node in graph.nodes if node.op == "call_function")):
                leaf = graph.call_function(torch.ops.aten.clone.default, (slot.placeholder,))
            leaf.meta["val"] = slot.placeholder.meta["val"]
            for user in users:
                user.replace_input_with(slot.placeholder, leaf)
            leaves.append(leaf)
    placeholders = graph.find_nodes(op="placeholder")
    tangents = [torch.randn(node.meta["val"].shape) for node in placeholders[len(saved) :]]
    arguments = dict(zip(placeholders, [*saved, *tangents], strict=True))
    (outputs,) = graph.output_node().args
    targets = [node for node in outputs if isinstance(node, fx.Node)]  # type: ignore[union-attr]
    sweep = Sweep(graph, frozenset(leaves))
    sweep.feed(arguments)
    return sweep, targets


def cut_into(sweep: Sweep, count: int) -> None:
    """Gives ``sweep`` about so many segments."""
    crossing, sizes = _segments.crossing_nbytes(sweep.nodes, sweep.leaves), _segments.new_nbytes(sweep.nodes)
    (places,) = _segments.starts(sweep.nodes, crossing, sizes, max(crossing), [count])
    sweep.segments = _segments.cut(sweep.nodes, sweep.leaves, places)


def cotangents(
    sweep: Sweep, targets: list[fx.Node], start: Callable[[Sweep], object] = Sweep.run_and_keep
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def see(node: fx.Node, cotangent: Tensor) -> None:
        assert node.name not in found
        found[node.name] = cotangent

    start(sweep)
    sweep.pull_back(targets, lambda node, value: torch.linspace(-1, 1, value.numel()).view(value.shape), see)
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("count", [2, 3, 7, 1000])
def test_segments_change_nothing(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_segments, "_COUNTS", (1,))
    sweep, targets = sweep_of(FUNCTIONS[name])
    assert len(sweep.segments) == 1
    whole = cotangents(sweep, targets)
    assert len(whole) > 1
    cut_into(sweep, count)
    assert len(sweep.segments) > 1
    torch.testing.assert_close(cotangents(sweep, targets), whole)
    assert not sweep._kept


def test_keeping_computes_no_more_than_the_product_starts_from() -> None:
    sweep, targets = sweep_of(deep)
    cut_into(sweep, 3)
    expected = cotangents(sweep, targets)
    computed: list[fx.Node] = []
    value = sweep._value
    sweep._value = lambda node, values: (computed.append(node), value(node, values))[1]  # type: ignore[func-returns-value, method-assign]
    sweep.run_and_keep()
    num_all = len(computed)
    computed.clear()
    sweep.keep()
    assert 0 < len(computed) < num_all
    assert not set(targets) & set(computed) and not set(sweep.segments[-1].nodes) & set(computed)
    torch.testing.assert_close(cotangents(sweep, targets, Sweep.keep), expected, rtol=0, atol=0)


def test_values_in_8_bits_between_segments_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_short, "_MIN_NUMEL", 1)
    sweep, targets = sweep_of(deep)
    cut_into(sweep, 3)
    exact = cotangents(sweep, targets)
    sweep._is_short = True
    found = cotangents(sweep, targets)
    assert found.keys() == exact.keys()
    errors = [float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact]
    assert 0 < max(errors) < 0.1


def test_whole_graph_is_what_autograd_says() -> None:
    sweep, targets = sweep_of(deep)
    values = {node: value.clone().requires_grad_() for node, value in sweep._arguments.items()}
    env = dict(values)
    for node in sweep.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    weights = [torch.linspace(-1, 1, env[node].numel()).view(env[node].shape) for node in targets]
    leaves = sorted(sweep.leaves, key=lambda node: node.name)
    expected = torch.autograd.grad([env[n] for n in targets], [values[n.args[0]] for n in leaves], weights)  # type: ignore[index]
    found = cotangents(sweep, targets)
    torch.testing.assert_close([found[node.name] for node in leaves], list(expected))


def test_results_are_those_of_the_graph() -> None:
    sweep, _ = sweep_of(deep)
    expected = fx.Interpreter(torch.nn.Module(), graph=sweep.graph).run(*sweep._arguments.values())
    expected = [value for value in expected if value is not None]
    for run in (sweep.run, sweep.run_and_keep):
        torch.testing.assert_close([value for value in run() if value is not None], expected, rtol=0, atol=0)


def test_changed_leaf_changes_the_results() -> None:
    sweep, _ = sweep_of(deep)
    leaf = next(iter(sweep.leaves))
    before, after = sweep.run(), sweep.run({leaf: lambda value: value + 1})
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True) if a is not None)


def test_operators_without_a_derivative_are_opaque(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_derivatives, "ATTENTION_BACKWARD", frozenset())
    sweep, targets = sweep_of(attention)
    found = cotangents(sweep, targets)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    assert [node.target for node in sweep.opaque] == [backward]
    assert sweep.behind_opaque() and sweep.behind_opaque() < sweep.leaves
    # What the gradient depends on in another way too is found as far as that goes.
    assert set(found) <= {node.name for node in sweep.leaves}


def test_segments_of_a_graph_with_the_same_nodes() -> None:
    sweep, targets = sweep_of(deep)
    cut_into(sweep, 3)
    expected = cotangents(sweep, targets)
    other = Sweep(sweep.graph, sweep.leaves)
    other.cut_like(sweep)
    assert len(other.segments) == len(sweep.segments) > 1
    other.feed(sweep._arguments)
    torch.testing.assert_close(cotangents(other, targets), expected, rtol=0, atol=0)
