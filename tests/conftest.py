"""What every test starts from."""

from collections.abc import Iterator

import pytest
import torch

import actcompile

# The models are tiny: threads would wait for each other longer than they work.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Nothing compiled, nothing recorded, fixed seeds."""
    actcompile.reset()
    actcompile.set_rng_state({"position": 0})
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
