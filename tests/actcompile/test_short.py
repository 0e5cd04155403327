"""Values in 8 bits."""

import torch

from actcompile._short import _MIN_NUMEL, Short, shorten


def test_values_that_8_bits_do_not_hold_are_kept_as_they_are() -> None:
    value = torch.tensor([0.5, float("-inf")]).repeat(_MIN_NUMEL)
    assert shorten(value) is value
    zeros = torch.zeros(_MIN_NUMEL)
    kept = shorten(zeros)
    assert isinstance(kept, Short)
    assert torch.equal(kept.read(), zeros)
