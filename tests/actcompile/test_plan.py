"""Plan: saved, loaded, followed by another batch size, refused for another model."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import actcompile
from actcompile import ConfigError, Plan
from actcompile.plan import Action, Decision

EAGER = {"lowering": "eager", "min_numel": 0}

PLAN = Plan(
    {
        "0/addmm": Decision(Action.QUANTIZE, "uniform bits", bits=3, group_size=64),
        "1/gt": Decision(Action.PACK, "a mask"),
        "2/max": Decision(Action.NARROW, "small", dtype=torch.int16),
        "2/max#2": Decision(Action.KEEP, "it is a statistic"),
        "3/mm": Decision(Action.QUANTIZE, "moved", bits=4, group_size=256, offload=True),
        "4/mm": Decision(Action.RECOMPUTE, "no room"),
    }
)


def layers(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64), nn.Tanh(), nn.Linear(64, 8))


def run(model: nn.Module, batch: int = 64, **options: object) -> None:
    step = torch.compile(model, backend="act", options={**EAGER, **options})
    step(torch.randn(batch, 64)).sum().backward()


def plan_of(model: nn.Module) -> Plan:
    from actcompile import records

    (record,) = records.finished()
    return record.plan


def test_round_trip(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN
    assert Plan.load(str(tmp_path / "plan.json")).to_json() == PLAN.to_json()


def test_plans_from_before_offloading_are_read(tmp_path: Path) -> None:
    entry = {"action": "quantize", "reason": "uniform bits", "bits": 4, "group_size": 256}
    document = {"format": "actcompile plan", "version": 1, "decisions": {"fc/mm": entry}}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    decision = Decision(Action.QUANTIZE, "uniform bits", bits=4, group_size=256)
    assert Plan.load(tmp_path / "plan.json") == Plan({"fc/mm": decision})
    assert json.loads(Plan({"fc/mm": decision}).to_json()) == document


def test_reads_like_a_dict() -> None:
    assert len(PLAN) == 6
    assert list(PLAN) == ["0/addmm", "1/gt", "2/max", "2/max#2", "3/mm", "4/mm"]
    assert PLAN["1/gt"].action is Action.PACK
    assert PLAN.get("nothing") is None


def test_merged() -> None:
    other = Plan({"1/gt": Decision(Action.KEEP, "kept"), "9/mm": Decision(Action.KEEP, "kept")})
    merged = PLAN.merged(other)
    assert len(merged) == 7
    assert merged["1/gt"].action is Action.KEEP
    assert PLAN["1/gt"].action is Action.PACK


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (PLAN.to_json()[:-40], "must be a complete JSON file"),
        ("", "must be a complete JSON file"),
        ("[1, 2]", "must be a file written by plan.save"),
        ('{"format": "something", "version": 1}', "must be a file written by plan.save"),
        (PLAN.to_json().replace('"version": 1', '"version": 99'), "version 99"),
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
