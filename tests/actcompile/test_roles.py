"""What is stored of weights, data and what crosses between graphs: measured, and as reported."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

import actcompile
from actcompile.reporting import Report

from ..stored import plain, stored_nbytes

EAGER = {"lowering": "eager"}


@dataclass
class Case:
    """A function that returns one tensor; ``leaves`` get gradients, and what is ``held`` is there anyway."""

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...] = ()
    leaves: Sequence[Tensor] = ()
    held: Sequence[Tensor] = field(default_factory=list)

    def gradients(self, call: Callable[..., Tensor]) -> list[Tensor]:
        """Gradients of the leaves of a step through ``call``."""
        for leaf in self.leaves:
            leaf.grad = None
        call(*self.inputs).float().square().mean().backward()
        return [leaf.grad for leaf in self.leaves if leaf.grad is not None]

    def stored(self, call: Callable[..., Tensor]) -> int:
        """Bytes that autograd holds after a forward through ``call``."""
        return stored_nbytes(call(*self.inputs), [*self.leaves, *self.held, *self.inputs])


def of_module(module: nn.Module, *inputs: Tensor) -> Case:
    return Case(module, inputs, list(module.parameters()), list(module.buffers()))


def check(case: Case, ratio: float) -> Report:
    """The gradients are right, and both sides of the ratio, which is at least ``ratio``, are what autograd holds."""
    exact = case.gradients(case.function)
    step = torch.compile(case.function, backend="act", options={**EAGER, "bits": 8})
    got = case.gradients(step)
    assert 0 < distance(got, exact) < 0.02
    torch._dynamo.reset()
    actcompile.reset()
    step = torch.compile(case.function, backend="act", options=EAGER)
    case.gradients(step)
    report = actcompile.report()
    assert report.saved_nbytes == case.stored(step)
    torch._dynamo.reset()
    step = torch.compile(case.function, backend=plain)
    assert report.baseline_nbytes == case.stored(step)
    assert report.ratio >= ratio
    return report


def distance(got: list[Tensor], exact: list[Tensor]) -> float:
    flat = [torch.cat([value.flatten() for value in values]) for values in (got, exact)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def layers(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8))


class Holder(nn.Module):
    """Computes from what it holds: an image, features of nodes, latents."""

    def __init__(self, data: Tensor, net: nn.Module, is_parameter: bool) -> None:
        super().__init__()
        self.net = net
        if is_parameter:
            self.data = nn.Parameter(data)
        else:
            self.register_buffer("data", data)

    def forward(self) -> Tensor:
        return self.net(self.data)


class Graph(nn.Module):
    """Two layers of a graph network with learned features of nodes; edges are an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Parameter(torch.randn(512, 64))
        self.layers = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x = self.features
        for layer in self.layers:
            messages = layer(F.gelu(x))[source]
            x = torch.zeros_like(x).index_add(0, target, messages)
        return x


