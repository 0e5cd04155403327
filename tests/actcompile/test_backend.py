"""The backend end to end: gradients, noise, and every ordinary way of using a compiled model."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import actcompile
from actcompile import Config, records
from actcompile._gpt import GPT
from actcompile.backend import Partitioner

from ..models import Task, bert, cosine, cosines, gpt, relative_error, resnet

TASKS: dict[str, Callable[[], Task]] = {"gpt": gpt, "bert": bert, "resnet": resnet}
EAGER = {"lowering": "eager", "min_numel": 0}


def compiled(model: nn.Module, **options: object) -> Callable[..., object]:
    return torch.compile(model, backend="act", options={**EAGER, **options})


def layers(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 8))


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def distance(got: list[Tensor], exact: list[Tensor]) -> float:
    flat_got, flat_exact = (torch.cat([value.flatten() for value in values]) for values in (got, exact))
    return float((flat_got - flat_exact).norm() / flat_exact.norm())


@pytest.mark.parametrize("recompute", ["none", "cheap"])
@pytest.mark.parametrize("name", TASKS)
def test_gradients_at_8_and_4_bits(name: str, recompute: str) -> None:
    task = TASKS[name]()
    exact = task.gradients()
    eight = task.gradients(compiled(task.model, bits=8, recompute=recompute))
    assert 0 < relative_error(eight, exact) <= 0.02
    torch._dynamo.reset()
    four = task.gradients(compiled(task.model, bits=4, recompute=recompute))
    assert relative_error(four, exact) > relative_error(eight, exact)
    assert cosine(four, exact) >= 0.98
    each = cosines(four, exact)
    assert min(each.values()) >= 0.9, min(each, key=each.__getitem__)


@pytest.mark.parametrize(("name", "rate"), [("gpt", 1e-3), ("bert", 1e-4), ("resnet", 1e-3)])
def test_training(name: str, rate: float) -> None:
    """The loss falls as in eager, and gradients after 50 steps are as good as at the start."""
    task = TASKS[name]()
    start = copy.deepcopy(task.model.state_dict())
    expected = train(task, task.model, rate)
    task.model.load_state_dict(start)
    step = compiled(task.model)
    got = train(task, step, rate)
    assert got[-1] < 0.8 * got[0]
    assert abs(got[-1] - expected[-1]) < 0.05 * (expected[0] - expected[-1])
    exact, draws = task.gradients(), [task.gradients(step) for _ in range(4)]
    assert min(cosine(four, exact) for four in draws) >= 0.98
    # One draw of the noise says little about a small gradient.
    found = [cosines(four, exact) for four in draws]
    each = {name: sum(cosine_of[name] for cosine_of in found) / len(found) for name in found[0]}
    assert min(each.values()) >= 0.9, min(each, key=each.__getitem__)
    torch._dynamo.reset()
    assert 0 < relative_error(task.gradients(compiled(task.model, bits=8)), exact) <= 0.02


def train(task: Task, call: Callable[..., object], rate: float) -> list[float]:
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=rate)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = task.loss(call)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", TASKS)
def test_level_0_interpreted_is_exact(name: str) -> None:
    task = TASKS[name]()
    exact = task.gradients()
    lossless = task.gradients(compiled(task.model, level="L0"))
    assert relative_error(lossless, exact) < 1e-5


@pytest.mark.slow
def test_level_0_equals_torch_compile_with_dropout() -> None:
    task = gpt(dropout=0.1, layers=1)
    torch.manual_seed(1)
    exact = task.gradients(torch.compile(task.model))
    torch._dynamo.reset()
    torch.manual_seed(1)
    lossless = task.gradients(torch.compile(task.model, backend="act", options={"level": "L0"}))
    assert relative_error(lossless, exact) < 1e-5
    report = actcompile.report(task.model)
    assert report.saved_nbytes <= 0.67 * report.baseline_nbytes


@pytest.mark.slow
def test_inductor_and_interpreter_round_alike() -> None:
    """Both store the same codes: gradients agree to float32 rounding, far below the noise of 4 bits."""
    task = gpt(layers=1)
    interpreted = task.gradients(compiled(task.model))
    torch._dynamo.reset()
    actcompile.set_rng_state({"position": 0})
    built = task.gradients(torch.compile(task.model, backend="act", options={"min_numel": 0}))
    assert relative_error(built, interpreted) < 0.01
    assert relative_error(built, task.gradients()) > 0.05


@pytest.mark.parametrize("bits", [2, 8])
def test_weight_gradient_is_unbiased(bits: int) -> None:
    """The mean over n seeds approaches the exact gradient as 1 / sqrt(n), and no slower."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32, bias=False))
    model[0].requires_grad_(False)
    x, direction = torch.randn(128, 64), torch.randn(128, 32)
    step = compiled(model, bits=bits, recompute="none")

    def gradient(call: Callable[..., object]) -> Tensor:
        model.zero_grad()
        (call(x) * direction).sum().backward()  # type: ignore[operator]
        assert model[1].weight.grad is not None
        return model[1].weight.grad.double()

    exact = gradient(model)
    noise = torch.stack([gradient(step) for _ in range(400)]) - exact
    single = noise.square().mean()
    assert single > 0
    for count in (25, 100, 400):
        means = noise.view(400 // count, count, *exact.shape).mean(1)
        assert 0.7 < float(means.square().mean() * count / single) < 1.4, count


def test_noise_differs_from_step_to_step_without_recompiling() -> None:
    task = gpt()
    step = compiled(task.model)
    first = gradients_after(task, step)
    graphs = counters["stats"]["unique_graphs"]
    state = actcompile.get_rng_state()
    second = gradients_after(task, step)
    assert distance(second, first) > 0.01
    actcompile.set_rng_state(state)
    # Not 0: eager's gradient of the embedding sums in any order.
    assert distance(gradients_after(task, step), second) < 1e-6
    assert counters["stats"]["unique_graphs"] == graphs == 1


def gradients_after(task: Task, step: Callable[..., object]) -> list[Tensor]:
    task.gradients(step)
    return gradients_of(task.model)


def test_torch_rng_is_not_drawn_from() -> None:
    model, x = layers(), torch.randn(64, 64)
    state = torch.get_rng_state()
    compiled(model)(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_that_of_eager() -> None:
    """The user's random numbers are drawn as ever: the same masks, one after the other."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64)), torch.randn(64, 64)
    step = compiled(model, bits=32)
    torch.manual_seed(3)
    expected = [model(x) for _ in range(3)]
    torch.manual_seed(3)
    torch.testing.assert_close([step(x) for _ in range(3)], expected)


def test_seed_decides_the_noise() -> None:
    model, x = layers(), torch.randn(64, 64)
    found = []
    for seed in (1, 2, 1):
        torch._dynamo.reset()
        actcompile.set_rng_state({"position": 0})
        model.zero_grad()
        compiled(model, seed=seed)(x).sum().backward()
        found.append(gradients_of(model))
    assert distance(found[1], found[0]) > 1e-4
    assert distance(found[2], found[0]) == 0


def test_gradients_accumulate() -> None:
    model, batches = layers(), torch.randn(3, 64, 64)
    step = compiled(model, bits=8)
    for x in batches:
        step(x).square().sum().backward()
    got = gradients_of(model)
    model.zero_grad()
    for x in batches:
        model(x).square().sum().backward()
    assert 0 < distance(got, gradients_of(model)) < 0.02


def test_two_backwards_of_one_forward_are_the_same() -> None:
    model, x = layers(), torch.randn(64, 64)
    loss = compiled(model)(x).square().sum()
    loss.backward(retain_graph=True)
    once = gradients_of(model)
    model.zero_grad()
    loss.backward()
    assert distance(gradients_of(model), once) == 0


def test_several_forwards_before_a_backward() -> None:
    model, batches = layers(), torch.randn(3, 64, 64)
    step = compiled(model, bits=8)
    losses = [step(x).square().sum() for x in batches]
    torch.stack(losses[::-1]).sum().backward()
    got = gradients_of(model)
    model.zero_grad()
    torch.stack([model(x).square().sum() for x in batches]).sum().backward()
    assert 0 < distance(got, gradients_of(model)) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(64, 64)
    step = compiled(model, bits=8)
    with torch.autocast("cpu", dtype):
        step(x).float().square().sum().backward()
    got = gradients_of(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        model(x).float().square().sum().backward()
    assert 0 < distance(got, gradients_of(model)) < 0.02
    quantized = [row for row in actcompile.report(model).rows if row.action == "quantize"]
    assert {row.dtype for row in quantized} == {dtype}
    # Copies of weights that autocast makes stay exact.
    assert all(row.shape[0] == 64 and row.role == "activation" for row in quantized)
    assert all(value.dtype == torch.float32 for value in got)


@pytest.mark.parametrize(("is_marked", "num_graphs"), [(True, 1), (False, 2)])
def test_batches_of_any_size(is_marked: bool, num_graphs: int) -> None:
    model = layers()
    step = compiled(model, bits=8)
    for size in (32, 48, 7, 129):
        x = torch.randn(size, 64)
        if is_marked:
            torch._dynamo.mark_dynamic(x, 0)
        model.zero_grad()
        step(x).square().sum().backward()
        got = gradients_of(model)
        model.zero_grad()
        model(x).square().sum().backward()
        assert 0 < distance(got, gradients_of(model)) < 0.02
    assert counters["stats"]["unique_graphs"] == num_graphs


def test_graph_breaks() -> None:
    first, second = layers(), nn.Linear(8, 64)

    def function(x: Tensor) -> Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(torch.sin(y)).square().sum()

    x = torch.randn(64, 64)
    torch.compile(function, backend="act", options={**EAGER, "bits": 8})(x).backward()
    got = [*gradients_of(first), *gradients_of(second)]
    assert counters["stats"]["unique_graphs"] == 2
    first.zero_grad()
    second.zero_grad()
    function(x).backward()
    assert 0 < distance(got, [*gradients_of(first), *gradients_of(second)]) < 0.02


def test_activations_of_another_graph_are_compressed() -> None:
    """At a graph break the second graph saves what the first one made."""
    first, second = nn.Linear(64, 64), nn.Linear(64, 64)

    def function(x: Tensor) -> Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(F.gelu(y))

    torch.compile(function, backend="act", options=EAGER)(torch.randn(64, 64)).sum().backward()
    (row,) = (row for row in actcompile.report(second).rows if row.role == "boundary")
    assert (row.action, row.shape) == ("quantize", (64, 64))


@pytest.mark.slow
def test_graphs_without_backward_go_to_inductor() -> None:
    model, x = layers(), torch.randn(64, 64)
    step = torch.compile(model, backend="act")
    state = actcompile.get_rng_state()
    with torch.no_grad():
        torch.testing.assert_close(step(x), model(x))
    with torch.inference_mode():
        torch.testing.assert_close(step(x), model(x))
    assert not actcompile.report().rows
    assert actcompile.get_rng_state() == state


def test_frozen_lower_layers_store_nothing() -> None:
    model, x = layers(), torch.randn(64, 64)
    model[:2].requires_grad_(False)
    compiled(model, recompute="none")(x).sum().backward()
    assert {row.module for row in actcompile.report(model).rows if row.counts} == {"1", "3"}
    assert model[0].weight.grad is None


def test_tied_weights() -> None:
    task = gpt()
    task.model.head.weight = task.model.embedding.weight  # type: ignore[union-attr, assignment]
    exact = task.gradients()
    assert 0 < relative_error(task.gradients(compiled(task.model, bits=8)), exact) <= 0.02


def test_in_place_relu_and_channels_last() -> None:
    task = resnet()
    task.model.to(memory_format=torch.channels_last)
    images, labels = task.inputs
    moved = images.to(memory_format=torch.channels_last)
    task.loss = lambda call: F.cross_entropy(call(moved), labels)  # type: ignore[arg-type]
    exact = task.gradients()
    assert 0 < relative_error(task.gradients(compiled(task.model, bits=8)), exact) <= 0.02
    assert task.model.stem[1].num_batches_tracked == 2  # type: ignore[index, union-attr]


def test_grouped_attention_saves_keys_once() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(64, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            batch, tokens, _ = x.shape
            q = self.q(x).view(batch, tokens, 4, 16).transpose(1, 2)
            k, v = self.kv(x).view(batch, tokens, 2, 16).transpose(1, 2).split(1, dim=1)
            k, v = (part.expand(batch, 4, tokens, 16) for part in (k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    model, x = Attention(), torch.randn(4, 64, 64)
    compiled(model, bits=8, recompute="none")(x).square().sum().backward()
    got = gradients_of(model)
    model.zero_grad()
    model(x).square().sum().backward()
    assert 0 < distance(got, gradients_of(model)) < 0.02
    # k and v once each, or together, not once per query head.
    shared = [row for row in actcompile.report(model).rows if row.counts and row.module == "kv"]
    assert sum(row.stored_nbytes for row in shared) <= 1.1 * 4 * 64 * 32


def test_indices_of_pooling_are_narrowed() -> None:
    """A window too large for Inductor's own pooling keeps int64 indices, which fit int16 here."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(17, 1), nn.Flatten(), nn.Linear(8 * 4, 4))
    x = torch.randn(64, 3, 20, 20)
    compiled(model, level="L0")(x).square().sum().backward()
    got = gradients_of(model)
    (row,) = (row for row in actcompile.report(model).rows if row.dtype == torch.int64)
    assert (row.action, row.stored_nbytes * 4) == ("narrow", row.nbytes)
    model.zero_grad()
    model(x).square().sum().backward()
    assert distance(got, gradients_of(model)) < 1e-5


@pytest.mark.slow
def test_inductor_with_a_dynamic_batch_under_autocast() -> None:
    """Codecs of symbolic sizes, compiled once."""
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 8))
    step = torch.compile(model, backend="act", options={"bits": 8, "min_numel": 0})
    for size in (96, 65, 300):
        x = torch.randn(size, 64)
        torch._dynamo.mark_dynamic(x, 0)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            step(x).float().square().mean().backward()
        assert all(bool(gradient.isfinite().all()) for gradient in gradients_of(model))
    assert counters["stats"]["unique_graphs"] == 1
    model.eval()
    torch._dynamo.reset()
    step = torch.compile(model, backend="act", options={"bits": 8, "min_numel": 0})
    for size in (96, 65):
        x = torch.randn(size, 64)
        torch._dynamo.mark_dynamic(x, 0)
        model.zero_grad()
        step(x).square().mean().backward()
        got = gradients_of(model)
        model.zero_grad()
        model(x).square().mean().backward()
        assert 0 < distance(got, gradients_of(model)) < 0.02


