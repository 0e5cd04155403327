"""What settings can be chosen from."""

from collections.abc import Mapping
from typing import Any

from .plan import Pruning

# Bits that a code can have; EXACT_BITS keeps every tensor's own bits, so that only the lossless passes run.
CODE_BITS = (1, 2, 3, 4, 6, 8)
EXACT_BITS = 32
DEFAULT_BITS = 4
DEFAULT_MIN_NUMEL = 4096

# Elements of which ``sparsity`` drops a share, and what ``auto`` chooses from: 1.2 to 2.8 bits per element in float32.
SPARSE_BLOCK = 256
AUTO_PRUNINGS = (
    Pruning(2, 16, 4),
    Pruning(2, 16, 8),
    Pruning(51, SPARSE_BLOCK, 4),
    Pruning(51, SPARSE_BLOCK, 8),
)

# GACT's optimization levels (conf.py of its release), as settings of this package.
LEVELS: Mapping[str, Mapping[str, Any]] = {
    "L0": {"bits": EXACT_BITS},
    "L1": {"bits": 4},
    "L1.1": {"bits": 8},
    "L1.2": {"bits": 2},
    "L2": {"bits": 4, "auto": True},
    "L2.1": {"bits": 3, "auto": True},
    "L2.2": {"bits": 2, "auto": True},
    "L3": {"bits": 4, "auto": True, "offload": True},
    "swap": {"bits": EXACT_BITS, "offload": True},
    "L4bit-swap": {"bits": 4, "offload": True},
}

RECOMPUTE = ("none", "cheap", "full")
LOWERINGS = ("inductor", "eager")
PRUNING_RULES = ("blocks", "samples")
