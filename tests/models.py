"""The three kinds of model that the tests train, and how their gradients are compared."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actcompile._gpt import GPT


@dataclass
class Task:
    """A model in training mode with one batch; ``loss`` calls what stands in for the model on it."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    loss: Callable[[Callable[..., object]], Tensor]

    def gradients(self, call: Callable[..., object] | None = None) -> dict[str, Tensor]:
        """Gradients of all parameters of one step, through ``call`` or the model itself."""
        self.model.zero_grad()
        self.loss(self.model if call is None else call).backward()
        return {name: value.grad for name, value in self.model.named_parameters() if value.grad is not None}


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside an identity or a 1x1 convolution."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, width, H / stride, W / stride]."""
        y = self.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem with max pooling, two residual blocks and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.blocks = nn.Sequential(ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> logits [B, 10]."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def gpt(dropout: float = 0.0, layers: int = 2) -> Task:
    """Next-token prediction."""
    model = GPT(layers=layers, width=64, heads=2, vocabulary=96, tokens=64, dropout=dropout)
    tokens = torch.randint(96, (8, 65))
    return Task(model, (tokens,), lambda call: call(tokens[:, :-1], tokens[:, 1:]))


def bert(dropout: float = 0.0) -> Task:
    """Sequence classification with Hugging Face's model, padding included."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    model = transformers.BertForSequenceClassification(config).train()
    ids, labels = torch.randint(100, (8, 48)), torch.randint(2, (8,))
    mask = torch.ones(8, 48, dtype=torch.int64)
    mask[:4, 40:] = 0
    inputs = (ids, mask, labels)
    return Task(model, inputs, lambda call: call(input_ids=ids, attention_mask=mask, labels=labels).loss)


def resnet(batch: int = 32) -> Task:
    """Image classification."""
    images, labels = torch.randn(batch, 3, 16, 16), torch.randint(10, (batch,))
    return Task(ResNet(), (images, labels), lambda call: F.cross_entropy(call(images), labels))


def relative_error(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """|got - exact| / |exact| over all parameters."""
    return float((_flat(got) - _flat(exact)).norm() / _flat(exact).norm())


def cosine(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The cosine between the gradients of all parameters."""
    return float(F.cosine_similarity(_flat(got), _flat(exact), dim=0))


def cosines(got: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The cosine of each parameter's gradients; parameters whose exact gradient is rounding noise are left out."""
    largest = max(value.norm() for value in exact.values())
    return {
        name: float(F.cosine_similarity(got[name].double().flatten(), value.double().flatten(), dim=0))
        for name, value in exact.items()
        if value.norm() > 1e-5 * largest
    }


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])
