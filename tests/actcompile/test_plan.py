"""Plan: saved, loaded, followed by another batch size, refused for another model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import actcompile
from actcompile import Config, ConfigError, Plan, records
from actcompile.plan import Action, Decision, SavedTensor

EAGER = {"lowering": "eager", "min_numel": 0}

PLAN = Plan(
    {
        "0/addmm": Decision(Action.QUANTIZE, "uniform bits", bits=3, group_size=64),
        "1/gt": Decision(Action.PACK, "a mask"),
        "2/max": Decision(Action.NARROW, "small", dtype=torch.int16),
        "2/max#2": Decision(Action.KEEP, "it is a statistic"),
        "3/mul": Decision(Action.KEEP, "small", by_size=True),
        "4/mm": Decision(Action.QUANTIZE, "moved", bits=4, group_size=256, offload=True),
        "5/mm": Decision(Action.RECOMPUTE, "no room"),
    }
)


def layers(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 8))


def run(model: nn.Module, batch: int = 64, **options: object) -> None:
    step = torch.compile(model, backend="act", options={**EAGER, **options})
    step(torch.randn(batch, 64)).sum().backward()


def plan_of(model: nn.Module) -> Plan:
    (record,) = records.finished()
    return record.plan


def test_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert Plan.load(str(tmp_path / "plan.json")).to_json() == PLAN.to_json()
    full = replace(PLAN, graphs=(("0/linear", "/relu"), ("1/linear",)), otherwise=PLAN["0/addmm"], min_numel=99)
    full.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == full


def test_plans_from_before_offloading_are_read(tmp_path: Path) -> None:
    entry = {"action": "quantize", "reason": "uniform bits", "bits": 4, "group_size": 256}
    document = {"format": "actcompile plan", "version": 1, "decisions": {"fc/mm": entry}}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    decision = Decision(Action.QUANTIZE, "uniform bits", bits=4, group_size=256)
    assert Plan.load(tmp_path / "plan.json") == Plan({"fc/mm": decision})
    assert json.loads(Plan({"fc/mm": decision}).to_json())["decisions"] == document["decisions"]


def test_reads_like_a_dict() -> None:
    assert len(PLAN) == 7
    assert list(PLAN) == ["0/addmm", "1/gt", "2/max", "2/max#2", "3/mul", "4/mm", "5/mm"]
    assert PLAN["1/gt"].action is Action.PACK
    assert PLAN.get("nothing") is None


def test_merged() -> None:
    other = Plan({"1/gt": Decision(Action.KEEP, "kept"), "9/mm": Decision(Action.KEEP, "kept")})
    merged = PLAN.merged(other)
    assert len(merged) == 8
    assert merged["1/gt"].action is Action.KEEP
    assert PLAN["1/gt"].action is Action.PACK


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (PLAN.to_json()[:-40], "must be a complete JSON file"),
        ("", "must be a complete JSON file"),
        ("[1, 2]", "must be a file written by plan.save"),
        ('{"format": "something", "version": 1}', "must be a file written by plan.save"),
        (PLAN.to_json().replace('"version": 3', '"version": 99'), "version 99"),
        (PLAN.to_json().replace('"quantize"', '"squash"'), "holds a decision that cannot be read"),
        (PLAN.to_json().replace('"int16"', '"int17"'), "holds a decision that cannot be read"),
        (json.dumps({"format": "actcompile plan", "version": 1}), "holds a decision that cannot be read"),
    ],
)
def test_damaged_files(tmp_path: Path, content: str, rule: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rule) as found:
        Plan.load(path)
    assert str(path) in str(found.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="plan must name a readable file"):
        Plan.load(tmp_path / "nothing.json")


def test_a_plan_serves_other_batch_sizes(tmp_path: Path) -> None:
    model = layers()
    run(model, batch=64, bits=2)
    plan = plan_of(model)
    assert {decision.bits for decision in plan.values() if decision.action is Action.QUANTIZE} == {2}
    plan.save(tmp_path / "plan.json")
    actcompile.reset()
    run(model, batch=96, plan=tmp_path / "plan.json")
    report = actcompile.report(model)
    assert {row.bits for row in report.rows if row.action == "quantize"} == {2}
    assert {row.shape[0] for row in report.rows if row.action == "quantize"} == {96}
    assert plan_of(model) == plan


@pytest.mark.parametrize("dynamic", [True, None, False])
def test_a_plan_serves_every_kind_of_batch_size(dynamic: bool | None) -> None:
    """Static shapes, sizes that become dynamic, and sizes that are dynamic from the start; one size below min_numel."""
    model = layers(width=256)
    example = torch.randn(4, 64)
    plan = actcompile.profile(model, example, loss=lambda y: y.square().sum(), config=Config(min_numel=512))
    assert {row.numel < 512 for row in rows_of(model, example, plan)} == {True, False}
    step = torch.compile(model, backend="act", dynamic=dynamic, options={"plan": plan, "lowering": "eager"})
    for batch in (32, 33, 9):
        x = torch.randn(batch, 64)
        exact = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        noisy = torch.autograd.grad(step(x).square().sum(), list(model.parameters()))
        flat = [torch.cat([value.flatten() for value in values]) for values in (noisy, exact)]
        assert 0.97 < torch.cosine_similarity(*flat, dim=0) < 1
    for record in records.finished():
        decided = {row.key: record.plan[row.key] for row in record.rows}
        # What was kept for being small at 4 samples is not at 32.
        small = [key for key in plan if plan[key].by_size]
        assert small and all(decided[key].action is not Action.KEEP for key in small)
        assert all(decided[key] == plan[key] for key in plan if key not in small)


def rows_of(model: nn.Module, example: torch.Tensor, plan: Plan) -> list[SavedTensor]:
    """The activations that ``model`` saves for ``example``."""
    run = torch.compile(model, backend="act", options={"plan": plan, "lowering": "eager"})
    run(example).sum().backward()
    (record,) = records.finished()
    actcompile.reset()
    return [row for row in record.rows if not row.obstacle]


def test_numbers_that_dynamo_passes_as_tensors() -> None:
    """Under dynamic shapes, a momentum becomes an input."""
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8))
    plan = actcompile.profile(model, torch.randn(4, 64), loss=torch.sum, config=Config(min_numel=0))
    step = torch.compile(model, backend="act", dynamic=True, options={"plan": plan, "lowering": "eager"})
    for batch in (32, 33):
        step(torch.randn(batch, 64)).sum().backward()
    (record,) = records.finished()
    # At the batch of the profile, statistics are no smaller than what they are made of, and codes.
    known = [row.key for row in record.rows if not row.obstacle]
    codes = [key for key in known if plan[key].action is Action.QUANTIZE]
    assert codes and all(record.plan[key] == plan[key] for key in codes)
    assert {row.symbolic_shape[0] for row in record.rows if row.key in codes} != {"32"}
    assert counters["graph_break"].total() == 0


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    document = json.loads(PLAN.to_json())
    old = {"format": document["format"], "version": 1, "decisions": document["decisions"]}
    (tmp_path / "plan.json").write_text(json.dumps(old))
    assert Plan.load(tmp_path / "plan.json") == PLAN


def stack(depth: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(depth)), nn.Linear(64, 8))


@pytest.mark.parametrize(("made_for", "used_on"), [(4, 2), (2, 4)])
def test_a_plan_of_a_deeper_or_shallower_model_is_refused(made_for: int, used_on: int) -> None:
    plan = actcompile.profile(stack(made_for), torch.randn(4, 64), loss=torch.sum, config=Config(min_numel=0))
    calls = {depth: f"'{2}.0/linear'" if depth == 4 else "'2/linear'" for depth in (made_for, used_on)}
    message = f"computes {calls[made_for]} where this model computes {calls[used_on]}: it was made for another model"
    with pytest.raises(ConfigError, match=message):
        run(stack(used_on), plan=plan)


def test_a_plan_serves_every_graph_of_its_model() -> None:
    """At graph breaks, and each graph gets what was found for it."""
    first, second = layers(), nn.Sequential(nn.Linear(8, 64), nn.Sigmoid(), nn.Linear(64, 4))

    def function(x: torch.Tensor) -> torch.Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y.sin()).square().sum()

    plan = actcompile.profile(function, torch.randn(4, 64), config=Config(min_numel=0))
    assert len(plan.graphs) == 2
    torch.compile(function, backend="act", options={**EAGER, "plan": plan})(torch.randn(32, 64)).backward()
    found = [dict(record.plan) for record in records.finished()]
    assert len(found) == 2
    assert all(plan[key] == decision for part in found for key, decision in part.items())


def test_a_lossless_plan_can_be_followed() -> None:
    model = layers()
    run(model, level="L0")
    plan = plan_of(model)
    actcompile.reset()
    run(model, plan=plan)
    assert plan_of(model) == plan


def test_an_edited_plan_is_followed() -> None:
    model = layers()
    run(model)
    plan = plan_of(model)
    key = next(key for key in plan if plan[key].action is Action.QUANTIZE)
    actcompile.reset()
    run(model, plan=plan.merged(Plan({key: Decision(Action.KEEP, "by hand")})))
    assert [row.action for row in actcompile.report(model).rows if row.reason == "by hand"] == ["keep"]


def test_a_plan_of_another_model_is_refused() -> None:
    run(layers())
    plan = plan_of(layers())
    actcompile.reset()
    with pytest.raises(ConfigError, match="it was made for another model"):
        run(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8)), plan=plan)


class Doubled(nn.Module):
    """What a new release of torch may do to a graph: the same values, by another name."""

    def __init__(self, model: nn.Module, another: bool) -> None:
        super().__init__()
        self.model, self.another = model, another

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model:
            x = layer.forward(x)
        return x.erf() if self.another else x.tanh()


def written_under(version: str, plan: Plan, folder: Path, without: str | None = None) -> Path:
    """The file of ``plan`` as ``version`` of torch would have written it, one row left out."""
    document = json.loads(plan.to_json())
    assert document["torch"] == torch.__version__
    document["torch"] = version
    if without is not None:
        del document["decisions"][without]
    (folder / "plan.json").write_text(json.dumps(document))
    return folder / "plan.json"


def test_a_plan_of_another_torch_is_followed_where_rows_are_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = actcompile.profile(model := layers(), torch.randn(8, 64), loss=torch.sum, config=Config(min_numel=0))
    run(model, plan=written_under("1.99.0", plan, tmp_path))
    assert plan_of(model) == plan
    assert not [record for record in caplog.records if "probed again" in record.message]


@pytest.mark.parametrize(("version", "probed"), [("1.99.0", True), (torch.__version__, False)])
def test_a_graph_with_other_rows_is_probed_again_under_another_torch(
    version: str, probed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under the same torch, what the plan does not know was too small for it, and gets its mean bits."""
    model = layers()
    plan = actcompile.profile(model, torch.randn(8, 64), loss=torch.sum, config=Config(bits=3, min_numel=0))
    lost = next(key for key, decision in plan.items() if decision.action is Action.QUANTIZE)
    path = written_under(version, plan, tmp_path, without=lost)
    step = torch.compile(model, backend="act", options={**EAGER, "plan": path})
    for _ in range(2):
        step(torch.randn(64, 64)).sum().backward()
    (record,) = records.finished()
    assert (record.profile is not None) == probed
    assert record.config.automatic == probed
    messages = [r.message for r in caplog.records if "probed again" in r.message]
    assert [f"made with torch {version}" in message and repr(lost) in message for message in messages] == [
        True
    ] * probed
    if probed:
        assert record.plan[lost].bits is not None
        assert record.config.average_bits == 3


def test_another_graph_is_probed_again_under_another_torch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = actcompile.profile(
        Doubled(layers(), False), torch.randn(8, 64), loss=torch.sum, config=Config(bits=3, min_numel=0)
    )
    with pytest.raises(ConfigError, match="made for another model"):
        run(Doubled(layers(), True), plan=plan)
    actcompile.reset()
    run(Doubled(layers(), True), plan=written_under("1.99.0", plan, tmp_path))
    assert ["where the plan's" in r.message for r in caplog.records if "probed again" in r.message] == [True]
