"""Nothing is ignored in silence: unknown patterns, settings without effect, code that Dynamo leaves out."""

import json
import logging
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import actcompile
from actcompile import Config, ConfigError
from actcompile._gpt import GPT
from actcompile._patterns import unmatched
from actcompile.backend import read_options

X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
EAGER = {"lowering": "eager"}


class Named(nn.Module):
    """Layers with names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 64] -> [B, 8]."""
        return self.head(self.encoder(x))


class Recurrent(nn.Module):
    """A layer that Dynamo skips, with all that calls it."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.head = kind(64, 64, batch_first=True), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 64] -> [B, 8]."""
        return self.head(self.layer(x[:, None])[0])


class Counted(nn.Module):
    """Batch normalization whose mean is over all batches so far: their number is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 64), nn.BatchNorm1d(64, momentum=None), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 64] -> [B, 8]."""
        return self.last(self.norm(self.first(x)).relu())


class Unpadded(nn.Module):
    """Rows that are picked by their values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 64] -> [N, 8]."""
        return self.last(self.first(x).relu()[(x[:, 0] > 0).nonzero()[:, 0]])


def train(model: nn.Module, steps: int = 1, **settings: object) -> None:
    actcompile.transform(model, **{**EAGER, **settings})
    for _ in range(steps):
        model(X).sum().backward()


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"skip": ("haed",)}, ["skip must name modules", "'haed'", "the closest are 'head'"]),
        ({"skip": ("encoder",)}, ["'encoder'", "it holds modules that are called, write 'encoder.*'"]),
        ({"overrides": {"*.haed": 8}}, ["overrides must name modules", "'*.haed'", "'head'"]),
        ({"skip": ("head", "xyz")}, ["'xyz'", "there are 'encoder.*', 'head'"]),
    ],
)
def test_unknown_patterns_warn(settings: dict[str, object], parts: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "actcompile"):
        train(model := Named(), 3, **settings)
    (record,) = (record for record in caplog.records if record.name.startswith("actcompile"))
    for part in parts:
        assert part in record.getMessage()
    # Who trains one step only finds it here.
    assert record.getMessage() in actcompile.report(model).notes
    assert record.getMessage() in str(actcompile.report(model))
    assert record.getMessage() in actcompile.explain(Named(), X, config=Config(**settings)).notes  # type: ignore[arg-type]


def test_patterns_that_match_any_graph_are_known(caplog: pytest.LogCaptureFixture) -> None:
    """Each of two graphs has one of the modules."""
    first, second = Named(), Named()

    def function(x: Tensor) -> Tensor:
        y = first.encoder(x)
        torch._dynamo.graph_break()
        return second.head(y)

    step = torch.compile(function, backend="act", options={**EAGER, "skip": ("encoder.*", "head", "first.*")})
    with caplog.at_level(logging.WARNING, "actcompile"):
        for _ in range(2):
            step(X).sum().backward()
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "skip must name modules that the model calls"
    ]
    assert "'first.*'" in caplog.text


