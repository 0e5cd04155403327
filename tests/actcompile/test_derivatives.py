"""Operators with and without a derivative."""

import torch

from actcompile._derivatives import is_opaque


def test_what_is_opaque() -> None:
    x = torch.ones(1, 1, 4, 4, requires_grad=True)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    assert is_opaque(backward(x, x, x, x, x, torch.ones(1, 1, 4), 0.0, False))
    assert is_opaque(torch.ops.prims.erfc.default(x))
    assert not is_opaque(x * 2) and not is_opaque((x.detach(), None))
