"""Networks of linear layers, recurrences and attention, written in plain torch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.families.family import Build, Family, Objective

_ROWS, _WIDTH, _CLASSES = 768, 256, 10


def classified(make: Callable[[], nn.Module], *shape: int, classes: int = _CLASSES) -> Build:
    """A builder of a classifier of random inputs of ``shape``."""

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        x, labels = torch.randn(shape), torch.randint(classes, shape[:1])
        return Objective(make(), F.cross_entropy).train(), (x, labels)

    return build


def regressed(make: Callable[[], nn.Module], x: Callable[[], Tensor], targets: int) -> Build:
    """A builder of a network whose output [..., targets] is to meet smooth functions of its inputs."""

    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        values = x()
        target = torch.sin(values.mean(-1, keepdim=True) * torch.arange(1.0, targets + 1))
        return Objective(make(), F.mse_loss).train(), (values, target)

    return build


def mlp(activation: Callable[[], nn.Module]) -> nn.Module:
    """Three hidden layers."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(_WIDTH, _WIDTH), activation()]
    return nn.Sequential(*layers, nn.Linear(_WIDTH, _CLASSES))


class SwiGLU(nn.Module):
    """A block as in Llama whose gate has a given deviation."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(_WIDTH)
        self.gate, self.up = nn.Linear(_WIDTH, 3 * _WIDTH, bias=False), nn.Linear(_WIDTH, 3 * _WIDTH, bias=False)
        self.down = nn.Linear(3 * _WIDTH, _WIDTH, bias=False)
        # Of a gate on normalized inputs.
        nn.init.normal_(self.gate.weight, std=spread / math.sqrt(_WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[R, W] -> [R, W]."""
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def swiglu(spread: float) -> Build:
    """Two blocks and a head."""
    return classified(lambda: nn.Sequential(SwiGLU(spread), SwiGLU(spread), nn.Linear(_WIDTH, _CLASSES)), 512, _WIDTH)


