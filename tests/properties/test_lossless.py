"""Level L0 trains random programs as eager PyTorch does."""

import pytest
from hypothesis import HealthCheck, event, given, note, settings

from .programs import Program, programs
from .running import ROUNDING, Refused, compiled, differences, train, train_act

_SETTINGS = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


@given(programs())
@settings(max_examples=60, **_SETTINGS)
def test_some_programs(program: Program) -> None:
    check(program)


@pytest.mark.properties
@given(programs())
@settings(max_examples=2000, **_SETTINGS)
def test_many_programs(program: Program) -> None:
    check(program)


def check(program: Program) -> str:
    """Raises AssertionError unless L0 gives what eager PyTorch gives, or else exactly what torch.compile gives.

    Rounding may flip a comparison between eager PyTorch and torch.compile, which computes in other steps; and some
    programs train under one of them alone.
    """
    note(repr(program))
    try:
        expected = train(program, lambda module: module)
    except Refused:
        return _as("eager refuses")
    try:
        got = train_act(program, level="L0")
    except Refused as refused:
        return _check_refused(program, refused)
    wrong = differences(got, expected, ROUNDING[program.dtype])
    if not wrong:
        return _as("equal")
    try:
        unlike = differences(got, train(program, compiled(program, "aot_eager_decomp_partition")), 1e-6)
    except Refused as refused:
        unlike = [str(refused)]
    assert not unlike, f"neither eager's {wrong} nor torch.compile's {unlike}:\n{program!r}"
    note(f"torch.compile differs from eager, too: {wrong}")
    return _as("torch.compile differs from eager")


def _check_refused(program: Program, refused: Refused) -> str:
    for backend in ("aot_eager", "aot_eager_decomp_partition"):
        try:
            train(program, compiled(program, backend))
        except Refused:
            return _as("torch.compile refuses")
    raise AssertionError(f"torch.compile does not refuse, but this does:\n{program!r}") from refused


def _as(kind: str) -> str:
    event(kind)
    return kind
