"""The largest batch that fits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import actcompile
from actcompile import CompileError, Config, ConfigError, _max_batch
from actcompile._gpt import GPT
from actcompile.meter import measure_phases

KIB = 1024


def mlp(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(dropout), nn.Linear(256, 16))


def squared(output: Tensor) -> Tensor:
    return output.square().sum()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Batch -> bytes of the steps that were traced for just this batch."""
    found: dict[int, int] = {}
    plain = _max_batch._Step.nbytes

    def nbytes(step: _max_batch._Step, batch: int) -> int:
        found[batch] = plain(step, batch)
        return found[batch]

    monkeypatch.setattr(_max_batch._Step, "nbytes", nbytes)
    return found


def step_nbytes(model: nn.Module, x: Tensor, loss: Callable[[Any], Tensor] | None, config: Config) -> int:
    """What is counted for a step of ``x``."""
    return _max_batch._Step(model, (x,), {}, loss, config).nbytes(x.shape[0])


def test_uses_the_memory_and_no_more(traced: dict[int, int]) -> None:
    model, limit = mlp(), 3 * 2**20
    batch = actcompile.max_batch_size(model, torch.randn(4, 64), memory=limit, loss=squared)
    assert traced[batch] <= limit
    after = step_nbytes(model, torch.randn(batch + batch // 50, 64), squared, Config())
    assert after > limit
    assert len(traced) <= 5


def test_counts_parameters_buffers_the_batch_and_gradients() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64))
    parameters = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    x = torch.randn(8, 64)
    report = actcompile.explain(lambda x: squared(model(x)), x, config=Config(bits=32))
    assert step_nbytes(model, x, squared, Config(bits=32)) == parameters + x.nbytes + report.predicted_peak_nbytes
    gradients = sum(value.nbytes for value in model.parameters())
    assert report.predicted_peak_nbytes > gradients


def test_frozen_parameters_have_no_gradients() -> None:
    model, x = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512)), torch.randn(4, 512)
    trained = step_nbytes(model, x, squared, Config())
    model[0].requires_grad_(False)
    # The first weight's gradient and the second's were the peak.
    saved = trained - step_nbytes(model, x, squared, Config())
    assert saved == pytest.approx(model[0].weight.nbytes, rel=0.01)


def test_parameters_of_modules_that_are_out_of_sight() -> None:
    x = torch.randn(8, 64)

    class Holder:
        model = mlp()

    holder = Holder()
    assert step_nbytes(lambda x: holder.model(x), x, None, Config()) == step_nbytes(holder.model, x, None, Config())  # type: ignore[arg-type]


def test_extra_is_taken_off_and_units_are_read() -> None:
    model, x = mlp(), torch.randn(4, 64)
    expected = actcompile.max_batch_size(model, x, memory=2 * 2**20, loss=squared)
    assert actcompile.max_batch_size(model, x, memory="3MiB", extra="1MiB", loss=squared) == expected
    assert actcompile.max_batch_size(model, x, memory=3 * 2**20, extra=2**20, loss=squared) == expected


def test_fewer_bits_and_less_kept_leave_room_for_more() -> None:
    model, x = mlp(), torch.randn(4, 64)
    two, eight, lossless = (
        actcompile.max_batch_size(model, x, memory="2MiB", config=Config(bits=bits), loss=squared)
        for bits in (2, 8, 32)
    )
    assert two > eight > lossless
    # Without a loss, what the model returns is kept.
    assert actcompile.max_batch_size(model, x, memory="2MiB", config=Config(bits=2)) <= two


def test_automatic_bits_count_as_the_next_higher_width() -> None:
    model, x = mlp(), torch.randn(4, 64)
    automatic = actcompile.max_batch_size(model, x, memory="2MiB", config=Config(auto=True, bits=2.5), loss=squared)
    assert automatic == actcompile.max_batch_size(model, x, memory="2MiB", config=Config(bits=3), loss=squared)


def test_follows_a_plan() -> None:
    model, x = mlp(), torch.randn(256, 64)
    plan = actcompile.profile(model, x, loss=squared)
    followed = actcompile.max_batch_size(model, x, memory="2MiB", config=Config(plan=plan), loss=squared)
    # The loss is no part of what the plan was made for, and neither of what is traced.
    assert followed == actcompile.max_batch_size(model, x, memory="2MiB", config=Config(plan=plan))
    assert followed > actcompile.max_batch_size(model, x, memory="2MiB", config=Config(bits=32))


def test_keyword_arguments_and_inputs_without_a_batch() -> None:
    model, table = mlp(), torch.randn(3, 64)

    def loss(inputs: dict[str, Tensor], table: Tensor, *, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs["x"] + table.sum(0)), labels)

    inputs, labels = {"x": torch.randn(4, 64)}, torch.randint(16, (4,))
    batch = actcompile.max_batch_size(loss, inputs, table, labels=labels, memory="2MiB")
    wider = torch.randn(3, 64 * KIB)[:, ::KIB].contiguous()
    assert actcompile.max_batch_size(loss, inputs, wider, labels=labels, memory="2MiB") == batch > 64


