"""The rounding noise's random state: a counter of training forwards, mixed with the seed and the rank."""

from typing import Any

import torch
import torch.distributed

from .errors import ConfigError

_position = 0


def next_seed(seed: int | None, device: torch.device) -> torch.Tensor:
    """The 0-d int64 seed of one training forward; advances the counter by one, draws from no generator of torch."""
    from .triton_kernels._hash import mix_seed

    global _position
    rank = (
        torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    )
    value = mix_seed(torch.initial_seed() if seed is None else seed, rank, _position)
    _position += 1
    return torch.full((), value, dtype=torch.int64, device=device)


def get_rng_state() -> dict[str, int]:
    """The state of the rounding noise, for ``set_rng_state``."""
    return {"position": _position}


def set_rng_state(state: dict[str, Any]) -> None:
    """Continues the rounding noise from a state of ``get_rng_state``.

    Raises:
        ConfigError: When ``state`` is something else.
    """
    global _position
    position = state.get("position") if isinstance(state, dict) else None
    if not isinstance(position, int) or isinstance(position, bool) or position < 0:
        raise ConfigError(f"state must come from actcompile.get_rng_state, got {state!r}")
    _position = position
