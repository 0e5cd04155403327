"""What goes wrong by the user's making reaches the user as it is."""

from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor_config
from torch import nn

import actcompile
from actcompile import CompileError, ConfigError, Plan


def step(**options: object) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU())
    torch.compile(model, backend="act", options={"lowering": "eager", **options})(torch.randn(128, 64)).sum().backward()


# options -> the rule, the value and the remedy in the message
BAD = [
    ({"bitz": 4}, ["options must be fields of actcompile.Config", "'bitz'", "use one of bits"]),
    ({"bits": 4, "memory": 0.5}, ["at most one of bits, memory and noise", "memory=0.5", "keep one of them"]),
    ({"bits": 5.5, "auto": False}, ["bits must be one of", "5.5", "choose the nearest"]),
    ({"group_size": 0}, ["group_size must be a power of two", "0", "256 is the default"]),
    ({"sparsity": 1.2}, ["sparsity must be a share", "1.2", "try 0.8"]),
    ({"level": "L7"}, ["level must be one of L0, L1", "'L7'"]),
    ({"mode": "fastest"}, ["mode must be one of default", "'fastest'"]),
    ({"mode": "lite"}, ["mode must be one in which Inductor compiles", "'lite'", "leave it out"]),
    ({"inductor": {"fallback_by_default": True}}, ["mode must be one in which Inductor compiles", "'lite'"]),
    ({"inductor": 3}, ["inductor must be a dict", "3"]),
    ({"plan": "nowhere/plan.json"}, ["plan must name a readable file", "nowhere/plan.json"]),
]


def assert_unwrapped(error: BaseException, parts: list[str]) -> None:
    assert type(error).__name__ == "ConfigError"
    assert isinstance(error, ConfigError) and isinstance(error, ValueError)
    for part in parts:
        assert part in str(error)


@pytest.mark.parametrize(("options", "parts"), BAD, ids=lambda value: str(value)[:30])
def test_bad_options_at_the_first_call(options: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ValueError) as found:
        step(**options)
    assert_unwrapped(found.value, parts)


def test_truncated_plan(tmp_path: Path) -> None:
    step()
    (record,) = __import__("actcompile.records").records.finished()
    text = record.plan.to_json()
    (tmp_path / "plan.json").write_text(text[: len(text) // 2])
    actcompile.reset()
    with pytest.raises(ValueError) as found:
        step(plan=str(tmp_path / "plan.json"))
    assert_unwrapped(found.value, ["plan must be a complete JSON file", "plan.json", "write it again with plan.save"])


def test_plan_of_another_model() -> None:
    with pytest.raises(ValueError) as found:
        step(plan=Plan())
    assert_unwrapped(found.value, ["plan must cover every saved tensor", "made for another model", "make one"])


def test_no_compiler() -> None:
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(CompileError, match=r"install g\+\+") as found:
            step(lowering="inductor")
        assert type(found.value).__name__ == "CompileError"
        assert "no-such-compiler" in str(found.value) and "lowering='eager'" in str(found.value)
        torch._dynamo.reset()
        step(lowering="eager")
        assert actcompile.explain(nn.Sequential(nn.Linear(64, 64), nn.GELU()), torch.randn(128, 64)).rows


def test_a_model_that_fails_fails_as_ever() -> None:
    model = torch.compile(nn.Linear(4, 4), backend="act", options={"lowering": "eager"})
    with pytest.raises(Exception, match=r"same reduction dim|mat1 and mat2"):
        model(torch.randn(3, 5))
