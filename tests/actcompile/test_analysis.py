"""Rows: who holds a tensor, what keeps it exact, how far an error in it travels."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actcompile.analysis import RETURNED
from actcompile.plan import Role, SavedTensor

from ..models import gpt
from ..passes.pairs import trace


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def rows_of(function: Callable[..., object], *inputs: Tensor, recompute: str = "none") -> dict[str, SavedTensor]:
    return {row.name: row for row in _traced_rows(function, *inputs, recompute=recompute)}


def _traced_rows(function: Callable[..., object], *inputs: Tensor, recompute: str) -> list[SavedTensor]:
    from actcompile.analysis import analyze

    return analyze(trace(function, *inputs, recompute=recompute).pair)


def test_sizes_and_names() -> None:
    row = rows_of(lambda w, x: F.gelu(x @ w), weight(8, 6), torch.randn(4, 8))["mm"]
    assert (row.key, row.op, row.shape, row.dtype, row.numel, row.nbytes) == (
        "/mm",
        "mm",
        (4, 6),
        torch.float32,
        24,
        96,
    )
    assert (row.role, row.kind, row.obstacle) == (Role.ACTIVATION, "leaf", "")


def test_keys_are_numbered_where_they_repeat() -> None:
    def function(w: Tensor, x: Tensor) -> Tensor:
        return F.gelu(F.gelu(x @ w) @ w)

    rows = _traced_rows(function, weight(8, 8), torch.randn(4, 8), recompute="cheap")
    assert [row.key for row in rows if row.op == "mm"] == ["/mm", "/mm#2"]


def test_parameters_and_inputs_are_there_anyway() -> None:
    rows = rows_of(lambda w, v, x: torch.sin(x @ w) @ v, weight(8, 8), weight(8, 8), torch.randn(4, 8))
    assert rows["primals_2"].role is Role.PARAMETER
    assert rows["primals_2"].obstacle == "the parameter is there anyway"
    views_of_the_input = [row for row in rows.values() if row.role is Role.INPUT]
    assert [row.obstacle for row in views_of_the_input] == ["the input is there anyway"]


def test_slices_of_an_input_are_views() -> None:
    rows = rows_of(lambda w, x: (x[:, :4] * w).sum(), weight(4, 4), torch.randn(4, 8))
    assert [(row.op, row.role) for row in rows.values()] == [("slice", Role.INPUT)]


PARTS = [
    lambda x: x.unbind(1)[2],
    lambda x: x.split(4, 1)[1],
    lambda x: x.split([2, 4, 2], 1)[1],
    lambda x: x.chunk(2, 1)[1],
    lambda x: x.tensor_split(2, 1)[1],
    lambda x: x.split(4, 1)[1].unsqueeze(0)[:, :, :2],
]


@pytest.mark.parametrize("take", PARTS)
def test_parts_of_an_input_are_views(take: Callable[[Tensor], Tensor]) -> None:
    rows = rows_of(lambda w, x: (take(x) * w).sum(), weight(1), torch.randn(4, 8))
    assert [(row.role, row.movable) for row in rows.values()] == [(Role.INPUT, False)]


def test_parts_of_activations_and_outputs() -> None:
    """The caller of what holds one part holds the others."""

    def function(w: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = (x @ w).split(4, 1)
        return right @ v, left

    rows = rows_of(function, weight(8, 8), weight(4, 3), torch.randn(4, 8))
    (row,) = (row for row in rows.values() if row.role is Role.ACTIVATION)
    assert (row.obstacle.startswith("the caller holds it"), row.movable) == (True, False)


def test_outputs_are_held_by_the_caller() -> None:
    row = rows_of(lambda w, x: torch.exp(x @ w), weight(8, 8), torch.randn(4, 8))["exp"]
    assert row.obstacle == RETURNED


def test_views_of_outputs_are_held_too() -> None:
    def function(w: Tensor, x: Tensor) -> Tensor:
        return torch.exp(x @ w).view(8, 4)

    assert rows_of(function, weight(8, 8), torch.randn(4, 8))["exp"].obstacle.startswith("the caller holds it")


def test_activations_of_other_graphs() -> None:
    boundary = torch.randn(4, 8, requires_grad=True) * 1.0
    row = rows_of(lambda x, w: F.gelu(x) @ w, boundary, torch.randn(8, 8))["primals_1"]
    assert (row.role, row.obstacle) == (Role.BOUNDARY, "")


def test_leaf_and_path() -> None:
    """An error in the input of the first layer stays in its gradient; one behind it travels through the second."""

    def function(v: Tensor, w: Tensor, x: Tensor) -> Tensor:
        y = F.silu(F.gelu(x) @ v)
        return F.gelu(y @ w)

    rows = rows_of(function, weight(8, 8), weight(8, 8), torch.randn(4, 8))
    kinds = {name: row.kind for name, row in rows.items() if row.role is Role.ACTIVATION}
    assert kinds == {"permute": "leaf", "mm": "leaf", "permute_2": "leaf", "mm_1": "path"}


@pytest.mark.parametrize("recompute", ["none", "cheap"])
def test_statistics_stay_exact(recompute: str) -> None:
    rows = rows_of(
        lambda w, x: F.layer_norm(x @ w, (64,)).sin() @ w, weight(64, 64), torch.randn(4, 64), recompute=recompute
    )
    statistics = [row for row in rows.values() if row.obstacle.startswith("it is a statistic")]
    assert {row.op for row in statistics} >= {"var_mean", "rsqrt"}
    assert rows["mm"].obstacle == ""


def test_of_attention_only_the_output_is_saved() -> None:
    def function(w: Tensor, x: Tensor) -> Tensor:
        q = (x @ w).view(2, 16, 4, 16).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).reshape(2, 16, 64) @ w

    rows = [row for row in rows_of(function, weight(64, 64), torch.randn(2, 16, 64)).values() if "attention" in row.op]
    assert {row.shape: row.obstacle for row in rows} == {(2, 4, 16, 16): ""}


@pytest.mark.parametrize(
    ("function", "op", "has_pole"),
    [
        (lambda w, x: (x @ w).log(), "reciprocal", True),
        (lambda w, x: ((x @ w).abs() + 0.1).log(), "div", False),
        (lambda w, x: x / (x @ w), "div", False),
        (lambda w, x: (x @ w).sqrt().sin(), "div", True),
        (lambda w, x: (1 / (x @ w)).exp(), "mul", False),
    ],
)
def test_divisors_stay_exact(function: Callable[..., Tensor], op: str, has_pole: bool) -> None:
    """What the gradient is multiplied by is saved in their place: an error in it stays as it is; with a pole, exact."""
    rows = rows_of(function, torch.rand(64, 64).requires_grad_(), torch.rand(64, 64))
    (row,) = (row for row in rows.values() if row.role is Role.ACTIVATION)
    assert (row.op, row.shape) == (op, (64, 64))
    assert row.obstacle == f"rounding it would do harm: {op} has a pole: all beside it is small" * has_pole


@pytest.mark.parametrize("huge", [float("-inf"), torch.finfo(torch.float32).min])
def test_masked_scores_stay_exact(huge: float) -> None:
    def function(w: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        return torch.logsumexp((x @ w).masked_fill(mask, huge), -1)

    rows = rows_of(function, weight(8, 8), torch.zeros(4, 8, dtype=torch.bool), torch.randn(4, 8))
    held = [row for row in rows.values() if row.op in ("where", "masked_fill")]
    assert all(row.obstacle == "it holds the huge constants of a mask" for row in held)
    assert not [row for row in rows.values() if row.op == "sub" and not row.obstacle]


def test_copies_of_parameters_stay_exact() -> None:
    """Autocast's copies of weights."""

    def function(w: Tensor, x: Tensor) -> Tensor:
        return (x.bfloat16() @ w.bfloat16()).sin() @ w.bfloat16().exp()

    rows = rows_of(function, weight(8, 8), torch.randn(4, 8))
    from_parameters = [row for row in rows.values() if row.obstacle == "it is computed from parameters alone"]
    assert from_parameters
    assert all(row.shape == (8, 8) for row in from_parameters)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_dtypes_without_a_codec(dtype: torch.dtype) -> None:
    w = torch.randn(8, 8, dtype=dtype, requires_grad=True)
    rows = rows_of(lambda w, x: torch.sin(x @ w).abs(), w, torch.randn(4, 8, dtype=dtype))
    obstacles = {row.obstacle for row in rows.values() if row.dtype == dtype and row.role is Role.ACTIVATION}
    assert obstacles == {f"no codec takes {str(dtype).removeprefix('torch.')}"}


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda w, x: F.max_pool2d(torch.conv2d(x, w), 17, 1), (2, 3, 20, 20), 18 * 18),
        (lambda w, x: torch.conv2d(x, w).flatten(1).topk(4, dim=1).values, (2, 3, 8, 8), 3 * 36),
    ],
)
def test_index_ranges_cover_the_indices(function: Callable[..., Tensor], shape: tuple[int, ...], expected: int) -> None:
    w = weight(3, 3, 3, 3)
    (row,) = (row for row in rows_of(function, w, torch.randn(shape)).values() if row.dtype == torch.int64)
    assert row.index_range is not None
    assert row.index_range >= expected


