"""remake_copies: what the backward makes again from parameters, and what it leaves alone."""

import pytest
import torch
from torch import Tensor

from actcompile.passes._views import storage

from .pairs import Traced, trace


def saved(traced: Traced) -> set[str]:
    return {slot.source.name for slot in traced.pair.slots}


def layer(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x) @ (w * w.square().sum(0, keepdim=True)).to(torch.bfloat16).float()


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch up to 2.12 leaves out casts to fewer bits and back")
def test_a_normalized_copy_is_made_again() -> None:
    x, w = torch.randn(8, 16).requires_grad_() * 1, torch.randn(16, 16, requires_grad=True)
    traced = trace(layer, x, w, recompute="cheap")
    # What was reduced to next to nothing is stored.
    computed = [slot.source for slot in traced.pair.slots if slot.source.op != "placeholder"]
    assert [tuple(source.meta["val"].shape) for source in computed] == [(1, 16)]
    outputs, got = traced.run()
    exact = torch.autograd.grad(layer(x, w).sum(), [x, w])
    torch.testing.assert_close(outputs[0], layer(x, w))
    torch.testing.assert_close(got, list(exact))


def test_nothing_is_made_again_with_a_product_of_matrices() -> None:
    x, w = torch.randn(8, 16).requires_grad_() * 1, torch.randn(16, 16, requires_grad=True)
    traced = trace(lambda x, w: torch.nn.functional.gelu(x) @ (w @ w), x, w, recompute="cheap")
    assert "mm" in {storage(slot.source).name for slot in traced.pair.slots}


def test_what_torch_compile_saves_is_saved_with_recompute_none() -> None:
    x, w = torch.randn(8, 16).requires_grad_() * 1, torch.randn(16, 16, requires_grad=True)
    none, cheap = (saved(trace(layer, x, w, recompute=mode)) for mode in ("none", "cheap"))
    assert "permute_1" in none - cheap
