"""The surrogate of attention's backward against automatic differentiation of attention itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from actcompile import _attention
from actcompile._attention import attention_backward, attention_gradients

aten = torch.ops.aten
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

MASK = torch.zeros(3, 1, 7, 9).masked_fill(torch.arange(9) > 6, -10.0)
BOOL_MASK = (torch.arange(9) < 7).expand(7, 9)


def operands(queries: int = 7, keys: int = 9, heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, queries, 4), (3, 2, queries, 4), (3, heads, keys, 4), (3, heads, keys, 4)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


CASES: list[tuple[dict[str, object], dict[str, int]]] = [
    ({}, {}),
    ({"is_causal": True}, {"keys": 7}),
    ({"scale": 0.7}, {}),
    ({"attn_mask": MASK}, {}),
    ({"attn_mask": BOOL_MASK}, {}),
    ({"enable_gqa": True}, {"heads": 1}),
]


@pytest.mark.parametrize(("settings", "sizes"), CASES)
def test_gradients_are_those_of_attention(settings: dict[str, object], sizes: dict[str, int]) -> None:
    grad, *inputs = operands(**sizes)
    leaves = [value.requires_grad_() for value in inputs]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves, **settings), leaves, grad)  # type: ignore[arg-type]
    found = attention_gradients(
        grad,
        *inputs,
        mask=settings.get("attn_mask"),  # type: ignore[arg-type]
        is_causal=bool(settings.get("is_causal")),
        scale=settings.get("scale"),  # type: ignore[arg-type]
    )
    torch.testing.assert_close(found, expected)


def surrogate(mask: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
    def run(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            out, logsumexp = FLASH(q, k, v, 0.0, False, attn_mask=mask)
        return attention_backward(
            FLASH_BACKWARD, (grad, q, k, v, out, logsumexp, 0.0, False), {"attn_mask": mask, "scale": None}
        )

    return run


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("chunk_nbytes", [1, 2**21])
def test_second_derivatives(mask: Tensor | None, chunk_nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "_CHUNK_NBYTES", chunk_nbytes)
    leaves = [value.requires_grad_() for value in operands()]
    directions = [torch.randn_like(value) for value in leaves[1:]]

    def plain(*values: Tensor) -> tuple[Tensor, ...]:
        return attention_gradients(*values, mask=mask, is_causal=False, scale=None)

    torch.testing.assert_close(surrogate(mask)(*leaves), plain(*leaves))
    found = torch.autograd.grad(surrogate(mask)(*leaves), leaves, directions)
    torch.testing.assert_close(found, torch.autograd.grad(plain(*leaves), leaves, directions))


def test_only_one_gradient_is_asked_for() -> None:
    leaves = [value.requires_grad_() for value in operands()]
    dq, _, _ = surrogate(None)(*leaves)
    expected, _, _ = attention_gradients(*leaves, mask=None, is_causal=False, scale=None)
    weights = torch.randn_like(dq)
    found = torch.autograd.grad((dq * weights).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), leaves))
