"""The planner: rows written by hand, and properties."""

from dataclasses import replace

import pytest
import torch

from actcompile import Config, ConfigError, Plan
from actcompile.config import CODE_BITS
from actcompile.plan import Action, Decision, Profile, Role, SavedTensor, Sensitivity
from actcompile.planner import ProbedGraph, make_plan, solve, stored_nbytes

ROW = SavedTensor(
    key="blocks.0.fc/gelu",
    name="gelu",
    op="gelu",
    module="blocks.0.fc",
    source="model.py:3",
    shape=(64, 128),
    symbolic_shape=("64", "128"),
    dtype=torch.float32,
    numel=8192,
    nbytes=32768,
)


def row(**changes: object) -> SavedTensor:
    changed = replace(ROW, **changes)  # type: ignore[arg-type]
    return replace(changed, nbytes=changed.numel * changed.dtype.itemsize)


def decide(one: SavedTensor, **settings: object) -> Decision:
    return make_plan([one], Config(**settings))[one.key]  # type: ignore[arg-type]


# row, settings -> action, bits or dtype, part of the reason
DECISIONS = [
    (row(), {}, Action.QUANTIZE, 4, "uniform bits"),
    (row(), {"bits": 8}, Action.QUANTIZE, 8, "uniform bits"),
    (row(dtype=torch.bfloat16), {"bits": 3}, Action.QUANTIZE, 3, "uniform bits"),
    (row(), {"level": "L0"}, Action.KEEP, None, "lossless"),
    (row(numel=4095), {}, Action.KEEP, None, "fewer than 4096 elements (min_numel)"),
    (row(numel=4096), {}, Action.QUANTIZE, 4, "uniform bits"),
    (row(numel=100), {"min_numel": 0}, Action.QUANTIZE, 4, "uniform bits"),
    (row(numel=10), {"min_numel": 0}, Action.KEEP, None, "codes would take no fewer bytes"),
    (row(), {"skip": ("blocks.*",)}, Action.KEEP, None, "its module matches 'blocks.*' (skip)"),
    (row(), {"skip": ("head", "blocks.?.fc")}, Action.KEEP, None, "'blocks.?.fc'"),
    (row(), {"skip": ("fc",)}, Action.QUANTIZE, 4, "uniform bits"),
    (row(), {"overrides": {"blocks.*": 8}}, Action.QUANTIZE, 8, "its module matches 'blocks.*' (overrides)"),
    (row(), {"overrides": {"*.fc": 2, "blocks.*": 8}}, Action.QUANTIZE, 2, "'*.fc' (overrides)"),
    (row(), {"overrides": {"fc": 8}}, Action.QUANTIZE, 4, "uniform bits"),
    (row(), {"overrides": {"blocks.*": 32}}, Action.KEEP, None, "its module matches 'blocks.*' (overrides)"),
    (row(), {"level": "L0", "overrides": {"*": 8}}, Action.QUANTIZE, 8, "(overrides)"),
    (row(), {"skip": ("*",), "overrides": {"*": 8}}, Action.KEEP, None, "(skip)"),
    (row(dtype=torch.bool), {"overrides": {"*": 32}}, Action.PACK, None, "one bit per element"),
    (row(obstacle="it is a statistic"), {"bits": 2, "overrides": {"*": 8}}, Action.KEEP, None, "it is a statistic"),
    (row(obstacle="it is a statistic"), {"bits": 2}, Action.KEEP, None, "it is a statistic"),
    (row(dtype=torch.bool), {}, Action.PACK, None, "one bit per element"),
    (row(dtype=torch.bool), {"level": "L0"}, Action.PACK, None, "one bit per element"),
    (row(dtype=torch.int64, index_range=256), {}, Action.NARROW, torch.uint8, "below 256"),
    (row(dtype=torch.int64, index_range=257), {}, Action.NARROW, torch.int16, "below 257"),
    (row(dtype=torch.int64, index_range=2**15 + 1), {}, Action.NARROW, torch.int32, "below 32769"),
    (row(dtype=torch.int64, index_range=2**31 + 1), {}, Action.KEEP, None, "need their width"),
    (row(dtype=torch.int32, index_range=2**20), {}, Action.KEEP, None, "need their width"),
    (row(dtype=torch.int64), {}, Action.KEEP, None, "the range of its integers is not known"),
    (row(role=Role.BOUNDARY), {}, Action.QUANTIZE, 4, "once the caller drops the tensor"),
]


@pytest.mark.parametrize(("one", "settings", "action", "detail", "reason"), DECISIONS)
def test_decisions(one: SavedTensor, settings: dict[str, object], action: Action, detail: object, reason: str) -> None:
    decision = decide(one, **settings)
    assert decision.action is action
    assert (decision.dtype if action is Action.NARROW else decision.bits) == detail
    assert reason in decision.reason


