"""Codes of 8 bits train random programs nearly as eager PyTorch does, and never worse than it in what is finite."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from torch import Tensor

from .programs import Program, programs
from .running import Refused, differences, train_act

# What 8 bits may add to a gradient, relative to it: a tensor's own error is at most 1/255 of its range per group.
_MOST_NOISE = 0.1
# Two gradients that eager PyTorch rounds itself, in half precision.
_SCALE = 1e-2


@pytest.mark.properties
@given(programs())
@settings(max_examples=2000, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_noise_of_8_bits(program: Program) -> None:
    check(program)


def check(program: Program) -> float | None:
    """The relative error of the gradient that codes add to level L0's; None where nothing can be compared.

    Raises:
        AssertionError: Where the forward is not exact, a gradient is not finite that was, or the error is too large.
    """
    note(repr(program))
    try:
        exact, got = train_act(program, level="L0"), train_act(program, bits=8, auto=False)
    except Refused:
        return None
    gradients = [name for name in exact if "gradient" in name]
    forward = {name: value for name, value in exact.items() if name not in gradients}
    wrong = differences({name: got[name] for name in forward}, forward, 1e-6)
    assert not wrong, f"the forward must be exact, got {wrong}:\n{program!r}"
    for name in gradients:
        same = torch.equal(got[name].isfinite(), exact[name].isfinite())
        assert same, f"{name} must be finite where it is without codes:\n{program!r}"
    error, norm = _norm([got[n].double() - exact[n].double() for n in gradients]), _norm([exact[n] for n in gradients])
    relative = error / max(norm, _SCALE)
    assert relative <= _MOST_NOISE, f"the gradient's error is {relative:.2g}:\n{program!r}"
    return relative


def _norm(values: list[Tensor]) -> float:
    return math.hypot(*(float(value.double().nan_to_num(0, 0, 0).norm()) for value in values)) if values else 0.0
