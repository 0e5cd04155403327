"""Config: what it accepts, what it rejects and how it says so."""

import dataclasses

import pytest

import actcompile
from actcompile import Config, ConfigError, Plan
from actcompile._config_checks import parse_nbytes
from actcompile.choices import LEVELS, RECOMPUTE
from actcompile.plan import Action, Decision

# settings -> the rule, the value and the remedy that the message must name.
REJECTED = [
    ({"bits": 5.5, "auto": False}, ["bits must be one of 1, 2, 3, 4, 6, 8", "5.5", "choose the nearest"]),
    ({"bits": 5}, ["bits must be one of", "5"]),
    ({"bits": True}, ["bits must be one of", "True"]),
    ({"bits": "4"}, ["bits must be one of", "'4'"]),
    ({"bits": 4, "noise": 0.1}, ["at most one of bits, memory and noise", "bits=4, noise=0.1", "keep one"]),
    ({"memory": "1GiB", "bits": 2}, ["at most one of", "memory='1GiB'"]),
    ({"noise": 0.1, "auto": False}, ["noise needs sensitivities", "noise=0.1", "leave auto out"]),
    ({"memory": "much"}, ["memory must be a number of bytes", "'much'", "6GiB"]),
    ({"memory": 1.5}, ["a share in (0, 1]", "1.5", "int or a string"]),
    ({"memory": -1}, ["memory must be bytes", "-1"]),
    ({"group_size": 0}, ["a power of two from 32 to 4096", "0", "256 is the default"]),
    ({"group_size": 100}, ["a power of two", "100"]),
    ({"group_size": 256.0}, ["a power of two", "256.0"]),
    ({"sparsity": 0.8, "plan": "plan.json"}, ["plan and sparsity"]),
    ({"sparsity": True}, ["a share of dropped elements", "True"]),
    ({"sparsity": 1.2}, ["a share of dropped elements in [0, 1)", "1.2", "try 0.8"]),
    ({"rows": 0}, ["a share of rows to store in (0, 1]", "0", "try 0.3"]),
    ({"rows": True}, ["a share of rows", "True"]),
    ({"rows": 0.5, "sparsity": 0.8}, ["rows=0.5 and sparsity=0.8", "auto=True"]),
    ({"rows": 0.5, "padding": "a mask"}, ["the name of an argument", "'a mask'"]),
    ({"padding": "attention_mask"}, ["padding needs the share of rows", "rows=None", "give rows=0.5"]),
    ({"pruning": "samples", "sparsity": 0.8, "rows": 0.5}, ["rows"]),
    ({"pruning": "rows"}, ["pruning must be one of blocks, samples", "'rows'"]),
    ({"pruning": "samples"}, ["needs the share to drop", "sparsity=None", "give sparsity=0.8"]),
    ({"pruning": "samples", "sparsity": 1.0}, ["a share of dropped elements in [0, 1)", "1.0"]),
    *(
        ({"pruning": "samples", "sparsity": 0.8, name: value}, ["says by itself what is stored", name, "leave out"])
        for name, value in {
            **{"bits": 4, "auto": True, "memory": 0.5, "noise": 0.1, "offload": True, "level": "L1"},
            **{"min_numel": 64, "overrides": {"head": 8}, "profile_every": 9, "sparse_value_bits": 8},
        }.items()
    ),
    ({"sparse_value_bits": 5}, ["sparse_value_bits must be one of 16, 8, 4", "5"]),
    ({"noise": 0}, ["noise must be a positive relative variance", "0", "try 0.01"]),
    ({"min_numel": -1}, ["min_numel must be an integer from 0 up", "-1"]),
    ({"profile_every": 0}, ["profile_every must be an integer from 1 up", "0"]),
    ({"seed": 0.5}, ["seed must be a 64-bit integer", "0.5"]),
    ({"recompute": "some"}, ["recompute must be one of none, cheap", "'some'"]),
    ({"lowering": "triton"}, ["lowering must be one of inductor, eager", "'triton'"]),
    ({"auto": 1}, ["auto must be True or False", "1"]),
    ({"check": 1}, ["check must be True or False", "1"]),
    ({"skip": "head"}, ["skip must be a tuple of module-name patterns", "'head'"]),
    ({"overrides": {"head": 5}}, ["overrides must give one of 1, 2, 3, 4, 6, 8 bits", "5 for 'head'", "nearest"]),
    ({"overrides": {"head": True}}, ["overrides must give one of", "True for 'head'"]),
    ({"overrides": {3: 4}}, ["overrides must map module-name patterns", "the pattern 3"]),
    ({"overrides": ["head"]}, ["overrides must map module-name patterns", "['head']"]),
    ({"overrides": ("head", 4)}, ["overrides must map module-name patterns", "('head', 4)"]),
    ({"plan": 3}, ["plan must be an actcompile.Plan or the path", "3"]),
    ({"plan": Plan(), "bits": 4}, ["a plan already says what is stored", "got plan and bits", "give one"]),
    ({"plan": Plan(), "offload": True}, ["a plan already says what is stored", "got plan and offload"]),
    ({"plan": Plan(), "level": "L3"}, ["a plan already says what is stored", "got plan and level"]),
    ({"offload": 1}, ["offload must be True or False", "1"]),
    ({"level": "L9"}, ["level must be one of L0, L1", "'L9'"]),
]


