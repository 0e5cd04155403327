"""What the step benchmark makes of its rows, and of a process that failed."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from bench.large_models import make_large
from bench.pareto import best_points, largest_steps
from bench.step import last_error
from bench.variants import _from_float8, _to_float8


def test_the_last_exception_of_a_chain_is_the_error() -> None:
    stderr = """Traceback (most recent call last):
  File "a.py", line 1, in <module>
KeyError: 'first'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "b.py", line 2, in <module>
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
Set a variable for more information, an Error: like this one
"""
    assert last_error(stderr) == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    assert last_error("killed") == ""


def test_best_points_are_those_that_no_other_one_beats() -> None:
    points = [(1.0, 1.0), (1.2, 0.5), (1.2, 0.6), (1.1, 1.0), (2.0, 0.5), (3.0, 0.1)]
    assert best_points(points) == [(1.0, 1.0), (1.2, 0.5), (3.0, 0.1)]


def test_a_model_is_drawn_where_its_peak_is_largest() -> None:
    def row(batch: str, variant: str, peak: str, ratio: str) -> dict[str, str]:
        key = {"model": "gpt", "size": "full", "batch": batch, "dtype": "float32", "device": "any"}
        return {**key, "variant": variant, "peak_nbytes": peak, "time_ratio": ratio}

    rows = [
        row("8", "torch.compile", "100", "1.0"),
        row("16", "torch.compile", "200", "1.0"),
        row("8", "act4", "10", "1.5"),
        row("16", "act4", "50", "1.2"),
        row("16", "eager", "", ""),
        row("32", "torch.compile", "", ""),
        row("32", "act4", "90", ""),
    ]
    assert largest_steps(rows) == {"gpt full, batch 16": {"torch.compile": (1.0, 1.0), "act4": (1.2, 0.25)}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_hooks_keep_three_bits_of_the_mantissa(dtype: torch.dtype) -> None:
    x = torch.randn(64, 32).to(dtype)
    x[0] = 0
    packed = _to_float8(x)
    assert [part.dtype for part in packed] == [torch.float8_e4m3fn, dtype]
    found = _from_float8(packed)
    assert found.dtype == dtype and not found[0].any()
    # Half a unit in the last of three bits, and what the scale loses in bfloat16.
    normal = x.abs() > x.abs().amax(dim=1, keepdim=True) * 2**-13
    assert ((found - x).abs() <= x.abs() * (2**-4 + 2**-6))[normal].all()


def test_float8_hooks_leave_integers_alone() -> None:
    ids = torch.arange(5)
    assert _from_float8(_to_float8(ids)) is ids


def test_resnet_is_checkpointed_block_by_block() -> None:
    """Transformers has no switch for it."""
    losses, saved = [], []
    for checkpointed in (False, True):
        workload = make_large(
            "resnet", "tiny", 2, checkpointed=checkpointed, device=torch.device("cpu"), dtype=torch.float32
        )
        nbytes: list[int] = []
        with saved_tensors_hooks(lambda x, nbytes=nbytes: nbytes.append(x.nbytes) or x, lambda x: x):  # type: ignore[misc]
            losses.append(workload.loss(workload.model))
        losses[-1].backward()
        saved.append(sum(nbytes))
    assert torch.equal(losses[0], losses[1])
    assert saved[1] < 0.75 * saved[0]
