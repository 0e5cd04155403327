"""snapshot_inputs: what is computed again in the backward reads what the forward read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import actcompile
from actcompile.analysis import analyze
from actcompile.passes.snapshot_inputs import mark_changing_inputs, may_change
from actcompile.plan import Role

from .pairs import text, trace, trace_joint

Compile = Callable[[Callable[..., object]], Callable[..., Tensor]]


def eagerly(function: Callable[..., object]) -> Callable[..., Tensor]:
    return function  # type: ignore[return-value]


def by_act(recompute: str) -> Compile:
    options = {"level": "L0", "lowering": "eager", "min_numel": 1, "recompute": recompute}

    def compile(function: Callable[..., object]) -> Callable[..., Tensor]:
        torch._dynamo.reset()
        return torch.compile(function, backend="act", options=options)

    return compile


def shift(w: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Writes ``t`` after products of it were multiplied by the weight; autograd's formulas read the products alone."""
    y = torch.abs(t[:, None] * t) @ w
    t.mul_(-1)
    return y * x


def test_a_copy_of_what_the_step_writes_crosses() -> None:
    traced = trace(shift, torch.randn(8, 6, requires_grad=True), torch.randn(8, 6), torch.randn(8), recompute="cheap")
    assert text(traced.pair.forward) == "\n".join(
        [
            "primals_1 = input",
            "primals_2 = input",
            "primals_3 = input",
            "primals_4 = input",
            "clone_default = clone(primals_3)",
            "unsqueeze = unsqueeze(primals_3, 1)",
            "mul = mul(unsqueeze, primals_3)",
            "abs_1 = abs(mul)",
            "mm = mm(abs_1, primals_1)",
            "mul_1 = mul(primals_3, -1)",
            "mul_2 = mul(mm, primals_2)",
            "return [mul_1, mul_2, primals_2, clone_default]",
        ]
    )
    assert text(traced.pair.backward) == "\n".join(
        [
            "primals_2 = input",
            "primals_3_part0 = input",
            "tangents_1 = input",
            "mul_3 = mul(tangents_1, primals_2)",
            "unsqueeze = unsqueeze(primals_3_part0, 1)",
            "mul = mul(unsqueeze, primals_3_part0)",
            "abs_1 = abs(mul)",
            "permute = permute(abs_1, [1, 0])",
            "mm_1 = mm(permute, mul_3)",
            "return [mm_1, None, None, None]",
        ]
    )
    (row,) = (row for row in analyze(traced.pair) if row.op == "clone")
    assert row.obstacle == "it is a copy of an input that may change before the backward"


def test_inputs_that_torch_marks_as_written() -> None:
    """From 2.15 on, placeholders say so themselves."""
    joint, _ = trace_joint(lambda w, x: torch.sin(x * w), torch.randn(8, requires_grad=True), torch.randn(4, 8))
    weight, x, *_ = joint.graph.find_nodes(op="placeholder")
    for mark, expected in ((False, [False, False]), (True, [True, False])):
        weight.meta["aot_runtime_epilogue_input_mutation"] = mark
        mark_changing_inputs(joint, [Role.PARAMETER, Role.INPUT, Role.SEED])
        assert [may_change(weight), may_change(x)] == expected


def test_what_autograd_reads_itself_and_parameters_cross_as_they_are() -> None:
    def function(w: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.sin(x * w) + b)

    inputs = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True), torch.randn(4, 8)
    for recompute in ("none", "cheap", "full"):
        traced = trace(function, *inputs, recompute=recompute)
        assert "clone" not in text(traced.pair.forward)


