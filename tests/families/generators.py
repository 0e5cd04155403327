"""Generative models, written in plain torch."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.families.family import Family, Objective


class Discriminator(nn.Module):
    """Strided convolutions with leaky ReLU, spectrally normalized; both halves of the batch in one call."""

    def __init__(self) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.spectral_norm
        self.inner = nn.Sequential(
            *(normed(nn.Conv2d(3, 64, 4, 2, 1)), nn.LeakyReLU(0.2), normed(nn.Conv2d(64, 128, 4, 2, 1))),
            *(nn.InstanceNorm2d(128), nn.LeakyReLU(0.2), nn.Conv2d(128, 1, 4, 2, 1)),
        )

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The non-saturating loss."""
        return F.softplus(-self.inner(real)).mean() + F.softplus(self.inner(fake)).mean()


class Vae(nn.Module):
    """A variational autoencoder; the noise is drawn by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 128))
        self.decoder = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """[R, 256] and [R, 64] -> the negative bound."""
        mean, log_variance = self.encoder(x).chunk(2, -1)
        found = self.decoder(mean + noise * (log_variance / 2).exp())
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean() / 2
        return F.binary_cross_entropy_with_logits(found, x.sigmoid(), reduction="sum") / len(x) + divergence


class VqVae(nn.Module):
    """Straight-through codes, their book a buffer that follows by exponential means."""

    def __init__(self, codes: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 32, 3, 1, 1))
        self.decoder = nn.Sequential(nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU(), nn.ConvTranspose2d(64, 3, 4, 2, 1))
        self.register_buffer("book", torch.randn(codes, 32) * 0.3)
        self.register_buffer("counts", torch.ones(codes))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> loss."""
        z = self.encoder(x)
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        chosen = (flat.square().sum(1, keepdim=True) - 2 * flat @ self.book.T + self.book.square().sum(1)).argmin(1)
        hot = F.one_hot(chosen, len(self.book)).to(flat.dtype)
        codes = self.book[chosen].view(*z.shape[:1], *z.shape[2:], -1).permute(0, 3, 1, 2)
        with torch.no_grad():
            self.counts.mul_(0.99).add_(hot.sum(0), alpha=0.01)
            self.book.mul_(0.99).add_((hot.T @ flat) / self.counts[:, None].clamp(min=1), alpha=0.01)
        straight = z + (codes - z).detach()
        return F.mse_loss(self.decoder(straight), x) + 0.25 * F.mse_loss(z, codes.detach())


class Flow(nn.Module):
    """Affine couplings with bounded scales, and the negative log likelihood under a normal distribution."""

    def __init__(self, steps: int = 3, width: int = 64) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Linear(256, 2 * width)) for _ in range(steps)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[R, 2 width] -> loss."""
        a, b = x.chunk(2, -1)
        log_determinant = x.new_zeros(len(x))
        for net in self.nets:
            scale, shift = net(a).chunk(2, -1)
            scale = scale.tanh()
            a, b = b * scale.exp() + shift, a
            log_determinant = log_determinant + scale.sum(-1)
        return ((a.square() + b.square()).sum(-1) / 2 - log_determinant).mean()


class Autoregressive(nn.Module):
    """Masked linear layers (MADE) that predict logits of bits."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        order = torch.arange(width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.register_buffer("strict", (order[:, None] > order).float())
        self.register_buffer("loose", (order[:, None] >= order).float())

    def forward(self, x: Tensor) -> Tensor:
        """[R, W] of zeros and ones -> loss."""
        hidden = F.gelu(F.linear(x, self.first.weight * self.strict, self.first.bias))
        return F.binary_cross_entropy_with_logits(
            F.linear(hidden, self.second.weight * self.loose, self.second.bias), x
        )


class Energy(nn.Module):
    """Contrastive divergence between data and noise, both energies regularized."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 1))

    def forward(self, data: Tensor, noise: Tensor) -> Tensor:
        """[R, W] twice -> loss."""
        low, high = self.inner(data), self.inner(noise)
        return low.mean() - high.mean() + 0.1 * (low.square() + high.square()).mean()


class MixtureDensity(nn.Module):
    """A mixture of normal distributions whose parameters a network gives (Bishop, 1994)."""

    def __init__(self, parts: int = 8) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh())
        self.head = nn.Linear(256, 3 * parts)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[R, 32] and [R, 1] -> negative log likelihood."""
        weight, mean, spread = self.head(self.inner(x)).chunk(3, -1)
        spread = F.softplus(spread) + 0.05
        log_density = -((y - mean) / spread).square() / 2 - spread.log() - math.log(2 * math.pi) / 2
        return -(weight.log_softmax(-1) + log_density).logsumexp(-1).mean()


class Distilled(nn.Module):
    """A student that follows a frozen teacher's softened output."""

    def __init__(self) -> None:
        super().__init__()

        def network(width: int) -> nn.Module:
            return nn.Sequential(nn.Linear(128, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, 64))

        self.student, self.teacher = network(256), network(512).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[R, 128] -> loss."""
        found, target = self.student(x) / 2, self.teacher(x) / 2
        return F.kl_div(found.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU()),
        *(nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.ConvTranspose2d(64, 3, 4, 2, 1)),
    )


def _on(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]:
    return lambda: (make(), tuple(torch.randn(shape) for shape in shapes))


FAMILIES = (
    Family(name="gan discriminator", build=_on(Discriminator, (8, 3, 32, 32), (8, 3, 32, 32))),
    Family(name="vae", build=_on(Vae, (1024, 256), (1024, 64)), narrow=True),
    Family(name="vq-vae", build=_on(VqVae, (8, 3, 32, 32))),
    Family(name="normalizing flow", build=_on(Flow, (1024, 128)), quick=True),
    Family(name="masked autoregressive", build=lambda: (Autoregressive(), ((torch.rand(1024, 128) > 0.5).float(),))),
    Family(name="energy model", build=_on(Energy, (512, 128), (512, 128))),
    Family(name="mixture density network", build=_on(MixtureDensity, (1024, 32), (1024, 1))),
    Family(name="distillation", build=_on(Distilled, (1024, 128))),
    Family(
        name="convolutional autoencoder",
        build=lambda: (Objective(_autoencoder(), F.mse_loss), (torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32))),
    ),
)
