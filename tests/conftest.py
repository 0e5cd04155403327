"""What every test starts from."""

from collections.abc import Iterator

import pytest
import torch

import actcompile

# The models are tiny: threads would wait for each other longer than they work.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked "families" unless an expression after -m names it."""
    if "families" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("families")]
    items[:] = [item for item in items if not item.get_closest_marker("families")]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Nothing compiled, nothing recorded, fixed seeds."""
    actcompile.reset()
    actcompile.set_rng_state({"position": 0})
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