@pytest.mark.slow
def test_inductor_with_every_size_dynamic() -> None:
    """Strides are symbols too: of codes, of masks and of permuted tensors."""
    model = GPT(layers=1, width=64, tokens=32)
    mask = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    model.blocks.append(mask)
    step = torch.compile(model, backend="act", dynamic=True, options={"bits": 8, "min_numel": 0})
    for shape in ((4, 16), (6, 24)):
        tokens = torch.randint(256, shape)
        model.zero_grad()
        step(tokens, tokens).backward()
        got = gradients_of(model)
        model.zero_grad()
        model(tokens, tokens).backward()
        assert 0 < distance(got, gradients_of(model)) < 0.02
    assert {row.action for row in actcompile.report(model).rows} >= {"quantize", "pack"}
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 8, "auto": True}])
def test_numbers_that_change(options: dict[str, object]) -> None:
    """Under dynamic shapes, Dynamo passes them as tensors; also when the graph is compiled again, after the probe."""
    model = layers()

    def function(x: Tensor, scale: float) -> Tensor:
        return model(x).square().sum() * scale

    step = torch.compile(function, backend="act", dynamic=True, options={**EAGER, **options})
    for size, scale in ((32, 0.5), (48, 0.7), (7, 0.3)):
        x = torch.randn(size, 64)
        model.zero_grad()
        step(x, scale).backward()
        got = gradients_of(model)
        model.zero_grad()
        function(x, scale).backward()
        assert 0 < distance(got, gradients_of(model)) < 0.02
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_code_is_cached_by_settings() -> None:
    """Two settings never share an entry of Inductor's cache, and equal ones do."""
    plan = actcompile.Plan({"0/addmm": actcompile.plan.Decision(actcompile.plan.Action.KEEP, "")})
    configs = [Config(), Config(bits=2), Config(group_size=64), Config(recompute="none"), Config(plan=plan)]
    keys = [Partitioner(config, [], records.GraphRecord(config, [])).uuid() for config in configs]
    assert len(set(keys)) == len(configs)
    assert None not in keys
    assert keys[1] == Partitioner(Config(bits=2), [], records.GraphRecord(configs[1], [])).uuid()


