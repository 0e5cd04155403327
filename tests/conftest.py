"""What every test starts from."""

from collections.abc import Iterator

import pytest
import torch

import actcompile

# The models are tiny: threads would wait for each other longer than they work.
torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long runs where it is asked for by name: ``pytest -m properties``, ``pytest -m families``."""
    left_out = [item for item in items if _is_left_out(item, config.option.markexpr)]
    items[:] = [item for item in items if item not in set(left_out)]
    config.hook.pytest_deselected(items=left_out)


def _is_left_out(item: pytest.Item, expression: str) -> bool:
    return any(item.get_closest_marker(name) and name not in expression for name in ("properties", "families"))


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Nothing compiled, nothing recorded, fixed seeds."""
    torch._dynamo.utils.counters.clear()
    actcompile.reset()
    actcompile.set_rng_state({"position": 0})
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
