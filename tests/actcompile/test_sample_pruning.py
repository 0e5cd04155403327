"""``pruning="samples"`` end to end: what a forward stored is measured, and every ordinary use works."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import actcompile
from actcompile import Config, ConfigError
from actcompile.reporting import ReportRow

from ..models import Task, bert, cosine, gpt, relative_error, resnet


def compiled(model: Callable[..., object], sparsity: float = 0.8, **options: object) -> Callable[..., Tensor]:
    options = {"pruning": "samples", "sparsity": sparsity, "lowering": "eager", **options}
    return torch.compile(model, backend="act", options=options)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 8), nn.Tanh())


def rows_of(model: nn.Module) -> list[ReportRow]:
    return [row for row in actcompile.report(model).rows if row.counts]


@pytest.mark.parametrize("make", [gpt, bert, resnet])
def test_models(make: Callable[[], Task]) -> None:
    """With nothing dropped, gradients are exact up to values in 16 bits; with 80% dropped they point the same way."""
    task = make()
    exact = task.gradients()
    whole = task.gradients(compiled(task.model, sparsity=0.0))
    assert 1e-6 < relative_error(whole, exact) < 1e-3
    torch._dynamo.reset()
    pruned = task.gradients(compiled(task.model))
    assert 0.8 < cosine(pruned, exact) < 0.98


def test_training_lowers_the_loss() -> None:
    task = gpt()
    step = torch.compile(task.model, backend="act", options={"config": Config.back_razor(0.8)})
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = task.loss(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_report_lists_what_was_stored() -> None:
    model, x = layers(), torch.randn(16, 64)
    compiled(model)(x).sum().backward()
    found = [(row.module, row.op, row.action, row.stored_nbytes, row.nbytes) for row in rows_of(model)]
    # Of 64 elements 14 are kept, of 32 elements 8: 51 and 25 are the ranks of the thresholds.
    assert found == [
        ("0", "linear", "prune", 16 * (8 + 2 * 14), 16 * 64 * 4),
        ("1", "layer_norm", "prune", 16 * (4 + 4 * 8), 16 * 32 * 4),
        ("1", "layer_norm", "keep", 16 * 4, 16 * 4),
        ("1", "layer_norm", "keep", 16 * 4, 16 * 4),
        ("2", "gelu", "narrow", 16 * 32 * 2, 16 * 32 * 4),
        ("3", "linear", "prune", 16 * (4 + 2 * 8), 16 * 32 * 4),
        ("4", "tanh", "keep", 16 * 8 * 4, 16 * 8 * 4),
    ]
    report = actcompile.report(model)
    assert report.saved_nbytes == sum(stored for *_, stored, _ in found)
    assert "input of linear: the largest elements of each sample" in str(report)
    document = json.loads(report.to_json())
    assert (document["predicted_peak_nbytes"], document["saved_nbytes"]) == (None, report.saved_nbytes)


def test_baseline_is_that_of_torch_compile() -> None:
    task = gpt()
    task.gradients(compiled(task.model))
    found = actcompile.report(task.model).baseline_nbytes
    actcompile.reset()
    task.gradients(torch.compile(task.model, backend="act", options={"level": "L0", "lowering": "eager"}))
    assert found == actcompile.report(task.model).baseline_nbytes > 0


def test_report_is_that_of_the_last_forward() -> None:
    """A batch whose samples are mostly zero stores more than a dense one: all elements of each."""
    model = nn.Linear(100, 4)
    step = compiled(model)
    step(torch.randn(8, 100)).sum().backward()
    assert [row.stored_nbytes for row in rows_of(model)] == [8 * 100 // 8 + 2 * 8 * 21]
    step(F.pad(torch.randn(8, 20), (0, 80))).sum().backward()
    assert [row.stored_nbytes for row in rows_of(model)] == [8 * 100 // 8 + 2 * 8 * 100]


def test_stored_bytes_are_what_stays_alive() -> None:
    """Each sum of rows counts memory once: what two operators keep, and what two operators look at."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid())
    compiled_step = compiled(lambda x: (y := model(x)) * y.view(-1, 64).exp())
    compiled_step(torch.randn(16, 64)).sum().backward()
    kept = [row for row in rows_of(model) if row.action == "keep"]
    # y, kept by sigmoid and the product, and its exponential, kept by exp and the product.
    assert [(row.op, row.stored_nbytes) for row in kept] == [("sigmoid", 4096), ("exp", 4096)]


def test_a_call_without_gradients_is_left_alone() -> None:
    model, x = layers(), torch.randn(16, 64)
    step = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(step(x), model(x))
    assert not actcompile.report().rows
    step(x).sum().backward()
    before = rows_of(model)
    with torch.no_grad():
        step(2 * x)
    assert rows_of(model) == before


def test_frozen_weights_store_nothing() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    model[1].requires_grad_(False)
    compiled(model)(torch.randn(16, 64)).sum().backward()
    assert [row.module for row in rows_of(model)] == ["0"]


def test_two_backwards_of_one_forward_are_the_same() -> None:
    model = layers()
    loss = compiled(model)(torch.randn(16, 64)).square().sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, list(model.parameters()))))


def test_batches_of_any_size() -> None:
    model = layers()
    step = compiled(model)
    for size in (16, 48, 7):
        x = torch.randn(size, 64)
        torch._dynamo.mark_dynamic(x, 0)
        step(x).sum().backward()
        assert rows_of(model)[0].stored_nbytes == size * (8 + 2 * 14)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_autocast() -> None:
    model, x = layers(), torch.randn(64, 64)
    found = []
    for call in (model, compiled(model, sparsity=0.0)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = call(x).float().square().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.05 * float(max(g.abs().max() for g in found[0])))
    assert {row.dtype for row in rows_of(model) if row.op == "gelu"} == {torch.bfloat16}


@pytest.mark.parametrize("is_outside", [True, False])
def test_checkpoints(is_outside: bool) -> None:
    """Around the compiled model, its forward runs twice and prunes twice; inside, nothing is pruned."""
    model, x = layers(), torch.randn(16, 64)
    plain = compiled(model)
    expected = torch.autograd.grad((plain if is_outside else model)(x).sum(), list(model.parameters()))
    torch._dynamo.reset()
    actcompile.reset()
    inner = compiled(model)
    outer = (
        (lambda x: checkpoint(inner, x, use_reentrant=False))
        if is_outside
        else compiled(lambda x: checkpoint(model, x, use_reentrant=False))
    )
    torch.testing.assert_close(torch.autograd.grad(outer(x).sum(), list(model.parameters())), expected)
    actions = {row.action for row in rows_of(model)}
    assert actions == ({"prune", "narrow"} if is_outside else set())


def test_explain_and_max_batch_size_need_a_step() -> None:
    model, x, config = layers(), torch.randn(16, 64), Config.back_razor(0.8)
    for call in (actcompile.explain, lambda *args, **kwargs: actcompile.max_batch_size(*args, memory="1GiB", **kwargs)):
        with pytest.raises(ConfigError, match=r"whatever the values are, got pruning='samples'.*actcompile.report"):
            call(model, x, config=config)
    with pytest.raises(ConfigError, match=r"pruning='samples' says by itself what is stored.*auto=True"):
        actcompile.profile(model, x, loss=Tensor.sum, config=config)
