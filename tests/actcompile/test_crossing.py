"""Tensors that cross from one graph of a call to the next: in codes, and counted once on both sides."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import actcompile
from actcompile import records
from actcompile._gpt import GPT
from actcompile.analysis import RETURNED

from ..stored import plain, stored_nbytes
from .test_roles import EAGER, check, distance, layers, of_module


@torch._dynamo.disable
def made_eagerly(x: Tensor) -> Tensor:
    return x.abs().repeat(1, 4)


class Broken(nn.Module):
    """Two layers around a graph break, scaled by what needs no gradient."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(64, 256), nn.Linear(256, 8), kind

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        if self.kind == "eager":
            factor = {"of": made_eagerly(x)}
            torch._dynamo.graph_break()
        else:
            factor = {"of": x.abs().repeat(1, 4).sqrt()}
            torch._dynamo.graph_break()
        hidden = F.gelu(self.a(x)) * factor["of"]
        if self.kind == "twice":
            torch._dynamo.graph_break()
            hidden = F.gelu(hidden) * factor["of"]
        return self.b(hidden) * target


@pytest.mark.parametrize(("kind", "num_crossing"), [("graph", 1), ("eager", 1), ("twice", 3)])
def test_what_crosses_a_break_without_a_gradient(kind: str, num_crossing: int) -> None:
    """Nobody else keeps it; the caller's own tensors are left alone, also where they are read after a break."""
    report = check(of_module(Broken(kind), torch.randn(512, 64), torch.randn(512, 8)), 7)
    crossing = [row for row in report.rows if row.role == "boundary" and row.shape == (512, 256)]
    assert [row.action for row in crossing] == ["quantize"] * num_crossing
    assert {row.reason for row in report.rows if row.shape == (512, 8) and row.role == "input"} == {
        "the input is there anyway"
    }


class Residual(nn.Module):
    """A residual stream that a graph break cuts: normalized before it and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(128) for _ in range(2)])
        self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.exp(self.first(x))
        torch._dynamo.graph_break()
        return self.second(F.gelu(x))


def test_what_two_graphs_save_is_in_codes() -> None:
    """The first graph needs what it returns, and the second one what it gets."""
    report = check(of_module(Residual(), torch.randn(512, 128)), 3.5)
    saved = [row for row in report.rows if row.counts and row.shape == (512, 128)]
    assert {row.action for row in saved} == {"quantize"}
    assert {row.role for row in saved} == {"activation", "boundary"}


def test_what_two_graphs_keep_is_counted_once() -> None:
    case = of_module(Residual(), torch.randn(512, 128))
    step = torch.compile(case.function, backend="act", options={**EAGER, "level": "L0"})
    exact = case.gradients(case.function)
    assert distance(case.gradients(step), exact) < 1e-6
    report = actcompile.report()
    assert report.saved_nbytes == case.stored(step) == 512 * 128 * 4
    (shared,) = (row for row in report.rows if row.reason == "an earlier graph of the same call stores it")
    assert (shared.role, shared.stored_nbytes, shared.nbytes) == ("boundary", 0, 512 * 128 * 4)
    torch._dynamo.reset()
    assert report.baseline_nbytes == case.stored(torch.compile(case.function, backend=plain)) == 2 * 512 * 128 * 4


def test_what_a_model_returns_stays_exact() -> None:
    """The caller may hold it; nothing says that another graph reads it."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 256), nn.Softmax(-1))
    check(of_module(model, torch.randn(512, 64)), 0.5)
    (row,) = (row for row in actcompile.report().rows if row.counts and row.shape == (512, 256))
    assert row.reason == RETURNED


