"""What every test starts from."""

from collections.abc import Iterator

import pytest
import torch

import actcompile

# The models are tiny: threads would wait for each other longer than they work.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """2,000 random programs run where they are asked for by name: ``pytest -m properties``."""
    if "properties" not in config.option.markexpr:
        skip = pytest.mark.skip(reason="takes long: run it by pytest -m properties")
        for item in items:
            if item.get_closest_marker("properties"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Nothing compiled, nothing recorded, fixed seeds."""
    actcompile.reset()
    actcompile.set_rng_state({"position": 0})
    torch.manual_seed(0)
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