def test_layers_are_offered_as_one_pattern() -> None:
    sites = [tuple(f"blocks.{i}.mlp.up/linear" for i in range(12))]
    (line,) = unmatched(Config(skip=("block.*.mlp.up",)), sites)
    assert line.endswith("the closest are 'blocks.*.mlp.up'")
    assert not unmatched(Config(skip=("blocks.*",), overrides={"*": 8}), sites)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"profile_every": 9}, ["profile_every=9", "auto=None", "set auto=True"]),
        ({"profile_every": 9, "level": "L0", "auto": True}, ["profile_every=9", "bits=32"]),
        ({"profile_every": 9, "plan": "plan.json"}, ["profile_every=9", "plan='plan.json'"]),
        ({"sparse_value_bits": 8}, ["sparse_value_bits", "sparsity=None", "give sparsity=0.8"]),
    ],
)
def test_what_needs_another_setting(settings: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        Config(**settings)  # type: ignore[arg-type]
    for part in parts:
        assert part in str(found.value)
    Config(profile_every=9, auto=True), Config(profile_every=9, memory=0.5), Config(sparse_value_bits=8, sparsity=0.8)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"recompute": "full"}, "recompute='full'"),
        ({"recompute": "full", "memory": 0.1, "offload": True}, "recompute='full'"),
        ({"bits": 32, "auto": True}, "auto=True"),
        ({"level": "L0", "noise": 0.1}, "noise=0.1"),
        ({"bits": 32, "seed": 3}, "seed=3"),
        ({"level": "L0", "group_size": 64}, "group_size=64"),
        ({"sparsity": 0.8, "auto": True, "sparse_value_bits": 8}, "sparse_value_bits=8"),
        ({"pruning": "samples", "sparsity": 0.8, "seed": 3}, "seed=3"),
        ({"pruning": "samples", "sparsity": 0.8, "check": True}, "check=True"),
        ({"plan": actcompile.Plan(), "group_size": 64}, "group_size=64"),
        ({"mode": "max-autotune", "lowering": "eager"}, "mode='max-autotune'"),
        ({"inductor": {"max_autotune": True}, "lowering": "eager"}, "max_autotune=True"),
    ],
    ids=str,
)
def test_settings_without_effect_warn_once(
    options: dict[str, object], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "actcompile"):
        for _ in range(2):
            read_options(None, options)
    (record,) = caplog.records
    assert name in record.getMessage() and "leave one of them out" in record.getMessage()


@pytest.mark.parametrize(
    "options",
    [
        {"recompute": "full", "memory": 0.1},
        {"plan": actcompile.Plan(), "recompute": "none"},
        {"bits": 32, "overrides": {"head": 8}, "group_size": 64, "seed": 3},
        {"level": "L2", "profile_every": 5, "seed": 1},
        {"inductor": {"fallback_random": True}, "lowering": "eager"},
        {"pruning": "samples", "sparsity": 0.8, "skip": ("head",)},
    ],
    ids=str,
)
def test_settings_with_effect_do_not_warn(options: dict[str, object], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "actcompile"):
        read_options(None, options)
    assert not caplog.records


@pytest.mark.parametrize("function", [actcompile.explain, actcompile.profile])
def test_settings_among_the_models_arguments(function: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match=r"got bits=2, which the model does not take: give settings as config=actcom"):
        function(Named(), X, bits=2)
    with pytest.raises(ConfigError, match=r"max_batch_size hands keyword arguments to the model, got bits=2"):
        actcompile.max_batch_size(Named(), X, memory="1GiB", bits=2)


def test_arguments_that_are_called_like_settings() -> None:
    class Noisy(Named):
        def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
            return super().forward(x + noise)

    assert actcompile.explain(Noisy(), X, noise=0.1).rows


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"triton.cudagraphs": True}, ["got 'triton.cudagraphs'", "give {\"inductor\": {'triton.cudagraphs': True}}"]),
        ({"inductor": {"nope": 1}}, ["settings of torch._inductor.config, got 'nope'"]),
        ({"inductor": {"max_autotun": 1}}, ["got 'max_autotun'", "the closest are 'max_autotune'"]),
        ({"inductor": {"max_autotune": "yes"}}, ["got 'max_autotune': 'yes'", "give a bool"]),
        ({"inductor": "max_autotune"}, ["inductor must be a dict", "'max_autotune'", "give {"]),
    ],
    ids=str,
)
def test_settings_of_inductor(options: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ValueError) as found:
        torch.compile(Named(), backend="act", options={**EAGER, **options})(X)
    assert type(found.value).__name__ == "ConfigError"
    for part in parts:
        assert part in str(found.value)


