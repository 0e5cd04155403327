"""The planner where tensors may be pruned: rows written by hand, and properties."""

import math
import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from actcompile import Config, ConfigError, Plan
from actcompile.choices import AUTO_PRUNINGS, CODE_BITS
from actcompile.plan import Action, Decision, Profile, Pruning, Sensitivity
from actcompile.planner import ProbedGraph, predicted_noise, solve

from .test_planner import ROW, total_nbytes

PRUNING = Pruning(51, 256, 4)
NUMEL = 2**16


def graph_of(
    codes: Mapping[str, Mapping[int, float]],
    pruned: Mapping[str, Mapping[Pruning, float]],
    is_layer_input: bool = True,
) -> ProbedGraph:
    """By key the noise of codes, where widths left out are as bad as the next lower one, and of prunings."""
    known = {}
    for key, given in codes.items():
        noises = [given.get(bits, math.nan) for bits in CODE_BITS]
        for position, noise in enumerate(noises):
            noises[position] = noises[position - 1] if math.isnan(noise) else noise
        variance = dict(zip(CODE_BITS, noises, strict=True))
        known[key] = Sensitivity(variance, "probed", pruned=pruned.get(key, {}))
    rows = [
        replace(ROW, key=key, numel=NUMEL, nbytes=4 * NUMEL, shape=(NUMEL,), is_layer_input=is_layer_input)
        for key in codes
    ]
    return ProbedGraph(rows, Profile(known, 1.0))


def chosen(plan: Plan) -> list[object]:
    """Bits of codes, or what is kept."""

    def way(decision: Decision) -> object:
        return decision.pruning if decision.action is Action.SPARSIFY else decision.bits

    return [way(decision) for decision in plan.values()]


def test_a_pruning_of_less_noise_is_chosen() -> None:
    graph = graph_of({"a": {1: 9.0, 2: 1.0, 3: 0.2}}, {"a": {PRUNING: 0.4}})
    (plan,) = solve([graph], Config(bits=2, auto=True))
    assert chosen(plan) == [PRUNING]
    assert "least noise at these bytes" in plan["a"].reason
    assert predicted_noise(graph.rows, plan, graph.profile) == 0.4
    (finer,) = solve([graph], Config(bits=3, auto=True))
    assert chosen(finer) == [3]


@pytest.mark.parametrize("noises", [{}, {PRUNING: math.inf}, {PRUNING: math.nan}, {Pruning(26, 256, 4): 0.0}])
@pytest.mark.parametrize("settings", [{"bits": 2}, {"memory": 20_000}, {"noise": 2.0}])
def test_prunings_of_unknown_noise_are_never_chosen(
    noises: Mapping[Pruning, float], settings: Mapping[str, float]
) -> None:
    graph = graph_of({"a": {1: 9.0, 2: 1.0}}, {"a": noises})
    (plan,) = solve([graph], Config(auto=True, **settings), settings.get("memory"))  # type: ignore[arg-type]
    assert chosen(plan) == [2]


@pytest.mark.parametrize(("is_layer_input", "expected"), [(True, PRUNING), (False, 2)])
def test_estimates_of_paths_are_taken_twice(is_layer_input: bool, expected: object) -> None:
    """Products tell the noise of a layer's input, one direction that of the others."""
    graph = graph_of({"a": {1: 9.0, 2: 1.0}}, {"a": {PRUNING: 0.6}}, is_layer_input)
    (plan,) = solve([graph], Config(bits=2, auto=True))
    assert chosen(plan) == [expected]
    surely = graph_of({"a": {1: 9.0, 2: 1.0}}, {"a": {PRUNING: 0.4}}, is_layer_input)
    (plan,) = solve([surely], Config(bits=2, auto=True))
    assert chosen(plan) == [PRUNING]
    # What is reported is the estimate itself.
    assert predicted_noise(surely.rows, plan, surely.profile) == 0.4


# Noise of the pruning, mean bits -> what is chosen. Two bits on average are one for "a" and three for "b", which
# promises 1.6, too little less than the best of the uniform formats.
CERTAIN = [
    (0.9, 2, [PRUNING, PRUNING]),
    (1.05, 2, [2, 2]),
    (0.9, 2.6, [PRUNING, 3]),
    (1.05, 2.6, [2, 3]),
    # One that promises enough.
    (1.2, 2, [2, 2]),
]


