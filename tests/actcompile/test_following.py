"""following: plans at other sizes, plans that do not fit, plans of other models."""

from dataclasses import replace

import pytest
import torch

from actcompile import Config, ConfigError, Plan
from actcompile.following import _FITS, check_model, follow
from actcompile.plan import Action, Decision, Recomputation, Role, SavedTensor
from actcompile.planner import make_plan

CODES = Decision(Action.QUANTIZE, "probed", bits=6, group_size=256)
OTHERWISE = Decision(Action.QUANTIZE, "uniform bits", bits=3, group_size=64)
KEPT = Decision(Action.KEEP, "by hand")
SMALL = Decision(Action.KEEP, "it has fewer than 4096 elements (min_numel)", by_size=True)

SITES = (
    "embedding/embedding",
    "blocks.0.fc/linear",
    "/add",
    "blocks.1.fc/linear",
    "/add",
    "head/linear",
    "/cross_entropy",
)


def row(numel: int = 8192, **changes: object) -> SavedTensor:
    made = SavedTensor(
        key="fc/gelu",
        name="gelu",
        op="gelu",
        module="fc",
        source="model.py:3",
        shape=(numel,),
        symbolic_shape=(str(numel),),
        dtype=torch.float32,
        numel=numel,
        nbytes=4 * numel,
    )
    changed = replace(made, **changes)  # type: ignore[arg-type]
    return replace(changed, nbytes=numel * changed.dtype.itemsize)


def plan(decision: Decision | None, min_numel: int = 4096) -> Plan:
    decisions = {} if decision is None else {"fc/gelu": decision}
    return Plan(decisions, graphs=(SITES,), otherwise=OTHERWISE, min_numel=min_numel)


# planned, row, settings -> action, bits or dtype
FOLLOWED = [
    # The same decision at any size at which codes take fewer bytes, below min_numel too.
    (CODES, row(), {}, Action.QUANTIZE, 6),
    (CODES, row(100_000), {}, Action.QUANTIZE, 6),
    (CODES, row(600), {}, Action.QUANTIZE, 6),
    (CODES, row(16), {}, Action.KEEP, None),
    (CODES, row(dtype=torch.bfloat16), {}, Action.QUANTIZE, 6),
    # What must be exact here stays exact.
    (CODES, row(obstacle="it is a statistic"), {}, Action.KEEP, None),
    # Kept for its size alone: decided again, with the settings that the plan was made with.
    (SMALL, row(), {}, Action.QUANTIZE, 3),
    (SMALL, row(4095), {}, Action.KEEP, None),
    (SMALL, row(4095), {"min_numel": 64}, Action.QUANTIZE, 3),
    (SMALL, row(dtype=torch.bool), {}, Action.PACK, None),
    (SMALL, row(obstacle="it is a statistic"), {}, Action.KEEP, None),
    (KEPT, row(), {}, Action.KEEP, None),
    (Decision(Action.PACK, ""), row(dtype=torch.bool), {}, Action.PACK, None),
    (Decision(Action.PACK, ""), row(1000, dtype=torch.bool), {}, Action.KEEP, None),
    # The width that the range of this size needs, not that of the plan.
    (
        Decision(Action.NARROW, "", dtype=torch.uint8),
        row(dtype=torch.int64, index_range=257),
        {},
        Action.NARROW,
        torch.int16,
    ),
    (
        Decision(Action.NARROW, "", dtype=torch.int16),
        row(dtype=torch.int64, index_range=9),
        {},
        Action.NARROW,
        torch.uint8,
    ),
    (Decision(Action.NARROW, "", dtype=torch.int16), row(dtype=torch.int64), {}, Action.KEEP, None),
    # Not saved at the sizes of the plan.
    (None, row(), {}, Action.QUANTIZE, 3),
    (None, row(dtype=torch.bool), {}, Action.PACK, None),
    (None, row(role=Role.PARAMETER, obstacle="the parameter is there anyway"), {}, Action.KEEP, None),
    # Settings given beside the plan win.
    (CODES, row(), {"skip": ("f*",)}, Action.KEEP, None),
    (CODES, row(), {"overrides": {"fc": 2}}, Action.QUANTIZE, 2),
    (KEPT, row(), {"overrides": {"fc": 2}}, Action.QUANTIZE, 2),
    (CODES, row(), {"overrides": {"fc": 32}}, Action.KEEP, None),
]


