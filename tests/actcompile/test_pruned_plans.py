"""Plans that prune: what is predicted is measured, what is planned is stored, and it runs wherever codes do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import actcompile
from actcompile import Config, Plan, records
from actcompile._dropped import is_promising
from actcompile.choices import AUTO_PRUNINGS, CODE_BITS
from actcompile.decisions import nbytes_at, stored_nbytes
from actcompile.plan import Action, Decision, Profile, SavedTensor
from actcompile.triton_kernels._chunked import rounding_variance
from bench.models import make_gpt
from bench.replay import Replay

from ..models import Task, bert, cosine, gpt, relative_error, resnet
from .test_reporting import passed_nbytes

TASKS: dict[str, Callable[[], Task]] = {"gpt": gpt, "bert": bert, "resnet": resnet}
OPTIONS = {"lowering": "eager", "min_numel": 256}


def compiled(model: nn.Module, **options: object) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(model, backend="act", options={**OPTIONS, **options})


def probed(task: Task, **options: object) -> tuple[dict[str, SavedTensor], Profile, Plan]:
    """Rows, profile and plan after two steps."""
    call = compiled(task.model, auto=True, **options)
    task.gradients(call)
    task.gradients(call)
    (record,) = records.finished()
    assert record.profile is not None
    return {row.key: row for row in record.rows}, record.profile, record.plan


def plain_bert() -> Task:
    """With attention that saves its probabilities."""
    task = bert()
    task.model.set_attn_implementation("eager")
    return task


def sparsified(plan: Plan) -> dict[str, Decision]:
    return {key: decision for key, decision in plan.items() if decision.action is Action.SPARSIFY}


@pytest.mark.parametrize("name", TASKS)
def test_every_row_has_finite_noise_for_every_pruning(name: str) -> None:
    rows, profile, _ = probed(TASKS[name](), bits=2)
    assert any(row.is_layer_input for row in rows.values())
    for key, found in profile.sensitivities.items():
        assert set(found.pruned) == set(Config(auto=True).prunings) == set(AUTO_PRUNINGS), key
        assert all(0 <= noise < float("inf") for noise in found.pruned.values()), key
        # Wider values never add more.
        assert found.pruned[AUTO_PRUNINGS[1]] <= found.pruned[AUTO_PRUNINGS[0]] * (1 + 1e-6)
    assert sum(found.pruned[AUTO_PRUNINGS[0]] for found in profile.sensitivities.values()) > 0


def test_noise_of_pruned_layer_inputs_is_what_is_measured() -> None:
    workload = make_gpt(layers=1, width=64, ff=128, batch=4, tokens=64)
    call = torch.compile(workload.model, backend="act", options={"lowering": "eager", "auto": True, "bits": 2.9})
    workload.loss(call).backward()
    (record,) = records.finished()
    assert record.profile is not None
    known, inputs = record.profile.sensitivities, [row.key for row in record.rows if row.is_layer_input]
    replay = Replay(workload, workload.batch)
    compared = 0
    for key in inputs:
        for pruning in AUTO_PRUNINGS if key in known else ():
            measured = sum(replay.noise({key: pruning}, range(4))) / 4
            assert 0.5 < known[key].pruned[pruning] / measured < 2, (key, pruning)
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("settings", [{"bits": 1.5}, {"memory": 0.05}])
def test_few_bytes_prune_some_rows_and_stay_within_the_budget(settings: dict[str, float]) -> None:
    task = plain_bert()
    _, _, plan = probed(task, **settings)
    found = sparsified(plan)
    assert found and {decision.pruning for decision in found.values()} <= set(AUTO_PRUNINGS)
    report = actcompile.report(task.model)
    if "memory" in settings:
        assert report.saved_nbytes <= settings["memory"] * report.baseline_nbytes
    else:
        (record,) = records.finished()
        rows = [row for row in record.rows if row.key in record.profile.sensitivities]
        # Groups of short rows have scales and zeros of their own.
        allowed = sum(nbytes_at(row, settings["bits"], record.config) for row in rows)
        assert sum(stored_nbytes(row, plan[row.key]) for row in rows) <= allowed * 1.01
    assert 0 < report.predicted_noise < float("inf")


def test_a_sparsity_beside_auto_leaves_no_other_share() -> None:
    _, profile, plan = probed(plain_bert(), sparsity=0.9, bits=1.5)
    found = sparsified(plan)
    assert found and {(decision.keep, decision.block) for decision in found.values()} == {(26, 256)}
    assert {pruning[:2] for value in profile.sensitivities.values() for pruning in value.pruned} == {(26, 256)}


def test_with_many_bits_pruning_is_measured_where_few_elements_carry_everything() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 1024)
    for value, expected in ((x, False), ((6 * x).softmax(1), True)):
        rounding = rounding_variance(value, CODE_BITS, 256)
        assert is_promising(value, rounding, AUTO_PRUNINGS, 256) is expected
    _, profile, _ = probed(TASKS["resnet"](), bits=4)
    assert not any(found.pruned for found in profile.sensitivities.values())


def with_pruned_rows(task: Task) -> Plan:
    """Of a plan that was solved, with every other row that has a sensitivity pruned, each in another format."""
    _, profile, plan = probed(task)
    formats = [(128, 256, 16), (102, 256, 8), (128, 256, 4), (3, 16, 8)]
    decisions = dict(plan)
    for number, key in enumerate(sorted(profile.sensitivities)[::2]):
        keep, block, bits = formats[number % len(formats)]
        decisions[key] = Decision(Action.SPARSIFY, "test", bits=bits, keep=keep, block=block)
    return Plan(decisions, plan.graphs, plan.otherwise, plan.min_numel)


def stored(call: Callable[..., Tensor], task: Task) -> int:
    """Bytes that cross, which the report has to know."""
    loss = task.loss(call)
    nbytes = passed_nbytes(loss, task)
    assert actcompile.report(task.model).saved_nbytes == nbytes > 0
    loss.backward()
    return nbytes


def larger(task: Task) -> Task:
    (tokens,) = task.inputs
    more = torch.cat([tokens, tokens.flip(0)])
    return Task(task.model, (more,), lambda call: call(more[:, :-1], more[:, 1:]))


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_saved_plan_is_followed_at_another_batch_size(lowering: str, tmp_path: Path) -> None:
    task = gpt()
    plan = with_pruned_rows(task)
    plan.save(tmp_path / "plan.json")
    assert '"version": 3' in (tmp_path / "plan.json").read_text()
    assert Plan.load(tmp_path / "plan.json") == plan
    actcompile.reset()
    options = {"plan": str(tmp_path / "plan.json"), "lowering": lowering}
    once = stored(compiled(task.model, **options), task)
    actcompile.reset()
    task = larger(task)
    call = compiled(task.model, **options)
    assert stored(call, task) == pytest.approx(2 * once, rel=0.01)
    (record,) = records.finished()
    assert sparsified(record.plan) == sparsified(plan) and len(sparsified(plan)) >= 4
    assert cosine(task.gradients(call), task.gradients()) > 0.7


def test_the_report_shows_what_is_kept_and_its_noise() -> None:
    task = plain_bert()
    _, _, plan = probed(task, bits=1.5)
    report = actcompile.report(task.model)
    kept = {f"{decision.keep}/{decision.block}" for decision in sparsified(plan).values()}
    rows = [row for row in report.rows if row.action == "sparsify"]
    assert {row.kept for row in rows} == kept and all(row.predicted_noise is not None for row in rows)
    assert sum(row.predicted_noise or 0 for row in report.rows) == pytest.approx(report.predicted_noise)
    assert any(f"sparsify {share}" in str(report) for share in kept)


@pytest.mark.parametrize("bits", [16, 4])
def test_pruned_tensors_wait_in_the_hosts_memory(bits: int) -> None:
    """With 16 bits, scales and zeros without elements cross too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512), nn.GELU(), nn.Linear(512, 8))
    x = torch.randn(1024, 512)
    task = Task(model, (x,), lambda call: call(x).square().sum())
    results = []
    for offload in (False, True):
        actcompile.reset()
        actcompile.set_rng_state({"position": 0})
        call = compiled(model, sparsity=0.8, sparse_value_bits=bits, offload=offload, seed=3, recompute="none")
        results.append({name: value.clone() for name, value in task.gradients(call).items()})
    (record,) = records.finished()
    moved = [d for d in record.plan.values() if d.action is Action.SPARSIFY and d.offload]
    assert moved and actcompile.report(model).host_nbytes > 0
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert relative_error(results[1], task.gradients()) < 0.5


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_batch_of_any_size_compiles_once(lowering: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 8))
    call = compiled(model, sparsity=0.8, min_numel=0, recompute="none", lowering=lowering)
    for size in (96, 65):
        x = torch.randn(size, 64)
        torch._dynamo.mark_dynamic(x, 0)
        task = Task(model, (x,), lambda call, x=x: call(x).square().sum())
        got, exact = task.gradients(call), task.gradients()
        # Biases and the first layer read nothing that is pruned, if not by codes of 4 bits.
        assert 0.85 < cosine(got, exact) < 0.9999
        assert cosine({"b": got["4.bias"]}, {"b": exact["4.bias"]}) == pytest.approx(1, abs=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert any(row.action == "sparsify" for row in actcompile.report(model).rows)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bits", [16, 4])
def test_autocast(bits: int, lowering: str) -> None:
    task = gpt()
    with torch.autocast("cpu", torch.bfloat16):
        exact = {name: value.clone() for name, value in task.gradients().items()}
        call = compiled(task.model, sparsity=0.8, sparse_value_bits=bits, bits=8, recompute="none", lowering=lowering)
        got = task.gradients(call)
    rows = [row for row in actcompile.report(task.model).rows if row.action == "sparsify"]
    assert torch.bfloat16 in {row.dtype for row in rows}
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in got.values())
    assert cosine(got, exact) > 0.8


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_autocast_is_probed(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        _, profile, _ = probed(TASKS[name](), bits=2)
    noises = [noise for found in profile.sensitivities.values() for noise in found.pruned.values()]
    assert noises and all(0 <= noise < float("inf") for noise in noises)


def test_the_largest_batch_with_a_sparsity() -> None:
    """A pruned tensor takes 4.2 bits of 32 per element; there are as many that are not pruned."""
    torch.manual_seed(0)
    layers = [module for _ in range(6) for module in (nn.Linear(256, 256), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(256, 16))
    settings = {"exact": {"bits": 32}, "pruned": {"bits": 32, "sparsity": 0.8}, "both": {"bits": 4, "sparsity": 0.8}}
    found = {
        name: actcompile.max_batch_size(
            model,
            torch.randn(4, 256),
            memory="16MiB",
            config=Config(recompute="none", **chosen),
            loss=lambda y: y.sum(),
        )
        for name, chosen in settings.items()
    }
    assert 1.3 < found["pruned"] / found["exact"] < 1.8
    assert 1.5 < found["both"] / found["pruned"] < 4
