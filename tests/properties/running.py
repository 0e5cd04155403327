"""Trains a program for a few steps, and says how two ways to train it differ."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import actcompile

from .programs import Program

Compile = Callable[[torch.nn.Module], Callable[..., Any]]

# dtype -> what rounding may add up to, relative to the largest value.
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}


class Refused(Exception):  # noqa: N818  says what happened, no error of ours
    """The program cannot be trained this way."""


def train(program: Program, compile: Compile) -> dict[str, Tensor]:
    """Outputs, gradients and what was written, by name.

    Raises:
        Refused: Naming the error.
    """
    torch.manual_seed(0)
    module = program.module()
    call, found = compile(module), {}
    try:
        for step, batch in enumerate(program.sizes):
            found.update({f"{step}.{name}": v for name, v in _step(program, module, call, batch).items()})
    except (RuntimeError, IndexError, ValueError, TypeError, AssertionError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    return found


def _step(program: Program, module: torch.nn.Module, call: Callable[..., Any], batch: int) -> dict[str, Tensor]:
    module.zero_grad()
    pending: list[tuple[Tensor, ...]] = []
    found: dict[str, Tensor] = {}
    leaves: list[Tensor] = []
    names = [given.name for given in program.given if not given.name.startswith("self.")]
    for position, action in enumerate(program.schedule):
        if action == "f":
            args, new = program.inputs(batch)
            leaves += new
            pending.append(call(*args))
        elif action == "w":
            name = program.written
            with torch.no_grad():
                target = getattr(module, name.removeprefix("self.")) if "." in name else args[names.index(name)]
                target.mul_(-1)
        else:
            outputs = pending.pop(0)
            found |= {f"{position}.output{k}": v.detach().clone() for k, v in enumerate(outputs)}
            torch.autograd.backward(outputs, [_cotangent(value) for value in outputs])
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    found |= {name: value.detach().clone() for name, value in held.items()}
    found |= {f"argument {name}": value.detach().clone() for name, value in zip(names, args, strict=True)}
    found |= {f"gradient {n}": v.grad.clone() for n, v in module.named_parameters() if v.grad is not None}
    found |= {f"gradient leaf{k}": v.grad.clone() for k, v in enumerate(leaves) if v.grad is not None}
    return found


def _cotangent(value: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(value.numel())
    return torch.randn(value.shape, generator=generator).to(value.dtype)


def compiled(program: Program, backend: str, **options: Any) -> Compile:
    """Compiles by a backend, with a batch of any size where the program has several."""
    torch._dynamo.reset()
    actcompile.reset()
    settings = {"options": options} if options else {}
    return lambda module: torch.compile(module, backend=backend, dynamic=len(program.sizes) > 1 or None, **settings)


def train_act(program: Program, **options: Any) -> dict[str, Tensor]:
    """``train`` by this package."""
    settings = {"lowering": "eager", "min_numel": 1, "recompute": program.recompute, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if program.recompute == "full" and options.get("level") == "L0":
            # Matrix products are only repeated where memory is short; how short it can be is found by asking.
            for memory in (0.3, 0.6, 0.9):
                try:
                    return train(program, compiled(program, "act", **settings, memory=memory))
                except Refused as refused:
                    if "memory must" not in str(refused):
                        raise
        return train(program, compiled(program, "act", **settings))


def differences(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> list[str]:
    """Names of what is not there in both, or differs by more than ``tolerance`` of the largest value.

    A gradient of zeros is as good as none: torch.compile has one for each input that the step writes.
    """
    alone = {name: {**got, **expected}[name] for name in got.keys() ^ expected.keys()}
    wrong = sorted(name for name, value in alone.items() if "gradient" not in name or value.any())
    for name in got.keys() & expected.keys():
        a, b = got[name].double(), expected[name].double()
        if a.shape != b.shape or got[name].dtype != expected[name].dtype:
            wrong.append(f"{name}: {a.shape}, not {b.shape}")
        elif a.numel() and not torch.allclose(a, b, rtol=tolerance, atol=tolerance * _scale(b), equal_nan=True):
            wrong.append(f"{name}: {float((a - b).abs().max())} of {float(b.abs().max())}")
    return wrong


def _scale(value: Tensor) -> float:
    finite = value[value.isfinite()]
    return max(float(finite.abs().max()) if finite.numel() else 0.0, 1e-2)