class Attention(nn.Module):
    """Softmax attention written out, with a causal mask of -inf and one row that sees nothing but itself."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(128), nn.Linear(128, 384), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 128] -> the same."""
        batch, tokens, width = x.shape
        split = (batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = self.qkv(self.norm(x)).view(split).permute(2, 0, 3, 1, 4)
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class Mean(nn.Module):
    """Mean over the second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, W] -> [B, W]."""
        return x.mean(1)


class Siren(nn.Module):
    """sin(30 (Wx + b)) between linear layers, initialized as in the paper (Sitzmann et al., 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, _WIDTH), nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH)])
        self.head = nn.Linear(_WIDTH, 3)
        nn.init.uniform_(self.layers[0].weight, -1 / 2, 1 / 2)
        for layer in self.layers[1:]:
            nn.init.uniform_(layer.weight, -math.sqrt(6 / _WIDTH) / 30, math.sqrt(6 / _WIDTH) / 30)

    def forward(self, x: Tensor) -> Tensor:
        """[R, 2] -> [R, 3]."""
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.head(x)


class Nerf(nn.Module):
    """Positions encoded by sines and cosines, learned ones among them, and a skip connection."""

    def __init__(self, octaves: int = 8) -> None:
        super().__init__()
        self.register_buffer("scales", 2.0 ** torch.arange(octaves) * math.pi)
        self.warp = nn.Linear(3, 3)
        self.first = nn.Sequential(nn.Linear(6 * octaves, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(_WIDTH + 6 * octaves, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        """[R, 3] -> color and density [R, 4]."""
        angles = (self.warp(x)[..., None] * self.scales).flatten(1)
        encoded = torch.cat([angles.sin(), angles.cos()], -1)
        out = self.second(torch.cat([self.first(encoded), encoded], -1))
        return torch.cat([out[:, :3].sigmoid(), F.softplus(out[:, 3:])], -1)


class NeuralOde(nn.Module):
    """Four Runge-Kutta steps of a vector field."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.Tanh(), nn.Linear(_WIDTH, _WIDTH))
        self.head = nn.Linear(_WIDTH, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[R, W] -> logits."""
        step = 0.25
        for _ in range(4):
            a = self.field(x)
            b = self.field(x + step / 2 * a)
            c = self.field(x + step / 2 * b)
            d = self.field(x + step * c)
            x = x + step / 6 * (a + 2 * b + 2 * c + d)
        return self.head(x)


class Experts(nn.Module):
    """Tokens weighted over all experts by the softmax of their two best scores."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(_WIDTH, experts)
        self.up, self.down = (nn.Parameter(torch.randn(experts, _WIDTH, _WIDTH) / _WIDTH**0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[R, W] -> [R, W]."""
        scores = self.router(x)
        best, chosen = scores.topk(2, -1)
        weights = torch.zeros_like(scores).scatter(-1, chosen, best.softmax(-1))
        hidden = F.gelu(torch.einsum("rw,ewh->erh", x, self.up))
        return x + torch.einsum("erh,ehw,re->rw", hidden, self.down, weights)


class Gru(nn.Module):
    """A gated recurrent unit, unrolled."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.state = nn.Linear(64, 3 * 128), nn.Linear(128, 3 * 128)
        self.head = nn.Linear(128, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 64] -> logits [B, C]."""
        h = x.new_zeros(x.shape[0], 128)
        for step in self.inputs(x).unbind(1):
            reset, update, new = step.chunk(3, -1)
            old_reset, old_update, old_new = self.state(h).chunk(3, -1)
            update = torch.sigmoid(update + old_update)
            candidate = torch.tanh(new + torch.sigmoid(reset + old_reset) * old_new)
            h = update * h + (1 - update) * candidate
        return self.head(h)


class KolmogorovArnold(nn.Module):
    """A layer whose edges are sums of radial functions (FastKAN), beside a linear one on SiLU."""

    def __init__(self, width: int, out: int, knots: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.register_buffer("knots", torch.linspace(-2, 2, knots))
        self.spline, self.base = nn.Linear(width * knots, out, bias=False), nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        """[R, W] -> [R, out]."""
        basis = torch.exp(-(((self.norm(x)[..., None] - self.knots) * 1.25) ** 2))
        return self.spline(basis.flatten(1)) + self.base(F.silu(x))


def _network(
    name: str, make: Callable[[], nn.Module], *shape: int, narrow: bool = False, quick: bool = False
) -> Family:
    return Family(name=name, build=classified(make, *(shape or (_ROWS, _WIDTH))), narrow=narrow, quick=quick)


FAMILIES = (
    *(
        _network(f"mlp, {activation.__name__}", lambda activation=activation: mlp(activation), quick=quick)
        for activation, quick in (
            (nn.ReLU, True),
            (nn.SiLU, False),
            (nn.GELU, False),
            (nn.Mish, False),
            (nn.ELU, True),
            (nn.SELU, False),
            (nn.Softplus, False),
            (nn.Tanh, False),
            (nn.Hardswish, False),
            (nn.LeakyReLU, False),
            (nn.PReLU, False),
        )
    ),
    Family(name="swiglu, gate 0.6", build=swiglu(0.6), narrow=True),
    Family(name="swiglu, gate 3", build=swiglu(3.0), narrow=True, quick=True),
    _network(
        "attention by hand", lambda: nn.Sequential(Attention(), Attention(), Mean(), nn.Linear(128, 10)), 6, 128, 128
    ),
    Family(name="siren", build=regressed(Siren, lambda: 2 * torch.rand(1024, 2) - 1, 3)),
    Family(name="nerf", build=regressed(Nerf, lambda: 2 * torch.rand(1024, 3) - 1, 4)),
    _network("neural ode", NeuralOde),
    _network("mixture of experts", lambda: nn.Sequential(Experts(), Experts(), nn.Linear(_WIDTH, 10))),
    _network("gru by hand", Gru, 64, 12, 64),
    _network("kolmogorov-arnold", lambda: nn.Sequential(KolmogorovArnold(64, 128), KolmogorovArnold(128, 10)), 512, 64),
)