@pytest.mark.parametrize(("planned", "one", "settings", "action", "detail"), FOLLOWED)
def test_decisions(
    planned: Decision | None, one: SavedTensor, settings: dict[str, object], action: Action, detail: object
) -> None:
    (decision,) = follow(plan(planned), [one], Config(**settings)).values()  # type: ignore[arg-type]
    assert decision.action is action
    assert (decision.dtype if action is Action.NARROW else decision.bits) == detail
    assert decision.reason


MIB = 2**18  # fp32 elements


def placed(decision: Decision | None, one: SavedTensor, otherwise: Decision = OTHERWISE) -> Decision:
    given = replace(plan(decision), otherwise=otherwise)
    return follow(given, [one], Config())["fc/gelu"]


def test_what_is_offloaded() -> None:
    moved, all_moved = replace(CODES, offload=True), replace(OTHERWISE, offload=True)
    # A row that the plan moves, at any size, unless that frees nothing here.
    assert placed(moved, row()) == moved
    assert placed(moved, row(16)).offload and placed(moved, row(16)).action is Action.KEEP
    assert placed(moved, row(movable=False)) == CODES
    assert placed(replace(SMALL, offload=True), row()).offload
    assert not placed(CODES, row(MIB)).offload
    # A plan that moves all that is worth a transfer: at these sizes too.
    assert placed(CODES, row(MIB), all_moved).offload
    assert placed(None, row(MIB), all_moved).offload
    assert placed(replace(CODES, offload=True), row(MIB), all_moved) == replace(CODES, offload=True)
    assert not placed(CODES, row(MIB - 1), all_moved).offload
    assert not placed(CODES, row(MIB, movable=False), all_moved).offload


