"""Losses beyond cross-entropy, and adapters, written in plain torch or with peft and diffusers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.families.family import VOCABULARY, Family, Named, own_loss
from tests.families.networks import classified


def encoder() -> nn.Module:
    """Of vectors of 128."""
    return nn.Sequential(
        *(nn.Linear(128, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 64))
    )


class Pairs(nn.Module):
    """Embeds both halves of the batch and compares them."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.loss = encoder(), loss

    def forward(self, x: Tensor) -> Tensor:
        """[R, 128] -> loss; row i belongs to row i + R / 2."""
        a, b = self.inner(x).chunk(2)
        return self.loss(a, b)


def contrast(a: Tensor, b: Tensor) -> Tensor:
    """InfoNCE of normalized embeddings."""
    scores = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / 0.1
    return F.cross_entropy(scores, torch.arange(len(a), device=a.device))


def triplet(a: Tensor, b: Tensor) -> Tensor:
    """Hardest negatives by pairwise distances."""
    distances = torch.cdist(a, b)
    own = distances.diagonal()
    others = distances + 1e3 * torch.eye(len(a), device=a.device)
    return F.relu(own - others.amin(1) + 1).mean()


def barlow(a: Tensor, b: Tensor) -> Tensor:
    """Barlow Twins: the cross-correlation is to be the identity."""
    normed = [(x - x.mean(0)) / (x.std(0) + 1e-5) for x in (a, b)]
    return (normed[0].T @ normed[1] / len(a) - torch.eye(a.shape[1], device=a.device)).square().sum()


def vicreg(a: Tensor, b: Tensor) -> Tensor:
    """Invariance and a hinge on deviations."""
    hinge = sum(F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean() for x in (a, b))
    return 25 * F.mse_loss(a, b) + 25 * hinge


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine embedding and a smooth L1 distance."""
    return F.cosine_embedding_loss(a, b, a.new_ones(len(a))) + F.smooth_l1_loss(a, b) + F.huber_loss(a, b, delta=0.5)


class ArcFace(nn.Module):
    """Additive angular margin (Deng et al., 2019), the cosine clamped."""

    def __init__(self, classes: int = 64) -> None:
        super().__init__()
        self.inner, self.weight = encoder(), nn.Parameter(torch.randn(classes, 64))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """[R, 128] and [R] -> loss."""
        cosines = F.linear(F.normalize(self.inner(x)), F.normalize(self.weight)).clamp(-1 + 1e-6, 1 - 1e-6)
        angles = torch.acos(cosines) + 0.3 * F.one_hot(labels, len(self.weight))
        return F.cross_entropy(16 * angles.cos(), labels)


class Ctc(nn.Module):
    """Connectionist temporal classification on top of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv1d(16, 128, 3, padding=1), nn.GELU(), nn.Conv1d(128, 128, 3, padding=1), nn.GELU()
        )
        self.head = nn.Linear(128, 20)

    def forward(self, x: Tensor, targets: Tensor, lengths: Tensor, target_lengths: Tensor) -> Tensor:
        """[B, 16, T] -> loss."""
        logits = self.head(self.inner(x).permute(2, 0, 1))
        return F.ctc_loss(logits.log_softmax(-1), targets, lengths, target_lengths)


class Focal(nn.Module):
    """Focal loss and Dice's, as in segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.SiLU(), nn.Conv2d(64, 1, 1))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """[B, 3, H, W] and [B, 1, H, W] -> loss."""
        logits = self.inner(x)
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        p = logits.sigmoid()
        focal = ((1 - torch.exp(-entropy)).square() * entropy).mean()
        return focal + 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)


class Lora(nn.Module):
    """A frozen linear layer beside a product of two thin ones."""

    def __init__(self, width: int, out: int, rank: int = 8) -> None:
        super().__init__()
        self.base = nn.Linear(width, out).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[R, W] -> [R, out]."""
        return self.base(x) + self.up(self.down(x))


def _lora() -> nn.Module:
    layers = [nn.Sequential(nn.LayerNorm(256), Lora(256, 512), nn.GELU(), Lora(512, 256)) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def _peft(**settings: Any) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]:
    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        import peft
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
        lora = peft.LoraConfig(r=8, lora_dropout=0.0, init_lora_weights=False, target_modules="all-linear", **settings)
        model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora).train()
        ids = torch.randint(VOCABULARY, (4, 160))
        return Named(model, ("input_ids", "labels"), own_loss), (ids, ids)

    return build


class Denoiser(nn.Module):
    """Diffusers' U-Net and its loss."""

    def __init__(self) -> None:
        super().__init__()
        import diffusers

        self.inner = diffusers.UNet2DModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=16,
        )

    def forward(self, x: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """[B, 3, H, W], [B] and the noise -> loss."""
        return F.mse_loss(self.inner(x * 0.8 + noise * 0.6, time).sample, noise)


def _denoiser() -> tuple[nn.Module, tuple[Tensor, ...]]:
    x, noise = torch.randn(2, 8, 3, 16, 16)
    return Denoiser(), (x, torch.randint(1000, (8,)), noise)


def _ctc() -> tuple[nn.Module, tuple[Tensor, ...]]:
    targets = torch.randint(1, 20, (8, 12))
    return Ctc(), (torch.randn(8, 16, 96), targets, torch.full((8,), 96), torch.full((8,), 12))


def _pairs(name: str, loss: Callable[[Tensor, Tensor], Tensor], rows: int = 768) -> Family:
    return Family(name=name, build=lambda: (Pairs(loss), (torch.randn(rows, 128),)))


FAMILIES = (
    _pairs("contrastive loss", contrast, 512),
    _pairs("triplet loss, cdist", triplet, 512),
    _pairs("barlow twins", barlow),
    _pairs("vicreg", vicreg),
    _pairs("cosine, huber and smooth l1", cosine),
    Family(name="arcface", build=lambda: (ArcFace(), (torch.randn(768, 128), torch.randint(64, (768,))))),
    Family(name="ctc", build=_ctc),
    Family(
        name="focal and dice loss",
        build=lambda: (Focal(), (torch.randn(4, 3, 32, 32), (torch.rand(4, 1, 32, 32) > 0.7).float())),
    ),
    Family(name="lora by hand", build=classified(_lora, 768, 256), narrow=True),
    Family(name="peft lora, llama", needs="peft", build=_peft(), narrow=True),
    Family(name="peft dora, llama", needs="peft", build=_peft(use_dora=True)),
    Family(name="diffusers u-net", needs="diffusers", build=_denoiser, narrow=True),
)
