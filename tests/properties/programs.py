"""Random small training steps: Python source, the tensors that it starts from, and how the step is run."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from .operators import BOOLS, CONSTANTS, FLOATS, INTEGERS, PAIRS, WRITES

# The batch while a program is drawn: no other dimension has this size.
BATCH = 7
DTYPES = (torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16)
# Sizes of the batch, one call after the other; more than one makes it a dynamic dimension.
SIZES = ((BATCH,), (BATCH,), (BATCH, 11), (BATCH, 300), (5, 9), (0,), (1,))
# What happens in a training step: forward, backward, and somebody who writes into a buffer or an input.
SCHEDULES = ("fb", "fb", "fbfb", "ffbb", "fwb")


@dataclass(frozen=True)
class Given:
    """A tensor that the program starts from; "n" in its shape is the batch.

    ``role`` is parameter, buffer, data, leaf (data that needs a gradient) or boundary (the same, computed before).
    """

    name: str
    role: str
    shape: tuple[int | str, ...]
    layout: str = "dense"
    kind: str = "float"

    def make(self, batch: int, dtype: torch.dtype) -> Tensor:
        """The tensor, the same each time."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        shape = [batch if size == "n" else int(size) for size in self.shape]
        if self.kind == "int":
            return torch.randint(8, shape, generator=generator)
        if self.kind == "bool":
            return torch.rand(shape, generator=generator) > 0.4
        value = torch.randn([2 * size for size in shape], generator=generator).to(dtype)
        if self.layout == "strided":
            return value[tuple(slice(None, None, 2) for _ in shape)]
        value = value[tuple(slice(0, size) for size in shape)].clone()
        if self.layout == "transposed":
            return value.transpose(0, -1).contiguous().transpose(0, -1)
        return value[:1].expand(shape) if self.layout == "expanded" and batch else value


@dataclass(frozen=True)
class Program:
    """A model as source code, what it starts from, and how it is trained."""

    lines: tuple[str, ...]
    outputs: tuple[str, ...]
    given: tuple[Given, ...]
    dtype: torch.dtype
    sizes: tuple[int, ...]
    schedule: str
    recompute: str
    written: str
    aliased: bool

    @property
    def source(self) -> str:
        """The model's ``forward``."""
        names = ", ".join(["self", *(g.name for g in self.given if not g.name.startswith("self."))])
        lines = (*self.lines, f"return {', '.join(self.outputs)},")
        return f"def forward({names}):\n" + "".join(f"    {line}\n" for line in lines)

    def module(self) -> nn.Module:
        """The model with fresh parameters and buffers."""
        namespace: dict[str, Any] = {"torch": torch, "F": F}
        exec(self.source, namespace)
        module = type("Net", (nn.Module,), {"forward": namespace["forward"]})()
        for name, value in held(self.given, self.dtype).items():
            if isinstance(value, nn.Parameter):
                module.register_parameter(name, value)
            else:
                module.register_buffer(name, value)
        return module

    def inputs(self, batch: int) -> tuple[list[Tensor], list[Tensor]]:
        """Arguments of one call, and the leaves among them or behind them."""
        return arguments(self.given, self.dtype, batch, self.aliased)

    def __repr__(self) -> str:
        settings = f"{self.dtype}, batches {self.sizes}, {self.schedule}, recompute={self.recompute!r}"
        given = "\n".join(f"# {g.name}: {g.role} {list(g.shape)} {g.layout} {g.kind}" for g in self.given)
        return f"\n# {settings}, writes {self.written!r}, aliased {self.aliased}\n{given}\n{self.source}"


