"""The functions that users call, explain apart."""

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import actcompile
from actcompile import Config, ConfigError


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh())


def train(model: nn.Module) -> None:
    model(torch.randn(64, 64)).sum().backward()


def test_transform_compiles_in_place() -> None:
    model = layers()
    keys = list(model.state_dict())
    assert actcompile.transform(model, bits=2, lowering="eager") is model
    assert list(model.state_dict()) == keys
    train(model)
    assert {row.bits for row in actcompile.report(model).rows if row.action == "quantize"} == {2}


def test_transform_takes_a_config() -> None:
    model = actcompile.transform(layers(), Config(bits=8, lowering="eager"))
    train(model)
    assert {row.bits for row in actcompile.report(model).rows if row.action == "quantize"} == {8}


def test_transform_works_beside_hooks() -> None:
    model, seen = layers(), []
    model.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    train(actcompile.transform(model, lowering="eager"))
    assert seen == [(64, 64)]


@pytest.mark.parametrize(
    ("arguments", "settings", "rule"),
    [
        ((3,), {}, "model must be a torch.nn.Module, got int"),
        ((layers(),), {"bitz": 3}, "got 'bitz'"),
        ((layers(), 4), {}, "config must be an actcompile.Config, got 4"),
        ((layers(), Config()), {"bits": 4}, "give a config or single settings, not both: got config and bits"),
        ((layers(),), {"bits": 7}, "bits must be one of"),
    ],
)
def test_transform_checks_at_once(arguments: tuple[object, ...], settings: dict[str, object], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        actcompile.transform(*arguments, **settings)  # type: ignore[arg-type]


def test_copies_of_a_transformed_model_are_plain() -> None:
    """As the docstring says: Module.compile is dropped by deepcopy and pickle."""
    assert "deepcopy and pickle drop" in (actcompile.transform.__doc__ or "")
    model = actcompile.transform(nn.Sequential(nn.Linear(64, 64), nn.GELU()), lowering="eager")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        train(other)
        assert not actcompile.report(other).rows
        train(actcompile.transform(other, lowering="eager"))
        assert actcompile.report(other).rows


def test_report_knows_whose_graph_it_is() -> None:
    first, second = (actcompile.transform(layers(), bits=bits, lowering="eager") for bits in (2, 8))
    train(first)
    train(second)
    for model, bits in ((first, 2), (second, 8)):
        assert {row.bits for row in actcompile.report(model).rows if row.action == "quantize"} == {bits}
    everything = actcompile.report()
    assert len(everything.rows) == len(actcompile.report(first).rows) + len(actcompile.report(second).rows)
    assert not actcompile.report(layers()).rows


def test_report_of_a_wrapped_model() -> None:
    wrapped = torch.compile(layers(), backend="act", options={"lowering": "eager"})
    train(wrapped)
    assert actcompile.report(wrapped).rows == actcompile.report(wrapped._orig_mod).rows != ()


def test_two_settings_for_one_model() -> None:
    """Compiled graphs of one are not served for the other."""
    model, x = layers(), torch.randn(64, 64)
    gradients = []
    for bits in (2, 8):
        model.zero_grad()
        torch.compile(model, backend="act", options={"bits": bits, "lowering": "eager"})(x).sum().backward()
        gradients.append(model[0].weight.grad)
    model.zero_grad()
    model(x).sum().backward()
    exact = model[0].weight.grad
    assert (gradients[1] - exact).norm() < 0.3 * (gradients[0] - exact).norm()


def test_reset_forgets() -> None:
    model = actcompile.transform(layers(), lowering="eager")
    train(model)
    assert actcompile.report(model).rows
    actcompile.reset()
    assert not actcompile.report().rows
    train(model)
    assert actcompile.report(model).rows


def test_skip_and_min_numel() -> None:
    model = actcompile.transform(layers(), lowering="eager", skip=("2",), min_numel=4097)
    train(model)
    reasons = {row.module: row.reason for row in actcompile.report(model).rows if row.counts}
    assert reasons["0"] == "it has fewer than 4097 elements (min_numel)"
    actcompile.reset()
    model = actcompile.transform(layers(), lowering="eager", skip=("0", "2"))
    train(model)
    assert {row.reason for row in actcompile.report(model).rows if row.module == "0"} == {
        "its module matches '0' (skip)"
    }


@pytest.mark.slow
def test_modes_and_inductor_settings_are_handed_on() -> None:
    model, x = layers(), torch.randn(64, 64)
    options = {"mode": "max-autotune-no-cudagraphs", "inductor": {"triton.cudagraphs": False}, "bits": 8}
    torch.compile(model, backend="act", options=options)(x).sum().backward()
    assert actcompile.report(model).rows


def test_import_is_cheap() -> None:
    heavy = ("triton", "matplotlib", "transformers", "scipy", "torch._inductor.lowering")
    script = f"import sys, actcompile; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_sources_never_import_triton_or_matplotlib_at_the_top() -> None:
    for source in Path(actcompile.__file__).parent.glob("*.py"):
        for line in source.read_text().splitlines():
            assert not line.startswith(("import triton", "import matplotlib", "from matplotlib", "from transformers"))


def test_no_deprecated_calls_of_ours() -> None:
    model, x = layers(), torch.randn(64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        torch.compile(model, backend="act", options={"lowering": "eager"})(x).sum().backward()
