"""A second process takes its code from torch's caches, and knows of its graphs what the first one found.

Graphs are products of matrices and lossless, so that Inductor compiles no C++ for them; a process that Dynamo and this
package have forgotten everything in stands for another one, but in the last tests.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch._dynamo.utils import counters

import actcompile
from actcompile import Config, backend, records
from actcompile.backend import Partitioner
from actcompile.plan import Role
from actcompile.reporting import Report
from actcompile.warm_start import Kept, Names, Traced

LOSSLESS = {"bits": 32, "min_numel": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Torch's cache folder, empty."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with (
        functorch_config.patch(enable_autograd_cache=True),
        torch._inductor.config.patch(fx_graph_cache=True),
        torch.compiler.config.patch(force_disable_caches=False),
    ):
        yield tmp_path


def linear(num_layers: int = 3) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(num_layers)))


def train(model: nn.Module, x: Tensor | None = None, **options: object) -> tuple[Report, int]:
    """Forgets all graphs, and trains one step: its report, and how often the partitioner was called for it."""
    actcompile.reset()
    with mock.patch.object(backend, "partition", wraps=backend.partition) as partition:
        step = torch.compile(model, backend="act", options={**LOSSLESS, **options})
        step(torch.ones(32, 64) if x is None else x).square().sum().backward()
        count = partition.call_count
    return actcompile.report(model), count


def test_warm_start_calls_no_partitioner_and_reports_the_same() -> None:
    model = linear()
    cold, num_cold = train(model)
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    warm, num_warm = train(model)
    assert (num_cold, num_warm) == (1, 0)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert any(row.counts for row in warm.rows)
    assert warm == cold
    assert warm.baseline_nbytes == cold.baseline_nbytes > 0
    assert warm.predicted_peak_nbytes == cold.predicted_peak_nbytes
    assert all(torch.equal(got, p.grad) for got, p in zip(gradients, model.parameters(), strict=True))


def test_plan_and_log_of_a_warm_start(caplog: pytest.LogCaptureFixture) -> None:
    model = linear()
    train(model)
    (cold,) = (record.plan for record in records.finished())
    with caplog.at_level("INFO", "actcompile"):
        train(model)
    (warm,) = (record.plan for record in records.finished())
    assert warm == cold
    assert warm.graphs
    assert "loaded from torch's cache" in caplog.text


def test_what_is_found_by_tracing_again_is_found_under_the_same_autocast() -> None:
    """Whatever is on where the report is asked for."""
    model = linear()
    with torch.autocast("cpu", torch.bfloat16):
        cold, _ = train(model)
    actcompile.reset()
    with torch.autocast("cpu", torch.bfloat16), mock.patch.object(backend, "partition") as partition:
        torch.compile(model, backend="act", options=LOSSLESS)(torch.ones(32, 64)).square().sum().backward()
    partition.assert_not_called()
    with torch.no_grad():
        warm = actcompile.report(model)
    assert warm == cold
    assert warm.predicted_peak_nbytes == cold.predicted_peak_nbytes


def test_other_settings_miss() -> None:
    model = linear()
    train(model)
    for options in ({"min_numel": 2**20}, {"recompute": "none"}, {"skip": ("1",)}):
        _, count = train(model, **options)
        assert count == 1, options
    report, count = train(model, skip=("1",))
    assert count == 0
    assert any("skip" in row.reason for row in report.rows)


class Named(nn.Module):
    """Two layers, the first called ``name``."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(64, 64, bias=False))
        self.last = nn.Linear(64, 64, bias=False)
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.last(getattr(self, self.name)(x))


def test_models_that_differ_in_names_alone_share_nothing() -> None:
    """Torch's key knows no names, and patterns of settings are matched with them."""
    for name in ("body", "neck"):
        report, count = train(Named(name), skip=("neck",))
        assert count == 1
        (row,) = (row for row in report.rows if row.counts)
        assert (row.module, "skip" in row.reason) == (name, name == "neck")


SOURCE = """
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64, 64))

    def forward(self, x):
        return x @ self.weight @ self.weight
"""


def load(folder: Path, above: int) -> nn.Module:
    """A model whose file has ``above`` more lines above it."""
    path = folder / "a_model.py"
    path.write_text("import torch\n" + "\n" * above + SOURCE)
    namespace: dict[str, object] = {"__name__": "a_model"}
    exec(compile(path.read_text(), str(path), "exec"), namespace)
    return namespace["Model"]()  # type: ignore[operator]


def test_lines_that_moved_are_reported_where_they_are(tmp_path: Path) -> None:
    cold, _ = train(load(tmp_path, 0))
    warm, count = train(load(tmp_path, 7))
    assert count == 0
    lines = [{row.source for row in report.rows if row.source} for report in (cold, warm)]
    assert lines == [{"a_model.py:9"}, {"a_model.py:16"}]


def test_changed_sources_miss() -> None:
    model = linear()
    train(model)
    with mock.patch.object(backend, "_sources", return_value=b"other"):
        assert train(model)[1] == 1
        assert train(model)[1] == 0