def held(given: tuple[Given, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    values: dict[str, Tensor] = {
        "mean": torch.zeros(4, dtype=dtype),
        "var": torch.ones(4, dtype=dtype),
        "count": torch.zeros((), dtype=torch.int64),
    }
    for g in given:
        if g.role in ("parameter", "buffer"):
            value = g.make(BATCH, dtype)
            values[g.name.removeprefix("self.")] = nn.Parameter(value) if g.role == "parameter" else value
    return values


def arguments(
    given: tuple[Given, ...], dtype: torch.dtype, batch: int, aliased: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Arguments of one call, and the leaves that get gradients; aliased data lies in the memory of the first."""
    args: list[Tensor] = []
    leaves: list[Tensor] = []
    for g in given:
        if g.role not in ("data", "leaf", "boundary"):
            continue
        value = g.make(batch, dtype)
        if g.role != "data":
            leaves.append(value.requires_grad_())
        first = next(
            (v for v in args if v.is_floating_point() and not v.requires_grad and v.shape == value.shape), None
        )
        if aliased and g.role == "data" and g.kind == "float" and first is not None:
            value = first.view_as(first)
        args.append(value * 1.0 if g.role == "boundary" else value)
    return args, leaves


@dataclass
class _Builder:
    """Draws a program line by line, and runs each as it comes, to know what shapes there are."""

    draw: Callable[[Any], Any]
    given: tuple[Given, ...]
    dtype: torch.dtype
    aliased: bool
    lines: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        args, _ = arguments(self.given, self.dtype, BATCH, self.aliased)
        names = [g.name for g in self.given if not g.name.startswith("self.")]
        self.environment = {"torch": torch, "F": F, "self": SimpleNamespace(**held(self.given, self.dtype))}
        self.environment.update(zip(names, args, strict=True))
        self.names = {g.name: self.value(g.name) for g in self.given}

    def value(self, name: str) -> Tensor:
        return eval(name, self.environment)

    def pick(self, hole: str) -> str | None:
        names = [name for name, value in self.names.items() if _HOLES[hole](value)]
        held = [g.name for g in self.given if g.name in names and g.role in ("buffer", "data", "boundary")]
        if hole == "g" or (hole == "m" and self.draw(st.booleans())):
            return self.draw(st.sampled_from(held))
        trained = [name for name in names if self.names[name].requires_grad]
        # What was computed last, and what has a gradient, is picked most often, so that programs grow deep.
        return self.draw(st.sampled_from([*names, *trained, *trained[-3:], *trained[-2:]])) if names else None

    def fill(self, template: str) -> str | None:
        holes: dict[str, Any] = {}
        for hole in _HOLES:
            if f"{{{hole}}}" in template:
                holes[hole] = self.pick(hole)
        if "{d}" in template:
            holes["d"] = self.draw(st.sampled_from((-1, 0, 1)))
        return None if None in holes.values() else template.format(**holes)

    def compute(self, templates: tuple[str, ...]) -> None:
        line = self.fill(self.draw(st.sampled_from(templates)))
        name = f"v{len(self.lines)}"
        if line is not None and self.run(f"{name} = {line}"):
            value = self.value(name)
            if (
                value.numel() > 4000
                or value.is_complex()
                or (value.numel() and float(value.double().abs().max()) > 100)
            ):
                self.lines.pop()
            else:
                self.names[name] = value

    def write(self) -> None:
        line = self.fill(self.draw(st.sampled_from(WRITES)))
        if line is not None:
            self.run(line if self.draw(st.booleans()) else f"with torch.no_grad(): {line}")

    def run(self, line: str) -> bool:
        try:
            exec(line, self.environment)
        except (RuntimeError, IndexError, TypeError, ValueError):
            return False
        self.lines.append(line)
        return True


_HOLES: dict[str, Callable[[Tensor], bool]] = {
    "a": Tensor.is_floating_point,
    "b": Tensor.is_floating_point,
    "g": Tensor.is_floating_point,
    "m": Tensor.is_floating_point,
    "i": lambda value: value.dtype == torch.int64,
    "c": lambda value: value.dtype == torch.bool,
}

_GIVEN = (
    *(
        Given("self.p0", "parameter", (4, 6)),
        Given("self.p1", "parameter", (6,)),
        Given("self.p2", "parameter", (8, 4)),
    ),
    *(Given("self.b0", "buffer", (4,)), Given("self.b1", "buffer", (8, 4)), Given("ids", "data", ("n",), kind="int")),
    Given("mask", "data", ("n", 1), kind="bool"),
)
_LAYOUTS = ("dense", "dense", "transposed", "strided", "expanded")


def _read(line: str) -> list[str]:
    """Names that ``line`` reads; what it writes in place, it does not."""
    return re.findall(r"\bv\d+\b", line.split(" = ")[-1] if re.match(r"v\d+ = ", line) else "")


@st.composite
def programs(draw: Callable[[Any], Any]) -> Program:
    """Programs whose outputs need a gradient."""
    roles = draw(st.lists(st.sampled_from(("data", "data", "leaf", "boundary")), min_size=1, max_size=3))
    width = draw(st.sampled_from((4, 4, 4, 6, 0)))
    floats = [Given(f"x{k}", r, ("n", width), draw(st.sampled_from(_LAYOUTS))) for k, r in enumerate(roles)]
    dtype, aliased = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    builder = _Builder(draw, (*_GIVEN, *floats), dtype, aliased)
    builder.start()
    for _ in range(draw(st.integers(4, 14))):
        kind = draw(st.sampled_from("ffffppccciibwww"))
        if kind == "w":
            builder.write()
        else:
            builder.compute({"f": FLOATS, "p": PAIRS, "c": CONSTANTS, "i": INTEGERS, "b": BOOLS}[kind])
    trained = [name for name, value in builder.names.items() if name[0] == "v" and value.requires_grad]
    # What nothing reads is an output, so that there is no dead code.
    outputs = [name for name in trained if not any(name in _read(line) for line in builder.lines)]
    if not outputs:
        builder.lines.append("v = torch.sin(x0).sum() * self.p1")
        outputs = ["v"]
    given = builder.given
    writable = [g.name for g in given if g.kind == "float" and g.role in ("buffer", "data")]
    return Program(
        tuple(builder.lines),
        tuple(outputs),
        given,
        dtype,
        draw(st.sampled_from(SIZES)),
        draw(st.sampled_from(SCHEDULES)),
        draw(st.sampled_from(("none", "cheap", "cheap", "full"))),
        draw(st.sampled_from(writable)),
        aliased,
    )
