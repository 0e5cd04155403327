"""The step that auto interprets draws the random numbers of compiled code, and as many."""

import pytest
import torch
from torch import Tensor, nn


class Dropped(nn.Module):
    """Half of what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(64, 64), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 64] -> [B, 64]."""
        return self.dropout(self.layer(x))


def masks(auto: bool) -> tuple[list[Tensor], Tensor]:
    """Dropout masks of three steps, and the state of the generator behind them."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Dropped(), torch.randn(128, 64)
    call = torch.compile(model, backend="act", options={"auto": auto, "min_numel": 0})
    found = []
    for _ in range(3):
        result = call(x)
        result.sum().backward()
        found.append(result != 0)
    return found, torch.get_rng_state()


@pytest.mark.slow
def test_masks_of_the_probed_step_are_those_of_compiled_code() -> None:
    (plain, state), (probed, same) = masks(auto=False), masks(auto=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, probed, strict=True))
    assert torch.equal(state, same)