def test_indices_of_the_user_have_no_known_range() -> None:
    rows = rows_of(lambda w, ids: F.embedding(ids * 2, w).sin(), weight(32, 8), torch.randint(16, (64,)))
    (row,) = (row for row in rows.values() if row.dtype == torch.int64)
    assert row.index_range is None


def test_rows_of_a_model_name_modules_and_lines() -> None:
    import actcompile

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(64, 64), nn.GELU())

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.inner(x)) @ self.inner[0].weight

    (first, *_), (second, *_) = (
        [row for row in actcompile.explain(model, torch.randn(64, 64)).rows if row.op == "addmm"]
        for model in (Model(), Model().inner)
    )
    assert (first.module, second.module) == ("inner.0", "0")
    assert first.source.startswith("test_analysis.py:")
    assert second.source == ""


def test_nodes_of_autograd_belong_to_the_module_of_their_operator() -> None:
    import actcompile

    task = gpt()
    tokens = task.inputs[0][:, :-1]
    rows = actcompile.explain(task.model, tokens, tokens).rows
    # Layer norm's backward divides; attention's transposes.
    assert {row.module for row in rows if row.op == "div"} <= {
        "blocks.0.norm2",
        "blocks.1.norm1",
        "blocks.1.norm2",
        "norm",
    }
    assert {row.module for row in rows if row.op == "permute"} == {"blocks.0", "blocks.1"}
