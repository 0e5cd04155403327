"""Names that do not depend on sizes, on wrappers, or on how a model is cut into graphs."""

import pytest
import torch
from torch import Tensor, fx, nn

from actcompile import records
from actcompile.passes._naming import call_sites


class Block(nn.Module):
    """Views with sizes, a function of the model's own, and several results of one call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 8] -> [B, 8]."""
        a, b = self.fc(x).view(x.size(0), 16).chunk(2, dim=1)
        return self.norm(a * torch.sigmoid(b))


SITES = ("fc/linear", "/view", "/chunk", "/sigmoid", "/mul", "norm/add_", "norm/batch_norm")


def sites_of(model: nn.Module, batch: int, dynamic: bool) -> tuple[str, ...]:
    found = []

    def backend(graph: fx.GraphModule, inputs: list[object]) -> fx.GraphModule:
        found.append(call_sites(graph.graph))
        return graph

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=dynamic)(torch.randn(batch, 8))
    return found[-1]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 33])
def test_sites_do_not_depend_on_sizes(batch: int, dynamic: bool) -> None:
    model = Block()
    model.eval() if batch == 1 else model.train()
    expected = tuple(site for site in SITES if batch > 1 or site != "norm/add_")
    assert sites_of(model, batch, dynamic) == expected


def test_inputs_are_called_after_the_module_that_uses_them() -> None:
    """Graphs of one model do not share a key for what passes between them."""
    layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

    def function(x: Tensor) -> Tensor:
        x = layers[0](x).sin()
        torch._dynamo.graph_break()
        x = layers[1](x).sin()
        torch._dynamo.graph_break()
        return layers[2](x)

    options = {"lowering": "eager", "min_numel": 0}
    torch.compile(function, backend="act", options=options)(torch.randn(64, 8)).sum().backward()
    keys = [row.key for record in records.finished() for row in record.rows if row.role == "boundary"]
    assert keys == ["1/placeholder", "2/placeholder"]