def test_a_model_that_fixes_its_sizes() -> None:
    model, names = mlp(), {size: str(size) for size in range(10**4)}

    def fixed(x: Tensor) -> Tensor:
        assert names[x.shape[0]]
        return squared(model(x))

    x = torch.randn(4, 64)
    expected = actcompile.max_batch_size(lambda x: squared(model(x)), x, memory="2MiB")
    assert actcompile.max_batch_size(fixed, x, memory="2MiB") == pytest.approx(expected, rel=0.01)


def test_graph_breaks() -> None:
    first, second = mlp(), nn.Linear(16, 64)

    def whole(x: Tensor) -> Tensor:
        return squared(second(first(x).sin()))

    def broken(x: Tensor) -> Tensor:
        y = first(x).sin()
        torch._dynamo.graph_break()
        return squared(second(y))

    expected = actcompile.max_batch_size(whole, torch.randn(4, 64), memory="2MiB")
    assert actcompile.max_batch_size(broken, torch.randn(4, 64), memory="2MiB") == pytest.approx(expected, rel=0.15)


def test_changes_nothing() -> None:
    model = nn.Sequential(mlp(0.1), nn.BatchNorm1d(16))
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    x = torch.randn(4, 64)
    random = torch.get_rng_state()
    assert actcompile.max_batch_size(model, x, memory="2MiB") > 1
    assert torch.equal(torch.get_rng_state(), random)
    assert actcompile.get_rng_state() == {"position": 0}
    assert all(value.grad is None for value in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not actcompile.report().rows
    assert not hasattr(x, "_dynamo_weak_dynamic_indices")


@pytest.mark.parametrize(
    ("arguments", "settings", "rule"),
    [
        ((4, 64), {"memory": "64KiB"}, r"step of one sample, \d+ bytes .*, got '64KiB': give that much"),
        ((4, 64), {"memory": "1MiB", "extra": "1MiB"}, "step of one sample"),
        ((1, 64), {"memory": "2MiB"}, "at least 2 samples, got 1"),
        ((), {"memory": "2MiB"}, "example batch as tensors, got none"),
        ((4, 64), {"memory": 0}, "memory must be bytes from 1 up"),
        ((4, 64), {"memory": 0.5}, "memory must be bytes from 1 up"),
        ((4, 64), {"memory": "much"}, "memory must be a number of bytes"),
        ((4, 64), {"memory": "2MiB", "extra": -1}, "extra must be bytes from 0 up"),
        ((4, 64), {"memory": "2MiB", "extra": True}, "extra must be bytes from 0 up"),
        ((4, 64), {"memory": "2MiB", "config": 4}, "config must be an actcompile.Config"),
        ((4, 64), {"memory": "2MiB", "config": Config(memory="1MiB")}, "config must say how many bits"),
        ((4, 64), {"memory": "2MiB", "config": Config(noise=0.01)}, r"set bits, or plan=actcompile.profile"),
    ],
)
def test_bad_input(arguments: tuple[int, ...], settings: dict[str, Any], rule: str) -> None:
    x = torch.randn(*arguments) if arguments else torch.tensor(1.0)
    with pytest.raises(ConfigError, match=rule):
        actcompile.max_batch_size(mlp(), x, **settings)


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="unfreeze what is trained"):
        actcompile.max_batch_size(mlp().requires_grad_(False), torch.randn(4, 64), memory="1MiB")


def test_no_model() -> None:
    with pytest.raises(ConfigError, match="got int"):
        actcompile.max_batch_size(3, torch.randn(4, 64), memory="1MiB")  # type: ignore[arg-type]


def test_a_model_that_reads_values() -> None:
    model = mlp()

    def function(x: Tensor) -> Tensor:
        return squared(model(x)) if x.sum() > 0 else squared(x)

    with pytest.raises(CompileError, match="reads a tensor's"):
        actcompile.max_batch_size(function, torch.randn(4, 64), memory="2MiB")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"bits": 4}, {"level": "L0"}], ids=str)
def test_the_meter_agrees(settings: dict[str, Any]) -> None:
    model, limit = GPT(layers=1, width=64, heads=2, vocabulary=128, tokens=64), 12 * 2**20
    ids = torch.randint(128, (2, 4, 64))
    config = Config(**settings)
    batch = actcompile.max_batch_size(model, *ids, memory=limit, config=config)
    compiled = torch.compile(model, backend="act", options={"config": config})
    full = torch.randint(128, (2, batch, 64))
    compiled(*full).backward()
    model.zero_grad(set_to_none=True)
    losses: list[Tensor] = []
    phases = measure_phases([lambda: losses.append(compiled(*full)), lambda: losses.pop().backward()])
    peak = max(phase.peak_nbytes for phase in phases)
    lasting = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    assert 0.97 * limit <= lasting + full.nbytes + peak <= 1.005 * limit