# decision -> bytes for the 8192 float32 elements of ROW
STORED = [
    (Decision(Action.KEEP, ""), 32768),
    (Decision(Action.PACK, ""), 1024),
    (Decision(Action.NARROW, "", dtype=torch.int16), 16384),
    # 32 groups: codes, a bf16 scale and an fp32 zero each.
    (Decision(Action.QUANTIZE, "", bits=4, group_size=256), 4096 + 32 * 6),
    (Decision(Action.QUANTIZE, "", bits=3, group_size=256), 3072 + 32 * 6),
    (Decision(Action.QUANTIZE, "", bits=1, group_size=64), 1024 + 128 * 6),
]


@pytest.mark.parametrize(("decision", "nbytes"), STORED)
def test_stored_nbytes(decision: Decision, nbytes: int) -> None:
    assert stored_nbytes(ROW, decision) == nbytes


def test_the_last_group_counts_in_full() -> None:
    decision = Decision(Action.QUANTIZE, "", bits=8, group_size=256)
    assert stored_nbytes(row(numel=257), decision) == 2 * (256 + 6)
    assert stored_nbytes(row(numel=9, dtype=torch.bool), Decision(Action.PACK, "")) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 31, 257, 4096, 100_003])
def test_compression_never_takes_more_bytes_and_more_bits_never_fewer(numel: int, dtype: torch.dtype) -> None:
    one = row(numel=numel, dtype=dtype)
    sizes = [stored_nbytes(one, decide(one, bits=bits, min_numel=0)) for bits in CODE_BITS]
    assert sizes == sorted(sizes)
    assert max(sizes) <= one.nbytes


def test_every_row_has_one_decision_with_a_reason() -> None:
    rows = [replace(one, key=f"{i}") for i, (one, *_) in enumerate(DECISIONS)]
    plan = make_plan(rows, Config())
    assert list(plan) == [one.key for one in rows]
    assert all(decision.reason for decision in plan.values())


def test_the_same_rows_give_the_same_plan() -> None:
    rows = [replace(one, key=f"{i}") for i, (one, *_) in enumerate(DECISIONS)]
    assert make_plan(rows, Config(bits=2)) == make_plan(list(rows), Config(bits=2))


def probed(sensitivities: dict[str, float], numel: int = 2**16) -> ProbedGraph:
    """A graph whose tensors all have ``numel`` elements; noise falls with the square of the number of levels."""
    rows = [replace(ROW, key=key, numel=numel, nbytes=4 * numel, shape=(numel,)) for key in sensitivities]
    known = {
        key: Sensitivity({bits: value / (2**bits - 1) ** 2 for bits in CODE_BITS}, "probed")
        for key, value in sensitivities.items()
    }
    return ProbedGraph(rows, Profile(known, 1.0))


def total_nbytes(graph: ProbedGraph, plan: Plan) -> int:
    return sum(stored_nbytes(row, plan[row.key]) for row in graph.rows)


def total_noise(graph: ProbedGraph, plan: Plan) -> float:
    known = graph.profile.sensitivities
    return sum(known[key].variance[plan[key].bits] for key in plan if plan[key].bits is not None)


@pytest.mark.parametrize("bits", [1, 2, 3, 3.7, 4, 8])
def test_bits_are_a_mean(bits: float) -> None:
    graph = probed({"a": 1.0, "b": 1e-3, "c": 1e-6})
    (plan,) = solve([graph], Config(bits=bits, auto=True))
    codes = sum(2**16 * (decision.bits or 32) for decision in plan.values())
    assert codes <= bits * 3 * 2**16 * 1.05
    assert total_nbytes(graph, plan) <= 3 * (2**16 * bits / 8 + 2**16 / 256 * 6)


def test_sensitive_tensors_get_more_bits() -> None:
    (plan,) = solve([probed({"a": 1.0, "b": 1e-3, "c": 1e-6})], Config(bits=4, auto=True))
    bits = [plan[key].bits or 32 for key in "abc"]
    assert bits == sorted(bits, reverse=True) and bits[0] > bits[2]


def test_equal_tensors_get_equal_bits() -> None:
    (plan,) = solve([probed(dict.fromkeys("abcd", 0.1))], Config(bits=4, auto=True))
    assert [plan[key].bits for key in "abcd"] == [4] * 4


def test_graphs_share_the_bytes() -> None:
    loud, quiet = probed({"a": 1.0, "b": 1.0}), probed({"a": 1e-8, "b": 1e-8})
    plans = solve([loud, quiet], Config(bits=4, auto=True))
    assert min(plans[0][key].bits or 32 for key in "ab") > max(plans[1][key].bits or 32 for key in "ab")


@pytest.mark.parametrize("budget", [40_000, 50_000, 100_000, 500_000])
def test_memory_is_never_exceeded(budget: int) -> None:
    graph = probed({"a": 1.0, "b": 1e-3, "c": 1e-6})
    config = Config(memory=budget)
    (plan,) = solve([graph], config, budget)
    assert total_nbytes(graph, plan) <= budget
    uniform = make_plan(graph.rows, config, budget)
    assert total_nbytes(graph, uniform) <= budget
    assert total_noise(graph, plan) <= total_noise(graph, uniform)


