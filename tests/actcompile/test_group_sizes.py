"""Groups do not cross rows: their size follows the last dimension in memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import actcompile
from actcompile.analysis import analyze
from actcompile.config import Config
from actcompile.decisions import decide, encoded_nbytes, fitting_group_size, nbytes_at, ways_to_store
from actcompile.following import follow
from actcompile.plan import Action, Decision, Plan, SavedTensor

from ..passes.pairs import trace


def row(length: int, numel: int = 2**16) -> SavedTensor:
    shape = (numel // max(length, 1), length)
    sizes = tuple(map(str, shape))
    return SavedTensor("0/mm", "mm", "mm", "", "", shape, sizes, torch.float32, numel, 4 * numel, row_length=length)


@pytest.mark.parametrize(
    ("length", "size", "expected"),
    [
        (768, 256, 256),
        (192, 256, 64),
        (384, 256, 128),
        (384, 64, 64),
        (64, 256, 64),
        (512, 4096, 512),
        # Below 64, and unknown.
        (100, 256, 256),
        (32, 256, 256),
        (48, 32, 32),
        (0, 256, 256),
    ],
)
def test_the_largest_power_of_two_that_divides_a_row(length: int, size: int, expected: int) -> None:
    assert fitting_group_size(length, size) == expected


def test_every_decision_and_byte_count_uses_it() -> None:
    given, config = row(192), Config(group_size=256)
    uniform = decide(given, config, 4)
    codes = [way for way in ways_to_store(given, config) if way.action is Action.QUANTIZE]
    assert {way.group_size for way in (uniform, *codes)} == {64}
    assert encoded_nbytes(given, uniform) == nbytes_at(given, 4, config) == 2**16 // 64 * (32 + 6)
    planned = Decision(Action.QUANTIZE, "", bits=4, group_size=256)
    followed = follow(Plan({given.key: planned}), [given, replace(row(768), key="other")][:1], config)
    assert followed[given.key].group_size == 64


def test_sampled_rows_are_those_of_the_matrix() -> None:
    given = replace(row(0, 2**18), num_rows=2**18 // 192, numel=2**18 // 192 * 192, is_layer_input=True)
    decision = decide(given, Config(rows=0.5), 4)
    assert (decision.action, decision.group_size) == (Action.SAMPLE, 64)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda x: x.view(16, 24, 192), 192),
        (lambda x: x.view(16, 24, 192).transpose(1, 2), 192),
        (lambda x: x.view(16, 24, 16, 12).to(memory_format=torch.channels_last), 24),
        (lambda x: x.view(-1), 0),
        (lambda x: x.view(1, -1, 1), 0),
        (lambda x: x[:192].view(1, 192).expand(384, 192), 0),
        (lambda x: x[:384].view(384, 1).expand(384, 192), 0),
    ],
    ids=["contiguous", "transposed", "channels_last", "1-d", "one row", "expanded rows", "expanded columns"],
)
def test_rows_as_they_lie_in_memory(make, expected: int) -> None:  # type: ignore[no-untyped-def]
    from actcompile.analysis import _last_in_memory

    assert _last_in_memory(make(torch.empty(16 * 24 * 192))) == expected


def test_analysis_finds_it() -> None:
    pair = trace(lambda w, x: F.gelu(x @ w), nn.Parameter(torch.randn(32, 96)), torch.randn(8, 32)).pair
    assert {r.op: r.row_length for r in analyze(pair)}["mm"] == 96


class Block(nn.Module):
    """A vision transformer's MLP: the class token's row has almost no variance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(32, width), nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1)
        return (h + self.down(F.gelu(self.up(self.norm(h))))).square().mean()


@pytest.mark.parametrize("width", [192, 256, 320, 384])
def test_a_row_of_little_variance_keeps_its_own_noise(width: int) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    actcompile.reset()
    model, x = Block(width), torch.randn(16, 16, 32)

    def gradient(run: nn.Module) -> Tensor:
        model.zero_grad()
        run(x).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient(model)
    got = gradient(torch.compile(model, backend="act", options={"bits": 4, "lowering": "eager"}))
    assert (got - exact).norm() < 0.15 * exact.norm()