def test_all_files_are_sources() -> None:
    """Kernels' sources and tables of times decide what is compiled, too."""
    seen: list[str] = []
    backend._sources.cache_clear()
    with mock.patch.object(backend, "get_hash_for_files", side_effect=lambda paths: seen.extend(paths) or b""):
        backend._sources()
    backend._sources.cache_clear()
    names = {Path(path).name for path in seen}
    assert {"backend.py", "partition.py", "quantize.py", "_compiled_cpu.cpp", "weight_grad_times.csv"} <= names


@pytest.mark.parametrize("content", [b"", b"no pickle", None])
def test_damaged_entry_is_compiled_anew(cache: Path, content: bytes | None) -> None:
    model = linear()
    cold, _ = train(model)
    (entry,) = (path for path in (cache / "aotautograd").rglob("*") if path.is_file())
    entry.write_bytes(entry.read_bytes()[:-100] if content is None else content)
    report, count = train(model)
    assert (report, count) == (cold, 1)


def test_entry_without_a_record_is_traced_again() -> None:
    """As an entry would be if a release of torch lost what hangs on the backward."""
    model = linear()
    with mock.patch.object(Kept, "hang_on", lambda self, backward, found: setattr(self, "found", found)):
        cold, _ = train(model)
    report, count = train(model)
    assert (report, count) == (cold, 1)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1


def test_graph_without_a_backward_has_no_record() -> None:
    """Autograd is on, but nothing that it returns has a gradient: no partition is missed."""
    model = linear()
    for num_hits in range(2):
        actcompile.reset()
        step = torch.compile(lambda x: model(x).argmax(), backend="act", options=LOSSLESS)
        with mock.patch.object(backend, "partition") as partition:
            step(torch.ones(32, 64))
        partition.assert_not_called()
        assert counters["aot_autograd"]["autograd_cache_hit"] == num_hits
        assert not actcompile.report().rows


@pytest.mark.parametrize(
    "switch",
    [
        lambda: functorch_config.patch(enable_autograd_cache=False),
        lambda: torch.compiler.config.patch(force_disable_caches=True),
    ],
)
def test_nothing_is_written_where_the_cache_is_off(cache: Path, switch: Callable[[], object]) -> None:
    with switch():  # type: ignore[attr-defined]
        assert [train(linear())[1] for _ in range(2)] == [1, 1]
    assert not (cache / "aotautograd").exists()


def test_interpreted_graphs_are_not_cached(cache: Path) -> None:
    """Nor is compiled code taken in their place."""
    model = linear()
    train(model)
    entries = list((cache / "aotautograd").rglob("*"))
    assert train(model, lowering="eager")[1] == 1
    with torch.no_grad():
        torch.compile(model, backend="act", options={**LOSSLESS, "lowering": "eager"})(torch.ones(32, 64))
    assert list((cache / "aotautograd").rglob("*")) == entries


def test_batch_of_any_size() -> None:
    """Plans are made for the traced sizes: another first batch is another entry, and later ones need none."""
    model = linear()
    reports = {}
    for size in (32, 48):
        torch._dynamo.reset()
        x = torch.ones(size, 64)
        torch._dynamo.mark_dynamic(x, 0)
        reports[size], count = train(model, x)
        assert count == 1
    x = torch.ones(32, 64)
    torch._dynamo.mark_dynamic(x, 0)
    warm, count = train(model, x)
    assert (warm, count) == (reports[32], 0)
    assert warm.predicted_peak_nbytes == reports[32].predicted_peak_nbytes
    assert reports[32].saved_nbytes < reports[48].saved_nbytes


def test_key_holds_all_that_decides_beside_torchs_own() -> None:
    graph = torch.fx.symbolic_trace(linear())
    traced = Traced(graph, [], {})

    def key(roles: list[Role] | None = None, modules: str = "a", lines: tuple[str, ...] = ("f:1", "f:2")) -> object:
        traced.__dict__["names"] = Names((modules,) * len(lines), lines)
        return Partitioner(Config(), roles or [], records.GraphRecord(Config(), []), traced=traced).uuid()

    assert key() == key(lines=("f:3", "f:4"))
    assert len({key(), key([Role.INPUT]), key([Role.PADDING]), key(modules="b"), key(lines=("f:1", "f:1"))}) == 5


PROGRAM = """
import json, torch, actcompile
torch.set_num_threads(1)
from actcompile import backend
from actcompile._gpt import GPT
torch.manual_seed(0)
partition, calls = backend.partition, []
backend.partition = lambda *args, **kwargs: calls.append(1) or partition(*args, **kwargs)
model = GPT(layers=1, width=64, vocabulary=64, tokens=32)
tokens = torch.randint(64, (4, 32))
step = torch.compile(model, backend="act", options={"min_numel": 0, **%r})
for _ in range(%d):
    loss = step(tokens, tokens)
    loss.backward()
report = actcompile.report(model)
gradient = sum(p.grad.double().square().sum().item() for p in model.parameters())
print(json.dumps([loss.item(), gradient, report.to_json(), str(report), len(calls)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "num_steps", "calls"), [({"bits": 4}, 1, [1, 1]), ({"bits": 4, "auto": True}, 2, [2, 2])]
)
def test_second_process(cache: Path, options: dict[str, object], num_steps: int, calls: list[int]) -> None:
    """The same losses, gradients and report; what takes graphs is found by one partition, when the report is made."""
    found = []
    for _ in range(2):
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM % (options, num_steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0][:-1] == found[1][:-1]
    assert [one[-1] for one in found] == calls