@pytest.mark.parametrize("settings", [{}, {"bits": 32}])
def test_plans_that_offload_everything_say_so(settings: dict[str, object]) -> None:
    made = make_plan([row(MIB // 8)], Config(offload=True, **settings))  # type: ignore[arg-type]
    assert not made["fc/gelu"].offload
    assert follow(made, [row(MIB)], Config())["fc/gelu"].offload
    within = make_plan([row(MIB // 8)], Config(offload=True, memory="1GiB", auto=False))
    assert not follow(within, [row(MIB)], Config())["fc/gelu"].offload


def again(key: str, *sources: str, **changes: object) -> SavedTensor:
    return row(key=key, recomputation=Recomputation(1, sources), **changes)


# rows, settings -> keys of those recomputed, where the plan recomputes all but "x"
AGAIN = [
    ([row(key="x"), again("y", "x")], {}, ["y"]),
    ([row(key="x"), again("y", "x"), again("z", "x")], {}, ["y", "z"]),
    # What one of them is computed from is stored.
    ([row(key="x"), again("y", "x"), again("z", "y")], {}, ["y"]),
    ([row(key="x"), again("z", "y"), again("y", "x")], {}, ["z"]),
    # The backward cannot compute it here, or must not.
    ([row(key="x"), row(key="y")], {}, []),
    ([row(key="x"), again("y", "x", obstacle="it is a statistic")], {}, []),
    ([row(key="x"), again("y", "x")], {"skip": ("fc",)}, []),
    ([row(key="x"), again("y", "x")], {"overrides": {"fc": 2}}, []),
]


@pytest.mark.parametrize(("rows", "settings", "keys"), AGAIN)
def test_what_is_recomputed(rows: list[SavedTensor], settings: dict[str, object], keys: list[str]) -> None:
    planned = {"x": CODES} | dict.fromkeys("yz", Decision(Action.RECOMPUTE, "no room"))
    followed = follow(replace(plan(None), decisions=planned), rows, Config(**settings))  # type: ignore[arg-type]
    assert [key for key, decision in followed.items() if decision.action is Action.RECOMPUTE] == keys
    assert all(followed[one.key].reason for one in rows)


def test_every_action_says_what_it_fits() -> None:
    assert set(_FITS) == set(Action)


@pytest.mark.parametrize(
    ("decision", "dtype"),
    [
        (CODES, torch.bool),
        (CODES, torch.int64),
        (Decision(Action.PACK, ""), torch.float32),
        (Decision(Action.NARROW, "", dtype=torch.uint8), torch.bfloat16),
        (Decision(Action.NARROW, "", dtype=torch.uint8), torch.bool),
        (Decision(Action.RECOMPUTE, ""), torch.bool),
        (Decision(Action.PRUNE, "", nbytes=64), torch.float32),
    ],
)
def test_decisions_that_do_not_fit(decision: Decision, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigError, match=f"got {decision.action} for 'fc/gelu', which holds {name}: .*another model"):
        follow(plan(decision), [row(dtype=dtype)], Config())


def test_a_plan_made_by_hand_serves_any_model_that_it_covers() -> None:
    given = Plan({"fc/gelu": KEPT, "another graph's": Decision(Action.PACK, "")})
    check_model(given, SITES, is_part=False)
    assert dict(follow(given, [row()], Config())) == {"fc/gelu": KEPT}
    with pytest.raises(ConfigError, match=r"without an entry for 'fc/other' \(gelu in fc\)"):
        follow(given, [row(), row(key="fc/other")], Config())


def test_following_its_own_rows_changes_nothing() -> None:
    rows = [replace(one, key=str(i)) for i, (_, one, *_) in enumerate(FOLLOWED)]
    made = make_plan(rows, Config(bits=2))
    assert follow(made, rows, Config()) == made
    large = [replace(one, numel=MIB * 8, nbytes=MIB * 8 * one.dtype.itemsize) for one in rows]
    moved = make_plan(large, Config(offload=True))
    assert any(decision.offload for decision in moved.values()) and follow(moved, large, Config()) == moved


def without(layer: str) -> tuple[str, ...]:
    return tuple(site for site in SITES if layer not in site)


# graph, message; None where the plan serves
MODELS = [
    (SITES, None),
    # A function around the model that computes something before and after it.
    (("/mul", *SITES[:-1]), None),
    (without("blocks.1"), "computes 'blocks.1.fc/linear' where this model computes '/add'"),
    (SITES[:5], "computes '/add' where this model ends after 'blocks.1.fc/linear'"),
    ((*SITES[:5], "head/linear", "tail/linear"), "ends after 'head/linear' where this model computes 'tail/linear'"),
    (
        (*SITES[:3], "blocks.1.fc/conv2d", *SITES[4:]),
        "'blocks.1.fc/linear' where this model computes 'blocks.1.fc/conv2d'",
    ),
    ((), "computes 'embedding/embedding' where this model computes nothing"),
]


@pytest.mark.parametrize(("graph", "message"), MODELS)
def test_models(graph: tuple[str, ...], message: str | None) -> None:
    given = plan(CODES)
    if message is None:
        check_model(given, graph, is_part=False)
        return
    with pytest.raises(ConfigError, match="plan must be made for this model") as found:
        check_model(given, graph, is_part=False)
    assert message in str(found.value)


def test_parts_of_a_model() -> None:
    given = plan(CODES)
    for part in (SITES[:2], SITES[2:5], SITES[5:], ("/add", "head/linear")):
        check_model(given, part, is_part=True)
    for part in (without("blocks.1"), ("head/linear", "embedding/embedding"), ("fc/linear",)):
        with pytest.raises(ConfigError, match="plan must be made for this model"):
            check_model(given, part, is_part=True)


def test_one_of_several_graphs() -> None:
    given = replace(plan(CODES), graphs=(SITES[:3], SITES[3:]))
    check_model(given, SITES[3:], is_part=False)
    with pytest.raises(ConfigError, match="plan must be made for this model"):
        check_model(given, SITES, is_part=False)
