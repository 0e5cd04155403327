"""Stored bytes become peak memory: what one more block costs in a compiled training step, by the meter."""

from dataclasses import dataclass

import pytest
import torch

from actcompile._gpt import GPT
from actcompile.meter import measure_phases

BATCH, TOKENS, WIDTH, VOCABULARY = 32, 256, 256, 1000


@dataclass(frozen=True)
class Marginal:
    """Bytes that one more block adds to a step, the gradients of its parameters left out."""

    peak_nbytes: float
    stored_nbytes: float


def step(layers: int, backend: str, options: dict[str, object]) -> tuple[int, int, int]:
    """Peak and stored bytes of one step, and bytes of the blocks' parameters."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(layers=layers, width=WIDTH, heads=4, vocabulary=VOCABULARY, tokens=TOKENS)
    compiled = torch.compile(model, backend=backend, options=options or None)
    ids = torch.randint(VOCABULARY, (2, BATCH, TOKENS))
    compiled(*ids).backward()
    model.zero_grad(set_to_none=True)
    losses: list[torch.Tensor] = []
    forward, backward = measure_phases([lambda: losses.append(compiled(*ids)), lambda: losses.pop().backward()])
    peak = max(forward.peak_nbytes, backward.peak_nbytes)
    return peak, forward.end_nbytes, sum(parameter.nbytes for parameter in model.blocks.parameters())


def marginal(backend: str, **options: object) -> Marginal:
    """From the difference between four blocks and two."""
    four, two = (step(layers, backend, options) for layers in (4, 2))
    peak, stored, gradients = (deep - shallow for deep, shallow in zip(four, two, strict=True))
    return Marginal((peak - gradients) / 2, stored / 2)


@pytest.fixture(scope="module")
def baseline() -> Marginal:
    """Of torch.compile alone."""
    return marginal("inductor")


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "share"), [("none", 0.14), ("cheap", 0.09)])
def test_one_more_block_costs_what_it_stores(baseline: Marginal, recompute: str, share: float) -> None:
    found = marginal("act", bits=4, recompute=recompute)
    assert 0 < found.peak_nbytes <= 1.1 * found.stored_nbytes
    assert found.peak_nbytes <= share * baseline.peak_nbytes