class Written(nn.Module):
    """Writes a buffer, a parameter, data or a part of it, after what is computed from it was used."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.fc = what, nn.Linear(16, 8)
        self.frozen = nn.Parameter(torch.randn(16), requires_grad=False)
        self.register_buffer("table", torch.randn(32, 16))
        self.register_buffer("frequencies", torch.randn(16))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """[B, 1], [B] -> [B, 8]."""
        features = {
            "table": lambda: F.embedding(ids, self.table),
            "set": lambda: F.embedding(ids, self.table),
            "frequencies": lambda: torch.sin(x * self.frequencies),
            "frozen": lambda: torch.sin(x + self.frozen),
            "data": lambda: torch.sin(x + torch.arange(16.0)),
            "view": lambda: torch.sin(x.t() + torch.arange(16.0)[:, None]).t(),
            "ids": lambda: self.table[ids % 7],
        }[self.what]()
        y = self.fc(features)
        with torch.no_grad():
            if self.what == "set":
                self.table.set_(-self.table)
            else:
                written = {"data": x, "view": x, "ids": ids}.get(self.what)
                (getattr(self, self.what) if written is None else written).neg_()
        return y.square()


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
@pytest.mark.parametrize("what", ["table", "set", "frequencies", "frozen", "data", "view", "ids"])
def test_inputs_that_the_step_writes(what: str, recompute: str) -> None:
    def gradient(compile: Compile) -> Tensor:
        torch.manual_seed(0)
        model, x, ids = Written(what), torch.randn(64, 1), torch.randint(32, (64,))
        compile(model)(x, ids).sum().backward()
        return model.fc.weight.grad

    torch.testing.assert_close(gradient(by_act(recompute)), gradient(eagerly))


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
def test_a_boundary_that_the_step_writes(recompute: str) -> None:
    """AOTAutograd copies the new values behind the forward, and autograd then refuses what was saved of the old."""

    def function(w: Tensor, h: Tensor) -> Tensor:
        y = torch.tanh(h + 1) @ w
        h.mul_(2)
        return y * h

    def gradients(compile: Compile) -> list[Tensor]:
        torch.manual_seed(0)
        w, leaf = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
        compile(function)(w, leaf * 1.0).sum().backward()
        return [w.grad, leaf.grad]  # type: ignore[list-item]

    torch.testing.assert_close(gradients(by_act(recompute)), gradients(eagerly))


class Lookup(nn.Module):
    """A codebook and frequencies that no formula of autograd's reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.register_buffer("table", torch.randn(8, 16))
        self.register_buffer("frequencies", torch.randn(16))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """[B, 1], [B] -> [B, 8]."""
        return self.fc(F.embedding(ids, self.table) * torch.abs(x * self.frequencies)).square()


@pytest.mark.parametrize("recompute", ["none", "cheap", "full"])
@pytest.mark.parametrize("name", ["table", "frequencies", "x", "ids"])
def test_inputs_that_are_written_before_the_backward(name: str, recompute: str) -> None:
    """The moving average of a codebook, the next batch in the same memory: eager gradients are those of the forward."""

    def gradient(compile: Compile) -> Tensor:
        torch.manual_seed(0)
        model, x, ids = Lookup(), torch.randn(64, 1), torch.randint(8, (64,))
        loss = compile(model)(x, ids).sum()
        {"x": x, "ids": ids}.get(name, getattr(model, name, x)).data.zero_()
        loss.backward()
        return model.fc.weight.grad

    torch.testing.assert_close(gradient(by_act(recompute)), gradient(eagerly))


def test_two_forwards_before_their_backwards() -> None:
    def gradient(compile: Compile) -> Tensor:
        torch.manual_seed(0)
        model, x, ids = Written("frequencies"), torch.randn(64, 1), torch.randint(32, (64,))
        call = compile(model)
        losses = [call(x, ids).sum() for _ in range(2)]
        for loss in losses:
            loss.backward()
        return model.fc.weight.grad

    torch.testing.assert_close(gradient(by_act("cheap")), gradient(eagerly))


class Counted(torch.autograd.Function):
    """Doubles, and counts backwards in a buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            ctx.buffer.add_(1)
        return grad * 2, None


def test_a_buffer_that_the_backward_writes() -> None:
    """The second backward reads what its forward read, and counts on from what the first one wrote."""

    def results(compile: Compile) -> list[Tensor]:
        torch.manual_seed(0)
        model, x = nn.Linear(16, 8), torch.randn(64, 1)
        buffer = torch.randn(16)

        def step(x: Tensor, buffer: Tensor) -> Tensor:
            return Counted.apply(model(torch.sin(x * buffer)), buffer).square()

        call = compile(step)
        losses = [call(x, buffer).sum() for _ in range(2)]
        for loss in losses:
            loss.backward()
        return [model.weight.grad, buffer]  # type: ignore[list-item]

    torch.testing.assert_close(results(by_act("cheap")), results(eagerly))


@pytest.mark.parametrize("bits", [8, 4])
def test_copies_of_inputs_stay_exact_and_are_counted(bits: int) -> None:
    model, x, ids = Lookup(), torch.randn(64, 1), torch.randint(8, (64,))
    options = {"bits": bits, "lowering": "eager", "min_numel": 1}
    torch.compile(model, backend="act", options=options)(x, ids).sum().backward()
    copies = [row for row in actcompile.report().rows if row.op == "clone"]
    assert {row.shape for row in copies} == {(8, 16), (16,), (64, 1), (64,)}
    assert all((row.action, row.stored_nbytes) == ("keep", row.nbytes) for row in copies)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["table", "set", "frequencies", "data", "ids"])
def test_inductor_keeps_the_copies(what: str) -> None:
    def gradient(compile: Compile) -> Tensor:
        torch.manual_seed(0)
        model, x, ids = Written(what), torch.randn(64, 1), torch.randint(32, (64,))
        compile(model)(x, ids).sum().backward()
        return model.fc.weight.grad

    def by_inductor(function: Callable[..., object]) -> Callable[..., Tensor]:
        return torch.compile(function, backend="act", options={"level": "L0", "min_numel": 1})

    torch.testing.assert_close(gradient(by_inductor), gradient(eagerly))
