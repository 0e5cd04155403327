"""The rounding noise's counter."""

import pytest
import torch

import actcompile
from actcompile import ConfigError
from actcompile.rng import next_seed

CPU = torch.device("cpu")


def test_every_forward_has_another_seed() -> None:
    seeds = [int(next_seed(None, CPU)) for _ in range(1000)]
    assert len(set(seeds)) == 1000
    assert min(seeds) < 0 < max(seeds)


def test_seed_is_a_scalar_of_64_bits() -> None:
    seed = next_seed(3, CPU)
    assert (seed.shape, seed.dtype, seed.device) == ((), torch.int64, CPU)


def test_state_repeats_and_counts() -> None:
    assert actcompile.get_rng_state() == {"position": 0}
    next_seed(None, CPU)
    state = actcompile.get_rng_state()
    first = [int(next_seed(None, CPU)) for _ in range(3)]
    actcompile.set_rng_state(state)
    assert [int(next_seed(None, CPU)) for _ in range(3)] == first
    assert actcompile.get_rng_state() == {"position": 4}


def test_seed_setting_and_torch_seed_decide() -> None:
    def first(seed: int | None) -> int:
        actcompile.set_rng_state({"position": 0})
        return int(next_seed(seed, CPU))

    assert first(1) != first(2)
    assert first(2**64 - 1) != first(1)
    torch.manual_seed(5)
    fifth = first(None)
    torch.manual_seed(6)
    assert first(None) != fifth
    torch.manual_seed(5)
    torch.rand(7)
    assert first(None) == fifth


def test_torch_generators_are_left_alone() -> None:
    state = torch.get_rng_state()
    next_seed(None, CPU)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("state", [{}, {"position": -1}, {"position": "1"}, {"position": True}, 3, None])
def test_foreign_states_are_refused(state: object) -> None:
    with pytest.raises(ConfigError, match="must come from") as found:
        actcompile.set_rng_state(state)  # type: ignore[arg-type]
    assert repr(state) in str(found.value)
