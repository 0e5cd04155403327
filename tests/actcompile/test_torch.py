"""What this package makes of torch's private names."""

import copy

import pytest
import torch

import actcompile
from actcompile._gpt import GPT
from actcompile._torch import copied, num_in_memory


def test_a_copied_graph_stays_with_its_owner() -> None:
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    copied(graph)
    assert graph.graph.owning_module is graph


def test_views_lie_in_the_same_memory() -> None:
    value = torch.ones(4, 4)
    same = [value, value]
    assert num_in_memory(same[1]) == 1
    view = value[1:]
    assert num_in_memory(value) == num_in_memory(view) == 2
    del view
    assert num_in_memory(value) == 1


def test_dropout_with_random_numbers_of_eager_compiles() -> None:
    model = GPT(layers=1, width=32, heads=2, ff=64, vocabulary=16, tokens=8, dropout=0.5)
    other = copy.deepcopy(model)
    settings = {"fallback_random": True}
    ids = torch.randint(16, (4, 8))
    losses = []
    for call in (
        torch.compile(model, backend="act", options={"bits": 8, "min_numel": 0, "inductor": settings}),
        torch.compile(other, options=settings),
    ):
        torch.manual_seed(0)
        losses.append(call(ids, ids))
    torch.testing.assert_close(*losses)
    losses[0].backward()
    assert actcompile.report(model).rows


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 4, "auto": True}])
def test_ranges_that_inductor_counts_unsigned_are_interpreted(options: dict[str, object]) -> None:
    size = 300
    weight = torch.ones(size, requires_grad=True)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return ((x * weight) @ torch.eye(size, 2)).square().sum()

    x = torch.randn(3, size)
    torch.compile(loss, backend="act", options={**options, "lowering": "eager"})(x).backward()
    expected = torch.zeros(size)
    expected[:2] = 2 * (x[:, :2] ** 2).sum(0)
    torch.testing.assert_close(weight.grad, expected)