def test_an_activation_of_the_callers_counts_on_both_sides() -> None:
    model, first = layers(), nn.Linear(32, 64)
    given = first(torch.randn(512, 32))
    step = torch.compile(model, backend="act", options=EAGER)
    weights = [*model.parameters(), *first.parameters()]
    before = stored_nbytes(given, weights)
    result = step(given)
    report = actcompile.report()
    assert report.saved_nbytes == stored_nbytes(result, weights) - before
    (row,) = (row for row in report.rows if row.role == "boundary")
    assert row.action == "quantize"
    torch._dynamo.reset()
    result = torch.compile(model, backend=plain)(given)
    assert report.baseline_nbytes == stored_nbytes(result, weights) - before


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.usefixtures("one_rank")
def test_cuts_of_ddp() -> None:
    model, tokens = GPT(layers=2, width=128, tokens=128), torch.randint(256, (4, 128))

    def compiled(**options: object) -> Callable[..., Tensor]:
        wrapped = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1)
        backend = plain if not options else "act"
        return torch.compile(wrapped, backend=backend, **options)

    model(tokens, tokens).backward()
    exact = [value.grad.clone() for value in model.parameters() if value.grad is not None]
    step = compiled(options={**EAGER, "bits": 8})
    model.zero_grad()
    step(tokens, tokens).backward()
    assert 0 < distance([value.grad for value in model.parameters() if value.grad is not None], exact) < 0.02
    torch._dynamo.reset()
    actcompile.reset()
    step = compiled(options=EAGER)
    step(tokens, tokens).backward()
    report = actcompile.report()
    held = [*model.parameters(), tokens]
    assert len(records.finished()) > 1
    assert report.saved_nbytes == stored_nbytes(step(tokens, tokens), held)
    assert not [row for row in report.rows if row.counts and row.action == "keep" and row.nbytes > 4 * 4096]
    torch._dynamo.reset()
    assert report.baseline_nbytes == stored_nbytes(compiled()(tokens, tokens), held)
    assert report.ratio > 10


def test_reentrant_checkpoint_of_a_compiled_block() -> None:
    """The block runs again, in the backward, on detached inputs: leaves."""
    block, head, x = layers(), nn.Linear(8, 8), torch.randn(256, 64)
    first = nn.Linear(64, 64)

    def step(call: Callable[..., Tensor]) -> list[Tensor]:
        parameters = [value for module in (first, block, head) for value in module.parameters()]
        for value in parameters:
            value.grad = None
        head(checkpoint(call, first(x), use_reentrant=True)).square().mean().backward()
        return [value.grad for value in parameters if value.grad is not None]

    exact = step(block)
    assert 0 < distance(step(torch.compile(block, backend="act", options={**EAGER, "bits": 8})), exact) < 0.02
    report = actcompile.report()
    assert report.ratio > 3.7
    assert {row.role for row in report.rows if row.shape == (256, 64)} <= {"input"}


def test_pipeline_stages() -> None:
    """Each stage gets a leaf and hands its gradient to the one before."""
    stages = [layers(), nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 8))]
    x = torch.randn(256, 64)

    def step(calls: list[Callable[..., Tensor]]) -> list[Tensor]:
        for stage in stages:
            stage.zero_grad()
        first = calls[0](x)
        received = first.detach().requires_grad_()
        calls[1](received).square().mean().backward()
        first.backward(received.grad)
        return [value.grad for stage in stages for value in stage.parameters() if value.grad is not None]

    exact = step(list(stages))
    step([torch.compile(stage, backend="act", options={**EAGER, "bits": 8}) for stage in stages])
    got = [value.grad for stage in stages for value in stage.parameters() if value.grad is not None]
    assert 0 < distance(got, exact) < 0.02
    assert actcompile.report().ratio > 3.7
    assert not [row for row in actcompile.report().rows if row.reason == "it is computed from parameters alone"]


@pytest.mark.parametrize("auto", [False, True])
def test_a_plan_serves_the_same_roles_alone(auto: bool) -> None:
    """D(fake) compresses what D(fake.detach()) takes for the caller's; training the two takes both graphs."""
    judge, maker = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 1)), nn.Linear(16, 256)
    step = torch.compile(judge, backend="act", options={**EAGER, "auto": auto})
    for _ in range(3):
        fake = torch.relu(maker(torch.randn(256, 16)))
        step(fake.detach()).mean().backward()
        step(fake).mean().backward()
    inputs = {
        row.role: record.plan[row.key].action
        for record in records.of_settings(records.finished()[-1].config)
        for row in record.rows
        if row.op == "placeholder" and row.shape == (256, 256) and row.role != "parameter"
    }
    assert inputs == {"input": "keep", "boundary": "quantize"}
    assert actcompile.report().ratio > 7


def test_inputs_that_peft_lets_need_gradients() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ratios = []
    for is_enabled in (False, True):
        torch._dynamo.reset()
        actcompile.reset()
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(intermediate_size=128, vocab_size=512, use_cache=False, **shape)
        model = transformers.LlamaForCausalLM(config)
        if is_enabled:
            model.enable_input_require_grads()
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])).train()
        ids = torch.randint(512, (8, 64))
        torch.compile(model, backend="act", options=EAGER)(input_ids=ids, labels=ids).loss.backward()
        ratios.append(actcompile.report().ratio)
    assert min(ratios) > 7.5
    assert abs(ratios[0] - ratios[1]) < 0.2
