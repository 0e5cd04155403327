"""Values in 8 bits, for what is computed once and read much later."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Elements of a value that is kept in 8 bits.
_MIN_NUMEL = 4096


class Short(NamedTuple):
    """A value in 8 bits, an error of about 3 percent in each element."""

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The value in its own dtype."""
        return self.codes.to(self.dtype).mul_(self.scale)


def shorten(value: Any) -> Any:
    """``value`` as ``Short``, or itself where it is small or holds what 8 bits do not."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < _MIN_NUMEL:
        return value
    largest = value.abs().amax()
    if not largest.isfinite():
        # Masks of attention hold -inf.
        return value
    scale = (largest / torch.finfo(torch.float8_e4m3fn).max).clamp_min(torch.finfo(value.dtype).tiny)
    return Short((value / scale).to(torch.float8_e4m3fn), scale, value.dtype)
