"""offload_stored: what crosses waits in the host's memory."""

from dataclasses import replace

import pytest
import torch
from torch import fx
from torch.nn import functional as F

import actcompile
from actcompile import records
from actcompile._gpt import GPT
from actcompile.passes import PIPELINE, run_passes
from actcompile.passes.insert_codecs import insert_codecs
from actcompile.passes.offload import offload_stored
from actcompile.passes.place_codecs import OFFLOAD, RELOAD
from actcompile.plan import Action, Decision, Plan

from ..models import ResNet, Task
from .pairs import Traced, text, trace

KEEP = Decision(Action.KEEP, "test", offload=True)
QUANTIZE = Decision(Action.QUANTIZE, "test", bits=8, group_size=32, offload=True)


def squares() -> Traced:
    return trace(lambda w, x: (x @ w).square(), torch.randn(8, 8, requires_grad=True), torch.randn(16, 8))


def stack(depth: int = 4) -> Traced:
    def function(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for _ in range(depth):
            x = F.silu(F.gelu(x @ w) @ w)
        return x

    return trace(function, (torch.randn(16, 16) / 4).requires_grad_(), torch.randn(8, 16), recompute="cheap")


def everything(plan: Plan) -> Plan:
    return Plan({key: replace(decision, offload=True) for key, decision in plan.items()})


def reloads(traced: Traced) -> list[fx.Node]:
    return [node for node in traced.pair.backward.graph.nodes if node.target is RELOAD]


def test_copies_cross_in_place_of_codes() -> None:
    traced = squares()
    plan = traced.keep_all(mm=QUANTIZE)
    insert_codecs(traced.pair, plan)
    offload_stored(traced.pair, plan)
    assert text(traced.pair.forward) == "\n".join(
        [
            "primals_1 = input",
            "primals_2 = input",
            "primals_3 = input",
            "mm = mm(primals_2, primals_1)",
            "quantize_default = quantize(mm, 8, 32, primals_3, 0)",
            "getitem = getitem(quantize_default, 0)",
            "getitem_1 = getitem(quantize_default, 1)",
            "getitem_2 = getitem(quantize_default, 2)",
            "offload_default = offload([getitem, getitem_1, getitem_2])",
            "getitem_3 = getitem(offload_default, 0)",
            "getitem_4 = getitem(offload_default, 1)",
            "getitem_5 = getitem(offload_default, 2)",
            "pow_1 = pow(mm, 2)",
            "permute = permute(primals_2, [1, 0])",
            "return [pow_1, getitem_3, getitem_4, getitem_5, permute]",
        ]
    )
    assert text(traced.pair.backward) == "\n".join(
        [
            "mm_part0_part0 = input",
            "mm_part0_part1 = input",
            "mm_part0_part2 = input",
            "permute = input",
            "tangents_1 = input",
            "reload_default = reload([mm_part0_part0, mm_part0_part1, mm_part0_part2], cpu, None, [])",
            "getitem = getitem(reload_default, 0)",
            "getitem_1 = getitem(reload_default, 1)",
            "getitem_2 = getitem(reload_default, 2)",
            "dequantize_default = dequantize(getitem, getitem_1, getitem_2, 8, 32, [16, 8], [8, 1], float32)",
            "pow_2 = pow(dequantize_default, 1.0)",
            "mul = mul(pow_2, 2.0)",
            "mul_1 = mul(tangents_1, mul)",
            "mm_1 = mm(permute, mul_1)",
            "return [mm_1, None, None]",
        ]
    )


def test_exact_tensors_come_back_in_their_layout() -> None:
    traced = squares()
    offload_stored(traced.pair, Plan({**traced.keep_all(mm=KEEP), "/permute": KEEP}))
    assert "offload_default_1 = offload([permute])" in text(traced.pair.forward)
    assert (
        "getitem_2 = getitem(reload_default_1, 0)\n"
        "view_default_1 = view(getitem_2, [16, 8])\n"
        "permute_default = permute(view_default_1, [1, 0])\n"
        "mm_1 = mm(permute_default, mul_1)" in text(traced.pair.backward)
    )


def test_each_reload_waits_for_the_one_before_and_names_the_next() -> None:
    traced = stack()
    run_passes(traced.pair, everything(traced.keep_all(mm=QUANTIZE)), PIPELINE)
    found = reloads(traced)
    assert len(found) > 4
    for before, node in zip([None, *found], found, strict=False):
        hosts, _, ticket, ahead = node.args
        assert (ticket.args[0] if ticket is not None else None) is before  # type: ignore[union-attr]
        assert not set(ahead) & set(hosts)  # type: ignore[arg-type]
    # All of them together are smaller than what may be under way: each is named from the first reload on.
    hosts, _, _, ahead = found[0].args
    assert set(ahead) == {host for node in found for host in node.args[0]} - set(hosts)  # type: ignore[union-attr, arg-type]
    assert found[-1].args[3] == []


def test_copies_out_start_once_their_source_exists() -> None:
    traced = stack()
    run_passes(traced.pair, everything(traced.keep_all(mm=QUANTIZE)), PIPELINE)
    order = {node: position for position, node in enumerate(traced.pair.forward.graph.nodes)}
    for node in traced.pair.forward.graph.find_nodes(op="call_function", target=OFFLOAD):
        (*_, last) = node.args[0]
        between = list(order)[order[last] + 1 : order[node]]
        assert last.op == "placeholder" or not between, node


def test_far_users_read_the_host_again() -> None:
    def function(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = x @ w
        z = y.square()
        for _ in range(8):
            z = torch.tanh(z @ w)
        # The backward reads y at its beginning, and again at its end.
        return z * y

    traced = trace(function, torch.randn(16, 16, requires_grad=True), torch.randn(8, 16))
    before = traced.run()
    offload_stored(traced.pair, traced.keep_all(mm=KEEP))
    first, *_, last = (node for node in reloads(traced) if str(node.args[0][0]).startswith("mm_part0"))  # type: ignore[index]
    assert first.args[0] == last.args[0]
    assert first.args[0][0] not in first.args[3]  # type: ignore[index, operator]
    torch.testing.assert_close(traced.run(), before, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [None, 2])
def test_numbers_are_the_same(bits: int | None) -> None:
    traced, moved = stack(), stack()
    moved.inputs = traced.inputs
    decision = Decision(Action.KEEP, "test") if bits is None else replace(QUANTIZE, bits=bits, offload=False)
    plan = traced.keep_all(mm=decision)
    run_passes(traced.pair, plan, PIPELINE)
    run_passes(moved.pair, everything(plan), PIPELINE)
    assert reloads(moved) and not reloads(traced)
    torch.testing.assert_close(moved.run(), traced.run(), rtol=0, atol=0)


def test_layouts_survive() -> None:
    images = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    kernel = (torch.randn(4, 4, 3, 3) / 6).to(memory_format=torch.channels_last).requires_grad_()
    traced = trace(lambda w, x: torch.conv2d(x, w).square(), kernel, images)
    before = traced.run()
    offload_stored(traced.pair, traced.keep_all(convolution=KEEP))
    (node,) = (user for item in reloads(traced)[0].users for user in item.users for user in user.users)
    assert node.meta["val"].stride() == (64, 1, 16, 4)
    torch.testing.assert_close(traced.run(), before, rtol=0, atol=0)


def test_expanded_dimension_crosses_once() -> None:
    """An activation that another graph expanded arrives with a stride of 0."""
    boundary = torch.randn(4, 1, 16, requires_grad=True).expand(4, 8, 16)
    traced = trace(lambda x, y: F.gelu(x) @ y, boundary, torch.randn(16, 16))
    before = traced.run()
    offload_stored(traced.pair, traced.keep_all(placeholder=KEEP))
    (source,) = traced.pair.forward.graph.find_nodes(op="call_function", target=OFFLOAD)
    assert source.args[0][0].meta["val"].shape == (4, 1, 16)  # type: ignore[index]
    assert "expand_default = expand(permute_default, [4, 8, 16])" in text(traced.pair.backward)
    torch.testing.assert_close(traced.run(), before, rtol=0, atol=0)


def test_masks_and_integers_move_as_they_are_stored() -> None:
    def function(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y = (x @ w).max(dim=1).values
        return torch.where(x @ w > 0.5, x @ w, 2.0).sum(1) * y

    traced = trace(function, torch.randn(16, 8, requires_grad=True), torch.randn(32, 16))
    before = traced.run()
    narrow = Decision(Action.NARROW, "test", dtype=torch.uint8)
    integers = {row.key: narrow for row in traced.rows() if row.dtype == torch.int64}
    assert integers
    plan = Plan({**traced.keep_all(gt=Decision(Action.PACK, "test")), **integers})
    run_passes(traced.pair, everything(plan), PIPELINE)
    torch.testing.assert_close(traced.run(), before, rtol=0, atol=0)


def test_leaving_everything_on_the_device_changes_nothing() -> None:
    traced = squares()
    before = text(traced.pair.forward), text(traced.pair.backward)
    offload_stored(traced.pair, traced.keep_all())
    assert (text(traced.pair.forward), text(traced.pair.backward)) == before


def test_running_twice_raises() -> None:
    traced = squares()
    plan = traced.keep_all(mm=KEEP)
    offload_stored(traced.pair, plan)
    with pytest.raises(AssertionError):
        offload_stored(traced.pair, plan)


def test_a_slot_without_a_decision_raises() -> None:
    with pytest.raises(KeyError):
        offload_stored(squares().pair, Plan())


def wide(batch: int = 16) -> Task:
    """Next-token prediction, with tensors that are worth a transfer."""
    torch.manual_seed(0)
    model = GPT(layers=1, width=128, heads=2, ff=512, vocabulary=96, tokens=64, dropout=0.0)
    tokens = torch.randint(96, (batch, 65))
    return Task(model, (tokens,), lambda call: call(tokens[:, :-1], tokens[:, 1:]))


def gradients(task: Task, steps: int = 1, **options: object) -> dict[str, torch.Tensor]:
    """Those of the last of ``steps``."""
    torch._dynamo.reset()
    actcompile.set_rng_state({"position": 0})
    step = torch.compile(task.model, backend="act", options={"lowering": "eager", "seed": 5, **options})
    found = {}
    for _ in range(steps):
        found = {name: value.clone() for name, value in task.gradients(step).items()}
    return found


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("level", "on_device", "steps"), [("swap", "L0", 1), ("L4bit-swap", "L1", 1), ("L3", "L2", 2)])
@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_levels_give_the_gradients_of_those_that_keep_everything(
    lowering: str, level: str, on_device: str, steps: int
) -> None:
    task = wide()
    exact = gradients(task, steps, level=on_device, lowering=lowering)
    assert actcompile.report(task.model).host_nbytes == 0
    assert same(gradients(task, steps, level=level, lowering=lowering), exact)
    report = actcompile.report(task.model)
    moved = [row for row in report.rows if row.host_nbytes]
    assert moved and report.saved_nbytes + report.host_nbytes < report.baseline_nbytes
    assert all(row.nbytes >= 2**20 and not row.stored_nbytes for row in moved)


def test_everything_movable_moves_in_every_layout() -> None:
    """Of a network of convolutions in channels_last too, by a plan edited by hand."""
    images, labels = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last), torch.randint(10, (8,))
    model = ResNet().to(memory_format=torch.channels_last)
    task = Task(model, (images, labels), lambda call: torch.nn.functional.cross_entropy(call(images), labels))
    expected = gradients(task)
    (record,) = records.finished()
    held = {row.key for row in record.rows if not row.movable}
    plan = Plan({key: replace(one, offload=key not in held) for key, one in record.plan.items()})
    assert held and len(held) < len(plan)
    actcompile.reset()
    assert same(gradients(task, plan=plan), expected)
    report = actcompile.report(model)
    assert report.saved_nbytes == 0 and report.host_nbytes > 0


def test_sizes_that_change() -> None:
    tasks = [wide(batch) for batch in (16, 24, 32)]
    results = []
    for level in ("L1", "L4bit-swap"):
        torch._dynamo.reset()
        actcompile.reset()
        actcompile.set_rng_state({"position": 0})
        model = tasks[0].model
        options = {"lowering": "eager", "seed": 5, "level": level}
        step = torch.compile(model, backend="act", options=options)
        results.append([])
        for task in tasks:
            model.zero_grad()
            task.loss(step).backward()
            results[-1].append([parameter.grad.clone() for parameter in model.parameters()])
    # The second size made the batch a symbol.
    (record,) = records.finished()
    moved = [row for row in record.rows if record.plan[row.key].offload]
    assert moved and not any(row.symbolic_shape[0].isdigit() for row in moved)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_backward_twice_and_two_forwards_before_a_backward() -> None:
    task = wide()
    step = torch.compile(task.model, backend="act", options={"lowering": "eager", "level": "swap"})
    exact = task.gradients()
    task.model.zero_grad()
    first, second = task.loss(step), task.loss(step)
    first.backward(retain_graph=True)
    second.backward()
    first.backward()
    for name, parameter in task.model.named_parameters():
        torch.testing.assert_close(parameter.grad, 3 * exact[name], rtol=1e-4, atol=1e-5)