@pytest.mark.parametrize(("noise", "bits", "expected"), CERTAIN)
def test_mixtures_that_promise_little_give_way_to_the_best_uniform_format(
    noise: float, bits: float, expected: list[object]
) -> None:
    codes = {"a": {1: 1.2, 2: 1.0}, "b": {1: 9.0, 2: 1.0, 3: 0.4}}
    graph = graph_of(codes, {key: {PRUNING: noise} for key in codes})
    (plan,) = solve([graph], Config(bits=bits, auto=True))
    assert chosen(plan) == expected


def test_mixtures_that_promise_enough_are_chosen() -> None:
    codes = {"a": {1: 0.3, 2: 0.25}, "b": {1: 9.0, 2: 1.0, 3: 0.2}}
    graph = graph_of(codes, {key: {PRUNING: 0.9} for key in codes})
    (plan,) = solve([graph], Config(bits=2, auto=True))
    assert chosen(plan) == [1, 3]


def test_no_plan_is_worse_than_the_same_format_for_all_rows() -> None:
    """Whether it mixes formats or spends what the best of them leaves; of estimates of paths twice as much counts."""
    draw = random.Random(0)
    for _ in range(100):
        graph = random_graph(draw, 1.0)
        bits = draw.choice([1.5, 2, 2.5, 3])
        (plan,) = solve([graph], Config(bits=bits, auto=True))
        room = len(graph.rows) * NUMEL * (bits / 8 + 6 / 256)
        formats = [Decision(Action.QUANTIZE, "", bits=width, group_size=256) for width in CODE_BITS]
        formats += [Decision(Action.SPARSIFY, "", bits=p.value_bits, keep=p.keep, block=p.block) for p in AUTO_PRUNINGS]
        uniform = [Plan({row.key: way for row in graph.rows}) for way in formats]
        fitting = [cautious_noise(graph, one) for one in uniform if total_nbytes(graph, one) <= room]
        assert total_nbytes(graph, plan) <= room
        assert fitting and cautious_noise(graph, plan) <= min(fitting) * (1 + 1e-9)


def cautious_noise(graph: ProbedGraph, plan: Plan) -> float:
    noises = {
        row.key: predicted_noise([row], plan, graph.profile)
        * (2 if plan[row.key].action is Action.SPARSIFY and not row.is_layer_input else 1)
        for row in graph.rows
    }
    return sum(noises.values())


def random_graph(draw: random.Random, share_known: float = 0.8) -> ProbedGraph:
    keys = [str(number) for number in range(draw.randint(1, 6))]
    scales = {key: 10 ** draw.uniform(-4, 1) for key in keys}
    codes = {key: {bits: scales[key] / (2**bits - 1) ** 2 for bits in CODE_BITS} for key in keys}
    pruned = {
        key: {
            pruning: scales[key] * 10 ** draw.uniform(-2, 1) for pruning in AUTO_PRUNINGS if draw.random() < share_known
        }
        for key in keys
    }
    return graph_of(codes, pruned, draw.random() < 0.5)


def test_budgets_are_never_exceeded() -> None:
    draw = random.Random(1)
    num_pruned = 0
    for _ in range(60):
        graph = random_graph(draw)
        exact = sum(row.nbytes for row in graph.rows)
        budgets = sorted(int(exact * draw.uniform(0.03, 0.3)) for _ in range(4))
        for budget in budgets:
            try:
                (plan,) = solve([graph], Config(memory=budget), budget)
            except ConfigError:
                assert budget < len(graph.rows) * (NUMEL // 8 + NUMEL // 256 * 6)
                continue
            assert total_nbytes(graph, plan) <= budget
            noise = predicted_noise(graph.rows, plan, graph.profile)
            assert math.isfinite(noise)
            num_pruned += sum(decision.action is Action.SPARSIFY for decision in plan.values())
        (reached,) = solve([graph], Config(noise=1e-2))
        assert predicted_noise(graph.rows, reached, graph.profile) <= 1e-2
    assert num_pruned > 20


def test_the_mean_of_bits_counts_what_is_stored_of_pruned_rows() -> None:
    """What a plan says of tensors that it does not know: 2 bits here, as 51 of 256 elements take on 4 bits."""
    (plan,) = solve([graph_of({"a": {1: 9.0, 2: 9.0}}, {"a": {PRUNING: 0.1}})], Config(bits=2, auto=True))
    assert chosen(plan) == [PRUNING]
    assert plan.otherwise is not None and plan.otherwise.bits == 2