class Queries(nn.Module):
    """Cross-attention of latents with data: queries are computed from a parameter alone."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(64, 64))
        self.mix, self.q, self.kv = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(len(x), -1, -1)
        q = self.q(F.gelu(self.mix(latents)))
        k, v = self.kv(x).chunk(2, -1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])


def image_prior() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 3), nn.GELU(), nn.Conv2d(16, 3, 1))
    return Holder(torch.randn(1, 8, 32, 32), net, is_parameter=True)


def leaf_input() -> Case:
    model, x = layers(), torch.randn(256, 64, requires_grad=True)
    return Case(model, (x,), [*model.parameters(), x])


def view_of_a_leaf() -> Case:
    """Coordinates or images that one optimizer holds as one tensor."""
    model, flat = layers(), torch.randn(256 * 64, requires_grad=True)
    return Case(lambda: model(flat.view(256, 64)), (), [*model.parameters(), flat])


DATA: dict[str, tuple[Callable[[], Case], float]] = {
    "leaf": (leaf_input, 7),
    "view of a leaf": (view_of_a_leaf, 7),
    "buffer": (lambda: of_module(Holder(torch.randn(256, 64), layers(), is_parameter=False)), 7),
    "parameter": (lambda: of_module(Holder(torch.randn(256, 64), layers(), is_parameter=True)), 7),
    "image prior": (lambda: of_module(image_prior()), 7),
    "graph": (lambda: of_module(Graph(), *torch.randint(512, (2, 2048))), 4),
    "queries": (lambda: of_module(Queries(), torch.randn(8, 96, 64)), 7),
}


@pytest.mark.parametrize("name", DATA)
def test_what_is_computed_from_data_is_compressed(name: str) -> None:
    make, ratio = DATA[name]
    report = check(make(), ratio)
    assert not [row for row in report.rows if row.reason == "it is computed from parameters alone"]


def test_data_in_a_buffer_under_autocast() -> None:
    """The copy in bfloat16 is what the first layer reads: it is data, and a buffer may change before the backward."""
    module = Holder(torch.randn(256, 64), layers(), is_parameter=False)
    case = of_module(module)
    case.function = torch.autocast("cpu", torch.bfloat16)(module.forward)
    report = check(case, 3.5)
    (copy,) = (row for row in report.rows if row.shape == (256, 64))
    assert copy.action == "quantize"


@pytest.mark.parametrize("attribute", ["module", "argument", "fast weights"])
def test_weights_that_are_views_or_computed(attribute: str) -> None:
    """FSDP's and functional_call's: they are there anyway, so they are neither rounded nor counted."""
    model, x = layers(), torch.randn(256, 64)
    flat = torch.cat([value.detach().flatten() for value in model.parameters()]).requires_grad_()

    def weights() -> dict[str, Tensor]:
        parts = flat.split([value.numel() for value in model.parameters()])
        named = zip(model.named_parameters(), parts, strict=True)
        made = {name: part.view(value.shape) for (name, value), part in named}
        return {name: value + 0.01 for name, value in made.items()} if attribute == "fast weights" else made

    def gradients(call: Callable[..., Tensor]) -> list[Tensor]:
        flat.grad = None
        call(weights(), x).square().mean().backward()
        assert flat.grad is not None
        return [flat.grad]

    def of_module(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(inner, weights, (x,))

    def of_arguments(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x,))

    exact = gradients(of_arguments)
    if attribute == "module":
        inner = actcompile.transform(model, bits=8, lowering="eager")
        step: Callable[..., Tensor] = of_module
    else:
        step = torch.compile(of_arguments, backend="act", options={**EAGER, "bits": 8})
    assert 0 < distance(gradients(step), exact) < 0.02
    given = weights()
    held = [flat, *given.values(), x]
    report = actcompile.report()
    assert report.saved_nbytes == stored_nbytes(step(given, x), held)
    shapes = {shape for value in given.values() for shape in (tuple(value.shape), tuple(value.shape[::-1]))}
    assert not [row for row in report.rows if row.counts and row.shape in shapes]
    assert report.ratio > 3.7


class LowRank(nn.Module):
    """Adds a product of two small matrices to a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8, 128)), nn.Parameter(torch.randn(128, 8))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def reparametrized(kind: str) -> nn.Module:
    model = layers()
    if kind == "low rank":
        parametrize.register_parametrization(model[2], "weight", LowRank())
    elif kind == "weight norm":
        parametrizations.weight_norm(model[2])
    else:
        parametrizations.spectral_norm(model[2])
    return model


@pytest.mark.parametrize(("kind", "num_stored"), [("low rank", 1), ("weight norm", 0), ("spectral norm", 0)])
def test_reparametrized_weights_are_exact(kind: str, num_stored: int) -> None:
    """They are made again in the backward, where that takes no product of matrices."""
    model = reparametrized(kind).eval()
    exact = of_module(model, torch.randn(256, 64))
    report = check(exact, 2)
    shaped = [row for row in report.rows if row.shape == (128, 128) and row.counts]
    assert [row.reason for row in shaped] == ["it is computed from parameters alone"] * num_stored


class Generated(nn.Module):
    """A layer whose weight another network makes of a latent."""

    def __init__(self) -> None:
        super().__init__()
        self.latent, self.make = nn.Parameter(torch.randn(8, 64)), nn.Linear(64, 8 * 64)
        self.first = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x).sin(), self.make(self.latent).view(64, 64))


def test_a_weight_that_a_network_makes_is_exact() -> None:
    report = check(of_module(Generated(), torch.randn(512, 64)), 2)
    assert "it is computed from parameters alone" in {
        row.reason for row in report.rows if math.prod(row.shape) == 64 * 64
    }


@pytest.mark.parametrize("is_frozen", [False, True])
def test_copies_of_weights_under_autocast_are_made_again(is_frozen: bool) -> None:
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(128, 128), nn.GELU())])
    if is_frozen:
        model[2:].requires_grad_(False)
    case = of_module(model, torch.randn(512, 128))
    case.function = torch.autocast("cpu", torch.bfloat16)(model.forward)
    report = check(case, 3.5)
    assert not [row for row in report.rows if row.counts and row.shape == (128, 128)]