@pytest.mark.parametrize("model", ["x", 3, torch.sin])
def test_report_of_what_is_no_module(model: object) -> None:
    with pytest.raises(ConfigError, match=r"model must be a torch.nn.Module, got .*: give the module, or nothing"):
        actcompile.report(model)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: Recurrent(nn.LSTM), "allow_rnn"),
        (lambda: Recurrent(nn.GRU), "allow_rnn"),
        (Unpadded, "capture_dynamic_output_shape_ops"),
    ],
)
def test_what_is_not_traced_comes_with_its_remedy(make: Callable[[], nn.Module], remedy: str) -> None:
    train(model := make())
    before = actcompile.report(model)
    (note,) = before.notes
    # What autograd keeps for code that no graph has, is in none of these bytes.
    assert note.startswith("not traced, and not compressed: 1x ") and f"torch._dynamo.config.{remedy}" in note
    assert note in str(before) and "run a step first" not in str(before)
    assert json.loads(before.to_json())["notes"] == [note]
    assert "not traced" in before._repr_html_()
    actcompile.reset()
    assert not actcompile.report().notes
    assert "run a step first" in str(actcompile.report())
    with torch._dynamo.config.patch({remedy: True}), torch.backends.mkldnn.flags(enabled=False):
        train(again := make())
    after = actcompile.report(again)
    assert not after.notes and len(after.timelines) == 1


def test_norms_without_a_momentum() -> None:
    """No setting of Dynamo's helps: with the one that it names, the graph breaks without a reason that it counts."""
    train(model := Counted())
    first, second = actcompile.report(model).notes
    assert "Tensor.item()" in first
    assert second.endswith("norm: BatchNorm(momentum=None) reads a number; give it a momentum, as 0.1")
    actcompile.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        train(model := Counted())
    first, again = actcompile.report(model).notes
    # Torch 2.11 counts the reason.
    assert re.search("1x Graph break; TORCH_LOGS=graph_breaks says why|1x Could not guard on data-dependent", first)
    assert again == second
    actcompile.reset()
    model = Counted()
    model.norm.momentum = 0.1
    train(model)
    assert actcompile.report(model).notes == ()


def test_layers_beyond_the_recompile_limit_are_named() -> None:
    class Scaled(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number, self.layer = number, nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh() * (self.number + 1)

    layers = [Scaled(number) for number in range(4)]
    x = X
    with torch._dynamo.config.patch(recompile_limit=2):
        for layer in layers:
            layer.compile(backend="act", options=EAGER, dynamic=False)
            x = layer(x)
    (note,) = actcompile.report().notes
    assert "recompile limit exceeded" in note and "increasing torch._dynamo.config.recompile_limit" in note


def test_graphs_without_a_gradient() -> None:
    model = actcompile.transform(Named(), **EAGER)
    with torch.no_grad():
        model(X)
    assert "the graphs compiled so far need no gradient" in str(actcompile.report(model))


def test_modules_of_torchs_own_compiled_in_place() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU())
    model.compile(backend="act", options=EAGER)
    model(X).sum().backward()
    report = actcompile.report(model)
    # Up to 2.13, Dynamo skips them.
    assert ("use actcompile.transform(model)" in str(report)) == (not report.rows)
    assert actcompile.report(actcompile.transform(model, **EAGER)).notes == ()


def test_a_graph_without_breaks_has_no_notes() -> None:
    model = actcompile.transform(GPT(layers=1, width=64, vocabulary=64, tokens=32), **EAGER)
    model(IDS, IDS).backward()
    assert actcompile.report(model).notes == ()


def test_caches_of_language_models() -> None:
    """Keys and values that are returned stay exact; the reason names the remedy, which works."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1, max_position_embeddings=64, **sizes)
    reports = []
    for options in ({}, {"use_cache": False}):
        model = transformers.LlamaForCausalLM(config).train()
        model.compile(backend="act", options={**EAGER, "min_numel": 0})
        model(input_ids=IDS, labels=IDS, **options).loss.backward()
        reports.append(actcompile.report(model))
    held = [[row for row in report.rows if "use_cache=False" in row.reason] for report in reports]
    assert [len(rows) for rows in held] == [2, 0]
    assert all("attn" in row.module and row.action == "keep" for row in held[0])
    assert reports[1].ratio > reports[0].ratio
