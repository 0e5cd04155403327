"""What pruning adds to the gradient, against what it does add, tensor by tensor."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from actcompile import _dropped, _pruned
from actcompile._dropped import GROUP, Dropped, dropped_moments, shapes_of
from actcompile._pruned import PruningNoise
from actcompile._slices import Groups, Layout, Part, cut
from actcompile.choices import CODE_BITS
from actcompile.plan import Pruning, Sensitivity
from actcompile.triton_kernels._layout import from_storage_order, to_storage_order

from ..passes.pairs import trace

PRUNINGS = [Pruning(2, 16, 4), Pruning(2, 16, 16), Pruning(51, 256, 4), Pruning(51, 256, 8), Pruning(51, 256, 16)]
EXACT_VALUES = [pruning for pruning in PRUNINGS if pruning.value_bits == 16]
NOTHING = {"x": Sensitivity(dict.fromkeys(CODE_BITS, 0.0), "probed")}


def lost(x: Tensor, pruning: Pruning) -> Tensor:
    """What is dropped, block by block in storage order."""
    blocks = F.pad(to_storage_order(x), (0, -x.numel() % pruning.block)).view(-1, pruning.block)
    kept = blocks.abs().topk(pruning.keep, dim=1).indices
    return from_storage_order(blocks.scatter(1, kept, 0.0).view(-1)[: x.numel()], x.shape, x.stride())


def noted(x: Tensor, dim: int | None = None, part: Part | None = None) -> Dropped:
    """What the forward notes of ``x``."""
    groups = Groups(Layout(tuple(x.shape), x.stride()), GROUP, dim, part)
    return Dropped(dropped_moments(x, shapes_of(PRUNINGS)), shapes_of(PRUNINGS), groups)


def nothing_noted(x: Tensor) -> Dropped:
    return noted(torch.zeros_like(x))


def of_a_path() -> PruningNoise:
    """For a tensor "x" that no gradient of a weight reads."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    graph.output(())
    return PruningNoise(graph, [], {node: "x"}, PRUNINGS)


def weighed(value: Tensor, u: Tensor, dropped: Dropped) -> Mapping[Pruning, float]:
    noise = of_a_path()
    noise.weigh("x", value, u, dropped)
    return noise.added_to(NOTHING)["x"].pruned


# Each reads x [4, 6, 64] and the weight [32, 64], or as their shapes say.
LAYERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Sequence[int], Sequence[int]]] = {
    "mm": (F.linear, (4, 6, 64), (32, 64)),
    "input on the left": (lambda x, w: x.flatten(0, 1).mm(w.view(64, 32)), (4, 6, 64), (32, 64)),
    "samples are summed": (lambda x, w: x.bmm(w.t().expand(4, 64, 32)), (4, 6, 64), (32, 64)),
    "convolution": (lambda x, w: F.conv2d(x, w, padding=1), (2, 16, 8, 8), (8, 16, 3, 3)),
    "two readers": (lambda x, w: torch.cat([F.linear(x, w[:32]), F.linear(x, w[32:])], -1), (4, 6, 64), (64, 64)),
    "scaled": (lambda x, w: F.linear(x, 0.25 * w), (4, 6, 64), (32, 64)),
}


class Seen(fx.Interpreter):
    """Shows every node to ``noise`` before it runs."""

    def __init__(self, module: fx.GraphModule, noise: PruningNoise) -> None:
        super().__init__(module)
        self._noise = noise

    def run_node(self, n: fx.Node) -> Any:
        self._noise.see(n, self.env)
        return super().run_node(n)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_of_a_layer_input_is_that_of_its_weight_gradient(name: str, dtype: torch.dtype) -> None:
    layer, shape, weight_shape = LAYERS[name]
    x, w = torch.randn(*shape, dtype=dtype), (torch.randn(*weight_shape, dtype=dtype) / 8).requires_grad_()
    traced = trace(lambda x, w: layer(torch.sin(x), w).square(), x, w)
    (key,) = (row.key for row in traced.rows() if row.is_layer_input)
    (slot,) = (slot for slot in traced.pair.slots if slot.key == key)
    num_outputs = len(traced.pair.user_outputs)
    results = traced.pair.forward(*(value.detach() for value in traced.inputs))
    placeholders = traced.pair.backward.graph.find_nodes(op="placeholder")
    tangents = [torch.randn_like(value) for value in results[:num_outputs]]
    arguments = dict(zip(placeholders, [*results[num_outputs:], *tangents], strict=True))
    noise = PruningNoise(traced.pair.backward.graph, traced.pair.input_roles, {slot.placeholder: key}, PRUNINGS)
    value = arguments[slot.placeholder]
    noise.weigh(key, value, torch.zeros_like(value), nothing_noted(value))
    exact = [grad for grad in Seen(traced.pair.backward, noise).run(*arguments.values()) if grad is not None]
    found = noise.added_to({key: NOTHING["x"]})[key].pruned
    for pruning in PRUNINGS:
        changed = {**arguments, slot.placeholder: value - lost(value, pruning)}
        pruned = [grad for grad in fx.Interpreter(traced.pair.backward).run(*changed.values()) if grad is not None]
        square = sum(float((a - b).float().square().sum()) for a, b in zip(exact, pruned, strict=True))
        # In bfloat16 some elements are equal, and lost together in part.
        assert found[pruning] == pytest.approx(square, rel=1e-4 if dtype == torch.float32 else 0.05)


