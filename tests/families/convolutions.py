"""Convolutional networks, written in plain torch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.families.family import Family
from tests.families.networks import Mean, classified, regressed


class Residual(nn.Module):
    """x + f(x), and a function of that."""

    def __init__(self, inner: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.after = inner, after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """As ``x``."""
        return self.after(x + self.inner(x))


class Dense(nn.Module):
    """Joins its input with new channels made from it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, growth, 3, padding=1, bias=False))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C + growth, H, W]."""
        return torch.cat([x, self.inner(x)], 1)


class SqueezeExcite(nn.Module):
    """Weights channels by a function of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, channels // 4, 1), nn.SiLU(), nn.Conv2d(channels // 4, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """As ``x``."""
        return x * self.inner(x.mean((2, 3), keepdim=True)).sigmoid()


def _normed(inputs: int, outputs: int, kernel: int = 3, groups: int = 1, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]


def resnet() -> nn.Module:
    """Two blocks of ReLU networks."""
    blocks = [
        Residual(nn.Sequential(*_normed(64, 64), nn.ReLU(inplace=True), *_normed(64, 64)), nn.ReLU(inplace=True))
        for _ in range(2)
    ]
    return nn.Sequential(*_normed(3, 64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1), *blocks, *_head(64))


def vgg() -> nn.Module:
    """Convolutions, ReLU and pooling."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(128 * 64, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def densenet() -> nn.Module:
    """Four layers that see all before them, and a transition."""
    layers = [Dense(32 + 16 * i, 16) for i in range(4)]
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *layers, nn.Conv2d(96, 64, 1), nn.AvgPool2d(2), *_head(64))


def mobilenet() -> nn.Module:
    """Inverted residuals with ReLU6."""

    def block() -> nn.Module:
        wide = [*_normed(24, 96, 1), nn.ReLU6(), *_normed(96, 96, 3, groups=96), nn.ReLU6()]
        return Residual(nn.Sequential(*wide, *_normed(96, 24, 1)))

    return nn.Sequential(*_normed(3, 24, stride=2), nn.ReLU6(), block(), block(), *_head(24))


def efficientnet() -> nn.Module:
    """Inverted residuals with SiLU, channels weighted by squeeze and excitation."""

    def block() -> nn.Module:
        wide = [*_normed(24, 96, 1), nn.SiLU(), *_normed(96, 96, 3, groups=96), nn.SiLU(), SqueezeExcite(96)]
        return Residual(nn.Sequential(*wide, *_normed(96, 24, 1)))

    return nn.Sequential(*_normed(3, 24, stride=2), nn.SiLU(), block(), block(), *_head(24))


class ResBlock(nn.Module):
    """The residual block of diffusion models: group normalization, SiLU and the time's shift."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.time = nn.Linear(64, outputs)
        self.second = nn.Sequential(nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.short = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, C, H, W] and [B, 64] -> [B, outputs, H, W]."""
        y = self.first(x) + self.time(F.silu(time))[:, :, None, None]
        return self.short(x) + self.second(y)


class UNet(nn.Module):
    """Predicts the noise that was added to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64))
        self.stem, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)
        self.down, self.middle, self.up = ResBlock(32, 64), ResBlock(64, 64), ResBlock(64 + 32, 32)

    def forward(self, x: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """[B, 3, H, W], [B] and the noise -> loss."""
        angles = time[:, None] * torch.exp(-torch.arange(16, device=x.device) / 2)
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], -1).to(x.dtype))
        mixed = self.stem(x * 0.8 + noise * 0.6)
        low = self.middle(self.down(F.avg_pool2d(mixed, 2), embedded), embedded)
        joined = torch.cat([F.interpolate(low, scale_factor=2.0), mixed], 1)
        return F.mse_loss(self.head(F.silu(self.up(joined, embedded))), noise)


def _unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    x, noise = torch.randn(2, 8, 3, 32, 32)
    return UNet(), (x, torch.rand(8) * 10, noise)


class Gated(nn.Module):
    """A dilated causal convolution of WaveNet's, tanh times sigmoid, with a residual."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilated = nn.Conv1d(channels, 2 * channels, 2, dilation=dilation)
        self.mixed, self.dilation = nn.Conv1d(channels, channels, 1), dilation

    def forward(self, x: Tensor) -> Tensor:
        """As ``x``."""
        a, b = self.dilated(F.pad(x, (self.dilation, 0))).chunk(2, 1)
        return x + self.mixed(a.tanh() * b.sigmoid())


def wavenet() -> nn.Module:
    """Three dilations."""
    layers = [Gated(64, 2**i) for i in range(3)]
    return nn.Sequential(
        nn.Conv1d(1, 64, 1), *layers, nn.ReLU(), nn.Conv1d(64, 10, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    )


def tcn() -> nn.Module:
    """Residual blocks of weight-normalized convolutions."""

    def layer(dilation: int) -> list[nn.Module]:
        convolution = nn.Conv1d(64, 64, 3, padding=dilation, dilation=dilation)
        return [nn.utils.parametrizations.weight_norm(convolution), nn.ReLU()]

    blocks = [Residual(nn.Sequential(*layer(2**i), *layer(2**i)), nn.ReLU()) for i in range(2)]
    return nn.Sequential(nn.Conv1d(4, 64, 1), *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(64, 10))


class Patches(nn.Module):
    """An image as tokens, mixed across them and within them (MLP-Mixer)."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 128, 4, 4)
        self.norm1, self.tokens = nn.LayerNorm(128), nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        self.norm2, self.channels = (
            nn.LayerNorm(128),
            nn.Sequential(nn.Linear(128, 384), nn.GELU(), nn.Linear(384, 128)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> [B, 64, 128]."""
        y = self.cut(x).flatten(2).transpose(1, 2)
        y = y + self.tokens(self.norm1(y).transpose(1, 2)).transpose(1, 2)
        return y + self.channels(self.norm2(y))


def _images(name: str, make: Callable[[], nn.Module], narrow: bool = False, quick: bool = False) -> Family:
    return Family(name=name, build=classified(make, 8, 3, 32, 32), narrow=narrow, quick=quick)


FAMILIES = (
    _images("resnet", resnet, narrow=True),
    _images("vgg", vgg),
    _images("densenet", densenet),
    _images("mobilenet-v2", mobilenet, narrow=True),
    _images("efficientnet", efficientnet, narrow=True),
    _images("mlp-mixer", lambda: nn.Sequential(Patches(), Mean(), nn.Linear(128, 10))),
    Family(name="diffusion u-net", build=_unet, narrow=True),
    Family(name="wavenet", build=classified(wavenet, 4, 1, 512)),
    Family(name="tcn", build=classified(tcn, 4, 4, 512)),
    Family(
        name="instance normalization",
        build=regressed(
            lambda: nn.Sequential(nn.Linear(4, 256), nn.InstanceNorm1d(1024), nn.CELU(), nn.Linear(256, 2)),
            lambda: torch.randn(1, 1024, 4),
            2,
        ),
    ),
)
