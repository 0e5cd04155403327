"""The demo: one model, one text, several ways to save activation memory, side by side."""

import functools
import importlib
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx

from ._gpt import GPT
from ._profile import check_call
from ._text import Corpus, held_out_batches, load_corpus, training_batches
from .api import report
from .config import Config
from .meter import Peak, measure_peak, measure_steps

VOCABULARY = 256
HELD_OUT_BATCHES = 8
TIMED_ROUNDS = 10
CHECKED_BATCH = 2


@dataclass(frozen=True)
class Variant:
    """One way to train: how the model is compiled, and whether its blocks are checkpointed."""

    label: str
    backend: str | Callable[..., Any] | None = "inductor"
    bits: int | None = None
    checkpointed: bool = False

    def compile(self, model: torch.nn.Module) -> Callable[..., Tensor]:
        """What is called in place of ``model``."""
        if self.backend is None:
            return model
        options: dict[str, Any] | None = {"bits": self.bits} if self.bits else None
        return torch.compile(model, backend=self.backend, options=options)


def inductor_with_budget(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor, told to save about half of the activations and to recompute the others.

    A backend of its own: torch.compile would hand the code of the run without a budget to the one with it.
    """
    with functorch_config.patch(activation_memory_budget=0.5):
        return compile_fx(graph, list(inputs))  # type: ignore[return-value]


VARIANTS: Mapping[str, Variant] = {
    "eager": Variant("eager", backend=None),
    "compile": Variant("torch.compile"),
    "budget": Variant("torch.compile, budget 0.5", backend=inductor_with_budget),
    "checkpoint": Variant("torch.compile, checkpointed", checkpointed=True),
    "act8": Variant("act, 8 bits", backend="act", bits=8),
    "act4": Variant("act, 4 bits", backend="act", bits=4),
    "act2": Variant("act, 2 bits", backend="act", bits=2),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the demo does; the command line's options."""

    data: Path | None = None
    steps: int = 150
    batch: int = 8
    tokens: int = 256
    layers: int = 4
    width: int = 256
    heads: int = 4
    dropout: float = 0.0
    lr: float = 1e-3
    warmup: int = 10
    runs: Sequence[str] = tuple(VARIANTS)
    out: Path = Path("demo")
    seed: int = 0
    device: str = "auto"

    def make_device(self) -> torch.device:
        """The device named, or for "auto" a CUDA device if there is one.

        Raises:
            ValueError: For a CUDA device that torch does not see.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' needs a CUDA device that torch can use, got none: take 'cpu' or 'auto'")
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


@dataclass(frozen=True)
class Result:
    """What one run showed. ``stored_nbytes`` is alive between forward and backward, parameters left out."""

    name: str
    label: str
    peak: Peak
    stored_nbytes: int
    step_ms: float
    first_step_s: float
    held_out_loss: float
    losses: tuple[float, ...]


@dataclass
class Run:
    """A model in training."""

    name: str
    options: Options
    corpus: Corpus
    device: torch.device
    losses: list[float] = field(default_factory=list)
    first_step_s: float = 0.0

    def __post_init__(self) -> None:
        options = self.options
        self.variant = VARIANTS[self.name]
        torch.manual_seed(options.seed)
        self.model = GPT(
            layers=options.layers,
            width=options.width,
            heads=options.heads,
            vocabulary=VOCABULARY,
            tokens=options.tokens,
            dropout=options.dropout,
            checkpointed=self.variant.checkpointed,
        ).to(self.device)
        self.compiled = self.variant.compile(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1 / (options.warmup + 1), 1, options.warmup)
        self.batches = training_batches(self.corpus, options.batch, options.tokens, options.seed)

    def check(self) -> None:
        """Compares the gradient of a small batch with the exact one, where tensors are rounded.

        Raises:
            GradientError: When it is not as close to that as predicted.
        """
        if self.variant.bits:
            options = self.options
            tokens, targets = next(training_batches(self.corpus, CHECKED_BATCH, options.tokens, options.seed))
            batch = tokens.to(self.device), targets.to(self.device)
            check_call(functools.partial(self._autocast, self.model), batch, {}, None, Config(bits=self.variant.bits))

    def train(self, progress: Callable[..., Any]) -> None:
        """Trains for all steps, the first of which compiles, under a bar that ``progress`` (tqdm) makes."""
        with progress(total=self.options.steps, desc=f"{self.variant.label:27}", unit="step") as bar:
            start = time.perf_counter()
            for _ in range(self.options.steps):
                self.losses.append(self.step())
                self.first_step_s = self.first_step_s or time.perf_counter() - start
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}", refresh=False)
                bar.update()

    def step(self) -> float:
        """One training step; returns the loss, and so waits for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._forward(*self._next_batch())
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def measure(self, step_ms: float) -> Result:
        """The memory of one more step without the optimizer, and the loss on the held-out text."""
        self.optimizer.zero_grad(set_to_none=True)
        batch = self._next_batch()
        stored = measure_peak(lambda: self._forward(*batch), self.device).end_nbytes
        peak = measure_peak(lambda: torch.autograd.backward(self._forward(*batch)), self.device)
        self.optimizer.zero_grad(set_to_none=True)
        return Result(
            name=self.name,
            label=self.variant.label,
            peak=peak,
            stored_nbytes=stored,
            step_ms=step_ms,
            first_step_s=self.first_step_s,
            held_out_loss=self._held_out_loss(),
            losses=tuple(self.losses),
        )

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Computed by the model itself, uncompiled, so that all runs are judged by the same arithmetic."""
        self.model.eval()
        options = self.options
        batches = held_out_batches(self.corpus, options.batch, options.tokens, HELD_OUT_BATCHES)
        losses = [self._autocast(self.model, tokens, targets).item() for tokens, targets in batches]
        self.model.train()
        return statistics.fmean(losses)

    def _forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self._autocast(self.compiled, tokens, targets)

    def _autocast(self, call: Callable[..., Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            return call(tokens.to(self.device), targets.to(self.device))

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        tokens, targets = next(self.batches)
        return tokens.to(self.device), targets.to(self.device)


def run_demo(options: Options) -> list[Result]:
    """Checks and trains all runs one after the other, measures them in turn, prints a table and writes the output
    folder.

    Raises:
        GradientError: When rounding changes a gradient more than predicted.
        ImportError: When a package of the extra "demo" is missing.
        ValueError: For data that cannot be trained on.
    """
    tqdm = _import_demo_packages()
    from ._demo_output import results_table, write_output

    device = options.make_device()
    corpus = load_corpus(options.data, options.tokens)
    print(f"Text: {corpus.description}. Device: {describe_device(device)}.", flush=True)
    torch._dynamo.reset()
    runs = []
    for name in options.runs:
        runs.append(Run(name, options, corpus, device))
        runs[-1].check()
        runs[-1].train(tqdm)
    print(f"Timing {TIMED_ROUNDS} more steps of each run in turn ...", flush=True)
    times_ms = measure_steps({run.name: run.step for run in runs}, TIMED_ROUNDS)
    results = [run.measure(statistics.median(times_ms[run.name])) for run in runs]
    bits = {run.variant.bits: report(run.model) for run in runs if run.variant.bits}
    saved = bits.get(4) or next(iter(bits.values()), None)
    write_output(options, results, saved, f"{corpus.description}. {describe_device(device)}")
    print(results_table(results))
    print(f"Loss curves, memory timelines and the report: {options.out / 'report.html'}")
    return results


def describe_device(device: torch.device) -> str:
    """The device in words, and the torch that ran on it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def _import_demo_packages() -> Callable[..., Any]:
    """Looks for what the output needs before the training starts; returns tqdm."""
    for name in ("matplotlib", "tqdm"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"the demo needs {name}, which is not installed: pip install actcompile[demo]") from error
    # Inductor's own code calls what torch has deprecated; it would break the progress bars.
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
    return importlib.import_module("tqdm").tqdm  # type: ignore[no-any-return]