def path(num_gradients: int = 64, numel: int = 512) -> tuple[Tensor, Tensor]:
    """A linear map to the gradient, and a tensor."""
    return torch.randn(num_gradients, numel) / 8, torch.randn(numel) + 0.2


@pytest.mark.parametrize("shape", [(512,), (2, 256), (32, 16)])
def test_sums_over_all_are_unbiased(shape: tuple[int, ...]) -> None:
    jacobian, x = path()
    exact = {pruning: float((jacobian @ lost(x, pruning)).square().sum()) for pruning in EXACT_VALUES}
    totals = torch.zeros(4, dtype=torch.float64)
    for seed in range(400):
        v = torch.randint(2, (64,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        noise = of_a_path()
        noise.weigh("x", x.view(shape), (jacobian.t() @ v).view(shape), nothing_noted(x.view(shape)))
        totals += noise._biases["x"]._totals.square() / 400
    # For each shape first what was noted, then what was decoded.
    assert totals[0] == totals[2] == 0
    assert totals[1].item() == pytest.approx(exact[EXACT_VALUES[0]], rel=0.2)
    assert totals[3].item() == pytest.approx(exact[EXACT_VALUES[1]], rel=0.2)


def test_rows_tell_more_than_one_draw() -> None:
    """What reaches the gradient row by row is the sum over rows; one sum over all may be anything."""
    x = torch.randn(64, 256).abs()
    found = []
    for seed in range(20):
        signs = torch.randint(2, (64, 1), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        found.append(weighed(x, signs.expand(64, 256).contiguous(), nothing_noted(x))[EXACT_VALUES[1]])
    by_rows = float(lost(x, EXACT_VALUES[1]).sum(1).square().sum())
    assert min(found) == pytest.approx(by_rows, rel=1e-3)


@pytest.mark.parametrize("is_noted", [True, False])
def test_bias_of_equal_samples_grows_with_the_square_of_their_number(is_noted: bool) -> None:
    x, u = torch.rand(256) + 0.5, torch.rand(256)

    def bias(batch: int) -> float:
        values = x.repeat(batch, 1)
        value, dropped = (torch.zeros_like(values), noted(values)) if is_noted else (values, nothing_noted(values))
        return weighed(value, u.repeat(batch, 1), dropped)[Pruning(51, 256, 16)]

    assert bias(1) > 0
    assert bias(40) / bias(20) == pytest.approx(4, rel=0.02)
    if not is_noted:
        assert bias(1) == pytest.approx(float((lost(x, Pruning(51, 256, 16)) * u).sum() ** 2), rel=1e-4)


@pytest.mark.parametrize("pruning", [pruning for pruning in PRUNINGS if pruning.value_bits < 16])
def test_values_in_few_bits_add_the_variance_of_their_rounding(pruning: Pruning) -> None:
    x, u = torch.randn(1024), torch.randn(1024)
    layout = x.shape, x.stride(), x.dtype
    kept, squares, draws = x - lost(x, pruning), 0.0, 600
    for seed in range(draws):
        parts = torch.ops.actcompile.sparsify(x, *pruning, torch.tensor(seed), 0)
        squares += float(u @ (torch.ops.actcompile.densify(*parts, *pruning, *layout) - kept)) ** 2 / draws
    found = weighed(x, u, nothing_noted(x))
    variance = found[pruning] - found[pruning._replace(value_bits=16)]
    assert variance == pytest.approx(squares, rel=0.2)


def test_some_rows_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the variances of single elements, never of sums; columns of a matrix come again every so many rows."""
    x, u = torch.randn(512, 1024), torch.randn(512, 1024) * torch.linspace(0.1, 3, 1024)
    some = weighed(x, u, noted(x))
    monkeypatch.setattr(_pruned, "_MANY_ROWS", 10**9)
    all_rows = weighed(x, u, noted(x))
    for pruning in PRUNINGS:
        exact = pruning._replace(value_bits=16)
        if pruning.value_bits == 16:
            assert some[pruning] == pytest.approx(all_rows[pruning], rel=0.1)
        elif pruning.value_bits == 4:
            variances = [found[pruning] - found[exact] for found in (some, all_rows)]
            assert variances[0] == pytest.approx(variances[1], rel=0.1)


def test_a_tail_that_codes_lose_counts() -> None:
    """Of probabilities on 4 bits the small ones come back as zeros; those that are dropped add up to a third."""
    probabilities = torch.softmax(torch.cat([torch.full((64, 1), 7.0), torch.randn(64, 255)], 1), 1)
    u = torch.rand(64, 256)
    codes = torch.ops.actcompile.quantize(probabilities, 4, 256, torch.tensor(0), 0)
    decoded = torch.ops.actcompile.dequantize(*codes, 4, 256, (64, 256), (256, 1), torch.float32)
    for pruning in EXACT_VALUES:
        exact = float((u * lost(probabilities, pruning)).sum() ** 2)
        assert float((u * lost(decoded, pruning)).sum() ** 2) < 0.2 * exact
        assert weighed(decoded, u, noted(probabilities))[pruning] == pytest.approx(exact, rel=0.1)


def test_what_differs_from_the_mean_is_noise() -> None:
    x, u = torch.randn(64, 256), torch.randn(64, 256)
    for pruning in EXACT_VALUES:
        found = weighed(torch.zeros_like(x), u, noted(x))[pruning]
        # Of zeros all elements lose their share.
        assert found == pytest.approx(float((u * lost(x, pruning)).square().sum()), rel=0.1)


def test_scale_counts_once() -> None:
    x, u = torch.randn(4, 256), torch.randn(4, 256)
    noise = of_a_path()
    noise.weigh("x", x, u, noted(x))
    once, thrice = noise.added_to(NOTHING)["x"], noise.added_to(NOTHING, 3.0)["x"]
    assert once.variance == thrice.variance
    for pruning in PRUNINGS:
        assert thrice.pruned[pruning] == pytest.approx(3 * once.pruned[pruning])


LAYOUTS = {"as it is": (0, 1, 2), "batch in the middle": (1, 0, 2), "batch last": (2, 1, 0)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_add_up_to_the_whole(layout: str) -> None:
    """Where blocks lie within a sample; else those of a part are others, and as large."""
    order = LAYOUTS[layout]
    x, u = (torch.randn(8, 32, 64).abs() for _ in range(2))
    x, u = (t.permute(order).contiguous().permute(*(order.index(dim) for dim in range(3))) for t in (x, u))
    noise = of_a_path()
    for start in (0, 4):
        part = Part(start, 4, 8)
        noise.weigh("x", cut(x, 0, part), cut(u, 0, part), noted(x, 0, part))
    parts, whole = noise.added_to(NOTHING)["x"].pruned, weighed(x, u, noted(x))
    for pruning in PRUNINGS:
        assert parts[pruning] == pytest.approx(whole[pruning], rel=1e-3 if layout == "as it is" else 0.1)


@pytest.mark.parametrize("shape", [(4, 8, 16, 64), (3, 7, 100), (70, 33), (1, 5000), (2000,)])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_few_elements_at_a_time_give_the_same(
    shape: tuple[int, ...], is_reversed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, u = torch.randn(shape).abs(), torch.randn(shape) + torch.linspace(-1, 2, shape[-1])
    if is_reversed:
        x, u = x.permute(*reversed(range(x.dim()))), u.permute(*reversed(range(x.dim())))
    whole = weighed(x, u, noted(x))
    monkeypatch.setattr(_dropped, "_CPU_NUMEL", 512)
    parts = weighed(x, u, noted(x))
    for pruning in PRUNINGS:
        assert parts[pruning] == pytest.approx(whole[pruning], rel=1e-4)


def test_without_prunings_nothing_is_added() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    graph.output(())
    noise = PruningNoise(graph, [], {node: "x"}, [])
    assert noise.added_to(NOTHING) == NOTHING


def test_equal_values_above_others_are_rounded_without_noise() -> None:
    """Decoded tensors have such groups; zero range must not become infinity times nothing."""
    values = torch.full((1, 256), -3.0)
    values[0, :26] = 5.0
    share = (values < 0).float()
    assert _pruned._rounding(values, torch.ones(1, 256), share, [4, 8]).tolist() == [0.0, 0.0]