def test_partitioner_is_pickled_as_its_uuid() -> None:
    """Inductor's cache pickles it with the rest of its settings, what the record knows about graphs must not matter."""
    task = gpt()
    task.gradients(compiled(task.model, bits=2))
    (used,) = records.finished()
    fresh = records.GraphRecord(used.config, [])
    partitioners = [Partitioner(used.config, [], record) for record in (used, fresh)]
    pickled = [pickle.dumps(partitioner) for partitioner in partitioners]
    assert pickled[0] == pickled[1] != pickle.dumps(Partitioner(Config(bits=3), [], fresh))
    # A copy of all settings is what is pickled, and kept: it must not hold the graphs.
    assert copy.deepcopy(partitioners[0]) == pickle.loads(pickled[0]) == partitioners[0].uuid()


def test_model_whose_input_needs_a_gradient() -> None:
    model, x = layers(), torch.randn(64, 64, requires_grad=True)
    compiled(model, bits=8)(x).square().sum().backward()
    assert x.grad is not None
    got, x.grad = x.grad, None
    model(x).square().sum().backward()
    assert 0 < distance([got], [x.grad]) < 0.02


def test_checkpoint_stays_a_constraint() -> None:
    from torch.utils.checkpoint import checkpoint

    model, head, x = layers(), nn.Linear(8, 4), torch.randn(64, 64)

    def function(x: Tensor) -> Tensor:
        return head(checkpoint(model, x, use_reentrant=False)).square().sum()

    torch.compile(function, backend="act", options={**EAGER, "bits": 8})(x).backward()
    got = gradients_of(model)
    assert not [row for row in actcompile.report().rows if row.counts and row.shape == (64, 64)]
    model.zero_grad()
    function(x).backward()
    assert distance(got, gradients_of(model)) < 0.02


@pytest.mark.parametrize("lowering", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("make", "num_weights"), [(gpt, 9), (resnet, 5)])
def test_a_sparsity_prunes_what_weight_gradients_alone_read(
    make: Callable[[], Task], num_weights: int, lowering: str
) -> None:
    torch.manual_seed(0)
    task = make()
    exact = task.gradients()
    options = {"sparsity": 0.8, "bits": 32, "recompute": "none", "lowering": lowering}
    pruned = task.gradients(torch.compile(task.model, backend="act", options=options))
    rows = actcompile.report(task.model).rows
    assert {row.kept for row in rows if row.action == "sparsify"} == {"51/256"}
    assert all(row.stored_nbytes < 0.14 * row.nbytes for row in rows if row.action == "sparsify")
    assert {row.action for row in rows if row.counts} <= {"sparsify", "keep", "pack", "narrow"}
    # Gradients of inputs are exact, and so are those of whatever is no layer's weight.
    largest = max(gradient.norm() for gradient in exact.values())
    changed = [name for name in exact if (pruned[name] - exact[name]).norm() > 1e-4 * largest]
    assert len(changed) == num_weights
    assert all(exact[name].dim() > 1 for name in changed)
    assert cosine(pruned, exact) > 0.8
