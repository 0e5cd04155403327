"""Activation-compressed training as a ``torch.compile`` backend."""

from .api import explain, max_batch_size, profile, report, reset, transform
from .config import Config
from .errors import CompileError, ConfigError, GradientError
from .plan import Plan
from .rng import get_rng_state, set_rng_state

__all__ = [
    "CompileError",
    "Config",
    "ConfigError",
    "GradientError",
    "Plan",
    "explain",
    "get_rng_state",
    "max_batch_size",
    "profile",
    "report",
    "reset",
    "set_rng_state",
    "transform",
]
