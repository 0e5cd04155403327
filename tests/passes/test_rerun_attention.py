"""rerun_attention: attention's backward sees the probabilities of the operands that it is given."""

import torch
from torch import Tensor
from torch.nn import functional as F

from actcompile.passes.insert_codecs import insert_codecs
from actcompile.passes.rerun_attention import rerun_attention
from actcompile.plan import Action, Decision, Plan

from .pairs import Traced, text, trace


def attention(w: Tensor, x: Tensor) -> Tensor:
    """Sharp: scores of about 8."""
    q, k, v = (part.view(2, 16, 2, 16).transpose(1, 2) for part in (x @ w).split(32, dim=-1))
    y = F.scaled_dot_product_attention(q * 3, k * 3, v, is_causal=True)
    return y.transpose(1, 2).reshape(2, 16, 32) @ w[:, :32]


def traced_attention() -> Traced:
    torch.manual_seed(0)
    return trace(attention, (torch.randn(32, 96) / 5).requires_grad_(), torch.randn(2, 16, 32))


def test_backward_runs_the_forward_first() -> None:
    lines = text(traced_attention().pair.backward).splitlines()
    name = "_scaled_dot_product_flash_attention_for_cpu"
    (again,) = (number for number, line in enumerate(lines) if f"= {name}(" in line)
    (backward,) = (number for number, line in enumerate(lines) if f"= {name}_backward(" in line)
    assert again < backward
    again_name = lines[again].split(" = ")[0]
    output, logsumexp = (line.split(" = ")[0] for line in lines if f"getitem({again_name}, " in line)
    assert f", {output}, {logsumexp}, 0.0, True" in lines[backward]


def test_log_sum_exp_crosses_no_longer() -> None:
    traced = traced_attention()
    assert (2, 2, 16) not in [tuple(slot.source.meta["val"].shape) for slot in traced.pair.slots]


def test_running_twice_changes_nothing() -> None:
    """The second rerun reads the same operands: its results are those of the first."""
    traced = traced_attention()
    first = traced.run()
    rerun_attention(traced.pair)
    torch.testing.assert_close(traced.run(), first, rtol=0, atol=0)


def test_graph_without_attention_is_unchanged() -> None:
    traced = trace(lambda w, x: torch.sin(x @ w), torch.randn(8, 8, requires_grad=True), torch.randn(4, 8))
    before = text(traced.pair.forward), text(traced.pair.backward)
    rerun_attention(traced.pair)
    assert (text(traced.pair.forward), text(traced.pair.backward)) == before


def test_exact_operands_give_exact_gradients() -> None:
    traced = traced_attention()
    w, x = (value.detach().clone() for value in traced.inputs[:2])
    w.requires_grad_()
    attention(w, x).sum().backward()
    torch.testing.assert_close(traced.run()[1], [w.grad])


def test_sharp_attention_survives_coarse_operands() -> None:
    """With the exact log-sum-exp, 2-bit operands of this attention give gradients 10^9 times too large."""
    traced = traced_attention()
    (exact,) = traced.run()[1]
    coarse = Decision(Action.QUANTIZE, "test", bits=2, group_size=32)
    operands = {row.key: coarse for row in traced.rows() if row.numel == 1024 and row.role == "activation"}
    assert operands
    insert_codecs(traced.pair, Plan({**traced.keep_all(), **operands}))
    (noisy,) = traced.run()[1]
    assert 0 < (noisy - exact).norm() < 1.5 * exact.norm()