@pytest.mark.parametrize(("settings", "parts"), REJECTED, ids=lambda value: str(value)[:40])
def test_rejected(settings: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        Config(**settings)  # type: ignore[arg-type]
    assert isinstance(found.value, ValueError)
    for part in parts:
        assert part in str(found.value)


def test_a_sparsity_prunes_blocks_to_their_share() -> None:
    assert Config().prunings == ()
    assert Config(sparsity=0.8).prunings == ((51, 256, 16),)
    assert Config(sparsity=0.9, sparse_value_bits=4).prunings == ((26, 256, 4),)
    assert Config(sparsity=0.8, auto=True).prunings == ((51, 256, 4), (51, 256, 8), (51, 256, 16))
    assert len(Config(auto=True).prunings) > 3
    assert Config(sparsity=0.8, bits=32).lossy


def test_back_razor() -> None:
    assert Config.back_razor() == Config(pruning="samples", sparsity=0.8)
    assert Config.back_razor(0.9, skip=("head",)) == Config(pruning="samples", sparsity=0.9, skip=("head",))
    # What changes nothing is no contradiction.
    assert Config.back_razor(0.0, auto=False, offload=False, min_numel=0).sparsity == 0.0
    with pytest.raises(ConfigError, match="bits=4"):
        Config.back_razor(bits=4)


def test_default_is_4_bits() -> None:
    assert Config().code_bits == 4
    assert Config().lossy


def test_overrides_are_frozen_and_hashable() -> None:
    given = {"head": 8, "*": 32}
    config = Config(overrides=given)
    given["head"] = 1
    assert config.override_pairs == (("head", 8), ("*", 32))
    assert hash(config) == hash(Config.from_options({"overrides": {"head": 8, "*": 32}}))
    assert dataclasses.replace(config, bits=2).override_pairs == config.override_pairs


def test_overrides_make_lossless_settings_lossy() -> None:
    assert not Config(bits=32, overrides={"head": 32}).lossy
    assert Config(bits=32, overrides={"head": 8}).lossy


def test_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().bits = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        Config(4)  # type: ignore[misc]


@pytest.mark.parametrize(("level", "bits"), [("L0", None), ("L1", 4), ("L1.1", 8), ("L1.2", 2)])
def test_levels(level: str, bits: int | None) -> None:
    assert Config.from_level(level).code_bits == bits
    assert Config(level=level) == Config.from_level(level)
    assert Config.from_level(level).lossy == (bits is not None)


def test_fields_beside_a_level_win() -> None:
    assert Config(level="L1", bits=2).code_bits == 2
    assert Config.from_level("L0", bits=8).code_bits == 8


@pytest.mark.parametrize(("level", "bits"), [("L2", 4), ("L2.1", 3), ("L2.2", 2)])
def test_automatic_levels(level: str, bits: int) -> None:
    config = Config.from_level(level)
    assert config.automatic and config.average_bits == config.code_bits == bits
    assert not Config.from_level(level, auto=False).automatic


def test_bits_between_two_widths_need_auto() -> None:
    config = Config(bits=3.5, auto=True)
    assert (config.average_bits, config.code_bits) == (3.5, 3)
    with pytest.raises(ConfigError, match=r"bits must be a mean from 1 to 8, or 32 for lossless, got 0\.5"):
        Config(bits=0.5, auto=True)


@pytest.mark.parametrize(("level", "bits", "auto"), [("L3", 4, True), ("swap", None, False), ("L4bit-swap", 4, False)])
def test_levels_that_offload(level: str, bits: int | None, auto: bool) -> None:
    config = Config.from_level(level)
    assert config.offloads
    assert (config.code_bits, config.automatic, config.lossy) == (bits, auto, bits is not None)
    assert not Config.from_level(level, offload=False).offloads


def test_only_these_levels_offload() -> None:
    assert [level for level in LEVELS if Config(level=level).offloads] == ["L3", "swap", "L4bit-swap"]


def test_a_plan_that_recomputes_needs_what_full_offers() -> None:
    kept, again = Decision(Action.KEEP, ""), Decision(Action.RECOMPUTE, "")
    assert Config(plan=Plan({"a": kept})).partition_mode == "cheap"
    assert Config(plan=Plan({"a": kept, "b": again})).partition_mode == "full"
    assert [Config(recompute=mode).partition_mode for mode in RECOMPUTE] == list(RECOMPUTE)


def test_from_options_names_the_fields() -> None:
    assert Config.from_options({"bits": 2, "skip": ["head"]}) == Config(bits=2, skip=("head",))
    with pytest.raises(ConfigError, match="got 'bitz': use one of bits, memory"):
        Config.from_options({"bitz": 2})


def test_checking_changes_nothing() -> None:
    given = {"bits": 8, "group_size": 64, "skip": ("a",), "seed": 3, "min_numel": 0}
    config = Config(**given)  # type: ignore[arg-type]
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("6GiB", 6 * 2**30), ("500MB", 500 * 10**6), ("1048576", 2**20), (" 1.5 KiB ", 1536), ("7B", 7)],
)
def test_parse_nbytes(text: str, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "6 GiBs", "-1GiB", "1e9"])
def test_parse_nbytes_rejects(text: str) -> None:
    with pytest.raises(ConfigError, match="got"):
        parse_nbytes(text)


def test_public_names() -> None:
    assert set(actcompile.__all__) <= set(dir(actcompile))
