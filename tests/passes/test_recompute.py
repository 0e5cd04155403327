"""recompute_saved: tensors that the backward computes again from others."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy

import actcompile
from actcompile import Plan, records
from actcompile.passes import PIPELINE, run_passes
from actcompile.passes._cones import cone
from actcompile.passes._fx import draws_random_numbers
from actcompile.passes.recompute import recompute_saved
from actcompile.plan import Action, Decision

from ..models import Task, bert, gpt, relative_error, resnet
from .pairs import Traced, text, trace

RECOMPUTE = Decision(Action.RECOMPUTE, "test")


def weight(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) / shape[0] ** 0.5).requires_grad_()


def recomputed(record: records.GraphRecord) -> set[str]:
    return {key for key, decision in record.plan.items() if decision.action is Action.RECOMPUTE}


def mlp(recompute: str = "full") -> Traced:
    """The up-projection is saved for the non-linearity, its input for the weight, and the bias for nothing."""

    def function(up: torch.Tensor, bias: torch.Tensor, down: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(torch.addmm(bias, x, up)) @ down

    return trace(function, weight(8, 16), weight(16), weight(16, 8), torch.randn(4, 8), recompute=recompute)


def stack(recompute: str = "full") -> Traced:
    def function(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = F.layer_norm(F.gelu(x @ w) @ w, (16,))
        return x

    return trace(function, weight(16, 16), torch.randn(8, 16), recompute=recompute)


def test_a_product_runs_again_in_the_backward() -> None:
    def function(up: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(bias, x.exp(), up).square()

    x = torch.randn(4, 8, requires_grad=True) * 1.0
    traced = trace(function, weight(8, 16), weight(16), x, recompute="full")
    recompute_saved(traced.pair, traced.keep_all(addmm=RECOMPUTE))
    assert text(traced.pair.forward) == "\n".join(
        [
            "primals_1 = input",
            "primals_2 = input",
            "primals_3 = input",
            "primals_4 = input",
            "exp = exp(primals_3)",
            "addmm = addmm(primals_2, exp, primals_1)",
            "pow_1 = pow(addmm, 2)",
            "permute = permute(primals_1, [1, 0])",
            "return [pow_1, exp, primals_1, primals_2]",
        ]
    )
    assert text(traced.pair.backward) == "\n".join(
        [
            "exp = input",
            "permute_part0 = input",
            "primals_2_offered = input",
            "tangents_1 = input",
            "addmm_1 = addmm(primals_2_offered, exp, permute_part0)",
            "pow_2 = pow(addmm_1, 1.0)",
            "mul = mul(pow_2, 2.0)",
            "mul_1 = mul(tangents_1, mul)",
            "permute_2 = permute(permute_part0, [1, 0])",
            "mm = mm(mul_1, permute_2)",
            "permute_1 = permute(exp, [1, 0])",
            "mm_1 = mm(permute_1, mul_1)",
            "sum_1 = sum(mul_1, [0], True)",
            "view = view(sum_1, [16])",
            "mul_2 = mul(mm, exp)",
            "return [mm_1, view, mul_2, None]",
        ]
    )


def test_numbers_are_the_same() -> None:
    for traced in (mlp(), stack()):
        before = traced.run()
        plan = traced.keep_all(mm=RECOMPUTE, addmm=RECOMPUTE)
        assert any(decision is RECOMPUTE for decision in plan.values())
        run_passes(traced.pair, plan, PIPELINE)
        torch.testing.assert_close(traced.run(), before, rtol=0, atol=0)


def test_what_is_offered_in_vain_does_not_cross() -> None:
    plain, offered = mlp("cheap"), mlp()
    # The projection's weight and bias, and its input, of which a transposed view crosses already.
    assert len(offered.pair.slots) == len(plain.pair.slots) + 3
    recompute_saved(offered.pair, offered.keep_all())
    assert text(offered.pair.forward) == text(plain.pair.forward)
    assert text(offered.pair.backward) == text(plain.pair.backward)


def test_storing_everything_changes_nothing() -> None:
    traced = mlp("cheap")
    before = text(traced.pair.forward), text(traced.pair.backward)
    recompute_saved(traced.pair, traced.keep_all())
    assert (text(traced.pair.forward), text(traced.pair.backward)) == before


def test_running_twice_equals_once() -> None:
    traced = mlp()
    plan = traced.keep_all(addmm=RECOMPUTE)
    recompute_saved(traced.pair, plan)
    once = text(traced.pair.forward), text(traced.pair.backward)
    recompute_saved(traced.pair, plan)
    assert (text(traced.pair.forward), text(traced.pair.backward)) == once


def test_a_slot_without_a_decision_raises() -> None:
    with pytest.raises(KeyError):
        recompute_saved(mlp().pair, Plan())


def test_neighbours_share_what_computes_them() -> None:
    """Two parts of one product that the backward reads together."""

    def function(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        left, right = (x @ w).view(4, 2, 8).unbind(1)
        return F.gelu(left) * F.silu(right)

    traced = trace(function, weight(8, 16), torch.randn(4, 8), recompute="full")
    before = traced.run()
    products = traced.pair.backward.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    recompute_saved(traced.pair, traced.keep_all(select=RECOMPUTE, unbind=RECOMPUTE, mm=RECOMPUTE))
    after = traced.pair.backward.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert len(after) == len(products) + 1
    torch.testing.assert_close(traced.run(), before, rtol=0, atol=0)


# function of (w, x) -> operator of a saved tensor that must not run again
PINNED = [
    (lambda w, x: (x @ w).exp() @ w, "exp"),
    (lambda w, x: torch.sin(torch.where(x @ w > 0, 1.0, x @ w)), "gt"),
]


@pytest.mark.parametrize(("function", "op"), PINNED)
def test_what_must_not_run_again(function: object, op: str) -> None:
    traced = trace(function, weight(8, 8), torch.randn(4, 8), recompute="full")  # type: ignore[arg-type]
    (slot,) = (slot for slot, row in zip(traced.pair.slots, traced.rows(), strict=True) if row.op == op)
    assert cone(slot.source, set(slot.source.all_input_nodes)) is None
    assert [row.recomputation for row in traced.rows() if row.op == op] == [None]


def test_attention_runs_again() -> None:
    """Its output, from the queries, keys and values that its backward needs anyway."""

    def function(w: torch.Tensor, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (value.transpose(1, 2) for value in (x @ w).view(2, 16, 3, 4, 8).unbind(2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 16, 32) @ out

    traced = trace(function, weight(8, 96), weight(32, 8), torch.randn(2, 16, 8), recompute="full")
    (row,) = (row for row in traced.rows() if "attention" in row.op)
    assert row.recomputation is not None
    assert row.recomputation.flops == 2 * (2 * 4) * 16 * 16 * (8 + 8)
    before = traced.run()
    run_passes(traced.pair, traced.keep_all(**{row.op: RECOMPUTE}), PIPELINE)
    assert row.key not in {slot.key for slot in traced.pair.slots}
    torch.testing.assert_close(traced.run(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["flash_attention_for_cpu", "flash_attention", "cudnn_attention"])
def test_attention_draws_random_numbers_where_it_drops(name: str) -> None:
    operator = getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    graph = torch.fx.Graph()
    # Here, what comes ahead of the share: a bias, and whether the log-sum-exp is wanted.
    between = (None, True) if name == "cudnn_attention" else ()
    operands = (graph.placeholder("q"), graph.placeholder("k"), graph.placeholder("v"), *between)
    for given, expected in (((), False), ((0.0,), False), ((0.5,), True), ((graph.placeholder("p"),), True)):
        assert draws_random_numbers(graph.call_function(operator, (*operands, *given))) is expected
    assert draws_random_numbers(graph.call_function(torch.ops.aten.bernoulli.default, operands[:1]))
    assert not draws_random_numbers(graph.call_function(torch.ops.aten.sin.default, operands[:1]))


def test_what_the_user_saves_is_saved() -> None:
    traced = mlp()
    (slot,) = (slot for slot in traced.pair.slots if slot.source.name == "addmm")
    given = {other.source for other in traced.pair.slots}
    assert cone(slot.source, given) is not None
    slot.source.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    assert cone(slot.source, given) is None
    with pytest.raises(AssertionError, match="cannot be computed again"):
        recompute_saved(traced.pair, traced.keep_all(addmm=RECOMPUTE))


def test_rows_say_what_it_costs_and_reads() -> None:
    rows = {row.op: row for row in mlp().rows()}
    recomputation = rows["addmm"].recomputation
    assert recomputation is not None
    assert recomputation.flops == 2 * 4 * 8 * 16
    keys = {row.key: row for row in mlp().rows()}
    assert {str(keys[key].role) for key in recomputation.sources} == {"parameter", "input"}


def gradients(task: Task, **options: object) -> dict[str, torch.Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    step = torch.compile(task.model, backend="act", options={"lowering": "eager", **options})
    return {name: value.clone() for name, value in task.gradients(step).items()}


@pytest.mark.parametrize("make", [gpt, lambda: gpt(0.1), lambda: bert(0.1), resnet])
def test_a_lossless_step_stays_exact(make: Callable[[], Task]) -> None:
    """Nothing that drops at random drops anew."""
    task = make()
    exact = gradients(task, level="L0")
    stored = actcompile.report(task.model)
    actcompile.reset()
    budget = int(0.9 * stored.saved_nbytes)
    assert relative_error(gradients(task, level="L0", recompute="full", memory=budget), exact) < 1e-6
    report = actcompile.report(task.model)
    assert report.saved_nbytes <= budget
    recomputed = [row for row in report.rows if row.action == "recompute"]
    assert recomputed and not any(row.stored_nbytes or row.bits for row in recomputed)


@pytest.mark.slow
def test_compiled_with_inductor() -> None:
    task = gpt(layers=1)
    exact = task.gradients()
    budget = {"level": "L0", "recompute": "full", "memory": 2**20, "lowering": "inductor"}
    assert relative_error(gradients(task, **budget), exact) < 1e-5
    assert any(row.action == "recompute" for row in actcompile.report(task.model).rows)


@pytest.mark.parametrize("auto", [False, True])
def test_gradients_are_far_better_than_with_fewer_bits(auto: bool) -> None:
    task = gpt()
    exact = task.gradients()
    errors = []
    for recompute in ("cheap", "full"):
        actcompile.reset()
        torch._dynamo.reset()
        options = {"lowering": "eager", "min_numel": 0, "memory": 0.04, "recompute": recompute, "auto": auto}
        step = torch.compile(task.model, backend="act", options=options)
        task.gradients(step)
        errors.append(relative_error(task.gradients(step), exact))
        report = actcompile.report(task.model)
        assert report.saved_nbytes <= 0.04 * report.baseline_nbytes
        assert any(row.action == "recompute" for row in report.rows) == (recompute == "full")
    assert errors[1] < 0.5 * errors[0]


def test_noise_is_predicted_for_the_backward_that_recomputes() -> None:
    task = gpt()
    exact = {name: value.clone() for name, value in task.gradients().items()}
    options = {"lowering": "eager", "min_numel": 0, "memory": 0.06, "recompute": "full"}
    step = torch.compile(task.model, backend="act", options=options)
    task.gradients(step)
    measured = 0.0
    for _ in range(8):
        found = task.gradients(step)
        measured += sum(float((found[name] - exact[name]).square().sum()) for name in exact) / 8
    (record,) = records.finished()
    assert record.profile is not None and recomputed(record)
    rounded = {key: decision.bits for key, decision in record.plan.items() if decision.bits is not None}
    predicted = sum(record.profile.sensitivities[key].variance[bits] for key, bits in rounded.items())
    assert 0.5 < predicted / measured < 2


def test_a_saved_plan_recomputes(tmp_path: Path) -> None:
    task = gpt()
    options = {"level": "L0", "recompute": "full", "memory": 0.4}
    exact = gradients(task, **options)
    (record,) = records.finished()
    assert recomputed(record)
    record.plan.save(tmp_path / "plan.json")
    actcompile.reset()
    assert relative_error(gradients(task, plan=tmp_path / "plan.json"), exact) < 1e-6
    (again,) = records.finished()
    assert recomputed(again) == recomputed(record)


def test_sizes_that_change() -> None:
    task = gpt()
    step = torch.compile(
        task.model,
        backend="act",
        options={"lowering": "eager", "level": "L0", "recompute": "full", "memory": 0.4},
    )
    for batch in (8, 6, 4):
        tokens = task.inputs[0][:batch]
        found = []
        for call in (task.model, step):
            task.model.zero_grad()
            call(tokens[:, :-1], tokens[:, 1:]).backward()
            found.append({name: value.grad.clone() for name, value in task.model.named_parameters()})
        assert relative_error(found[1], found[0]) < 1e-5
    assert all(recomputed(record) for record in records.finished())