def test_memory_that_is_too_little_says_how_much_is_needed() -> None:
    graph = probed({"a": 1.0})
    least = 2**16 // 8 + 2**16 // 256 * 6
    config = Config(memory=least - 1)
    makers = (lambda budget: solve([graph], config, budget), lambda budget: make_plan(graph.rows, config, budget))
    for make in makers:
        with pytest.raises(ConfigError, match=rf"1 bit per element, {least} bytes .*got {least - 1}: give that much"):
            make(least - 1)
        make(least)


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-6])
def test_noise_is_reached_with_few_bytes(noise: float) -> None:
    graph = probed({"a": 1.0, "b": 1e-3, "c": 1e-6})
    (plan,) = solve([graph], Config(noise=noise))
    assert total_noise(graph, plan) <= noise
    (finer,) = solve([graph], Config(noise=noise / 10))
    assert total_nbytes(graph, plan) < total_nbytes(graph, finer)


def overridden(sensitivities: dict[str, float]) -> ProbedGraph:
    """As ``probed``, with tensors of modules that are called as their keys."""
    graph = probed(sensitivities)
    return replace(graph, rows=[replace(one, module=one.key) for one in graph.rows])


@pytest.mark.parametrize("bits", [2, 4])
def test_overrides_are_obeyed_and_their_bytes_count(bits: int) -> None:
    graph = overridden({"a": 1.0, "b": 1e-3, "c": 1e-6})
    config = Config(bits=bits, auto=True, overrides={"c": 3})
    (plan,) = solve([graph], config)
    assert plan["c"].bits == 3
    assert total_nbytes(graph, plan) <= 3 * (2**16 * bits / 8 + 2**16 / 256 * 6)
    (exact,) = solve([graph], Config(bits=bits, auto=True, overrides={"c": 32}))
    assert exact["c"].action is Action.KEEP
    assert total_nbytes(graph, exact) <= 2 * (2**16 * bits / 8 + 2**16 / 256 * 6) + 2**18


def test_memory_counts_what_is_overridden() -> None:
    graph = overridden({"a": 1.0, "b": 1e-3, "c": 1e-6})
    config = Config(memory=110_000, overrides={"c": 8})
    (plan,) = solve([graph], config, 110_000)
    assert plan["c"].bits == 8
    assert total_nbytes(graph, plan) <= 110_000
    with pytest.raises(ConfigError, match="memory must leave room"):
        solve([graph], config, 2**16)


def test_noise_counts_what_is_overridden() -> None:
    graph = overridden({"a": 1.0, "b": 1.0, "c": 1e-2})
    (plan,) = solve([graph], Config(noise=1.1e-2, overrides={"c": 1}))
    assert plan["c"].bits == 1
    assert total_noise(graph, plan) <= 1.1e-2
    assert total_noise(graph, plan) - graph.profile.sensitivities["c"].variance[1] > 0


def test_what_is_to_be_probed_is_rounded_even_where_exact_tensors_fit() -> None:
    rows = probed({"a": 1.0}).rows
    assert make_plan(rows, Config(memory=10**9), 10**9)["a"].bits == 8
    assert make_plan(rows, Config(memory=10**9, auto=False), 10**9)["a"].action is Action.KEEP


def test_overrides_that_leave_no_bits_for_the_rest() -> None:
    with pytest.raises(ConfigError, match=r"bits must leave at least 1 bit .*mean of 2.*overrides={'c': 8}"):
        solve([overridden({"a": 1.0, "b": 1.0, "c": 1.0})], Config(bits=2, auto=True, overrides={"c": 8}))


def test_a_plan_says_what_others_get() -> None:
    """Tensors that are too small here, or not saved, get the mean bits elsewhere."""
    (plan,) = solve([probed({"a": 1.0, "b": 1.0})], Config(bits=3, auto=True, min_numel=77))
    assert plan.otherwise is not None
    assert (plan.otherwise.bits, plan.min_numel) == (3, 77)
    uniform = make_plan([ROW], Config(bits=2))
    assert uniform.otherwise is not None and uniform.otherwise.bits == 2
    assert not make_plan([ROW], Config(level="L0")).lossy
    assert make_plan([row(numel=10)], Config()).lossy


def test_rows_that_must_stay_exact_are_not_allocated() -> None:
    graph = probed({"a": 1.0, "b": 1.0})
    rows = [replace(graph.rows[0], obstacle="test"), graph.rows[1]]
    (plan,) = solve([replace(graph, rows=rows)], Config(bits=1, auto=True))
    assert (plan["a"].action, plan["a"].reason, plan["b"].bits) == (Action.KEEP, "test", 1)
