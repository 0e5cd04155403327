"""The models of the benchmarks, each with a batch and a loss, all with random weights."""

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from actcompile._gpt import GPT

__all__ = [
    "BERT_VOCABULARY",
    "CORA_CLASSES",
    "CORA_FEATURES",
    "GCN",
    "GPT",
    "WORKLOADS",
    "Batch",
    "ResNet",
    "Workload",
    "make_bert",
    "make_gcn",
    "make_gpt",
    "make_llama",
    "make_resnet",
    "make_resnet18",
    "make_vit",
]

BERT_VOCABULARY = 4000
CORA_FEATURES, CORA_CLASSES = 1433, 7
# Label of a node that does not count in the loss; cross_entropy's default.
IGNORED = -100
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Workload:
    """A model, one batch of random inputs, and how a batch becomes a loss through what is called for the model."""

    model: nn.Module
    batch: Batch
    apply: Callable[..., Tensor]

    def loss(self, call: Callable[..., Any], batch: Batch | None = None) -> Tensor:
        """The loss of ``batch``, of the random one when left out, with ``call`` in the model's place."""
        return self.apply(call, *(self.batch if batch is None else batch))

    def parameter_nbytes(self) -> int:
        """Bytes of all parameters, and so of all their gradients."""
        return sum(parameter.nbytes for parameter in self.model.parameters())


def make_gpt(
    *,
    layers: int = 4,
    width: int = 256,
    heads: int = 4,
    ff: int = 1024,
    vocabulary: int = 256,
    batch: int = 8,
    tokens: int = 256,
    dropout: float = 0.0,
    checkpointed: bool = False,
    device: torch.device | str = "cpu",
) -> Workload:
    """The demo's GPT; by default in the demo's size."""
    torch.manual_seed(0)
    model = GPT(
        layers=layers,
        width=width,
        heads=heads,
        ff=ff,
        vocabulary=vocabulary,
        tokens=tokens,
        dropout=dropout,
        checkpointed=checkpointed,
    ).to(device)
    ids = torch.randint(vocabulary, (batch, tokens + 1)).to(device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return Workload(model, (inputs, targets), lambda call, *batch: call(*batch))


def make_bert(
    *,
    layers: int = 4,
    batch: int = 16,
    tokens: int = 64,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
) -> Workload:
    """Hugging Face's BertForSequenceClassification, small, with its usual dropout; ``attention`` as it names it."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=BERT_VOCABULARY,
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=1024,
        max_position_embeddings=tokens,
        attn_implementation=attention,
        # The model would find this out in its first forward, and be compiled again for it.
        problem_type="single_label_classification",
    )
    model = BertForSequenceClassification(config).to(device).train()
    ids = torch.randint(config.vocab_size, (batch, tokens)).to(device)
    mask, labels = torch.ones_like(ids), torch.randint(2, (batch,)).to(device)
    return Workload(
        model,
        (ids, mask, labels),
        lambda call, ids, mask, labels: call(input_ids=ids, attention_mask=mask, labels=labels).loss,
    )


def make_llama(
    *,
    layers: int = 4,
    width: int = 256,
    vocabulary: int = 256,
    batch: int = 8,
    tokens: int = 256,
    device: torch.device | str = "cpu",
) -> Workload:
    """Hugging Face's LlamaForCausalLM, small: RMSNorm, rotary positions, SwiGLU of 3.5 times the width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device).train()
    ids = torch.randint(vocabulary, (batch, tokens + 1)).to(device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return Workload(
        model,
        (inputs, targets),
        lambda call, inputs, targets: F.cross_entropy(call(input_ids=inputs).logits.flatten(0, 1), targets.flatten()),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and ReLU, added to the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, inputs, H, W]`` -> ``[B, outputs, H / stride, W / stride]``."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A small residual network for images.

    Args:
        channels: Channels of each stage; each stage but the first halves height and width.
        blocks: Residual blocks per stage.
        classes: Number of classes.
        pooled: Whether the stem halves height and width.
    """

    def __init__(
        self, channels: tuple[int, ...] = (32, 64, 128), blocks: int = 2, classes: int = 10, pooled: bool = True
    ) -> None:
        super().__init__()
        first = channels[0]
        self.stem = nn.Sequential(nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU())
        if pooled:
            self.stem.append(nn.MaxPool2d(2))
        stages = []
        for stage, outputs in enumerate(channels):
            for block in range(blocks):
                inputs = outputs if block else channels[max(0, stage - 1)]
                stages.append(ResidualBlock(inputs, outputs, stride=2 if stage and not block else 1))
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, classes]`` of ``images [B, 3, H, W]``."""
        return self.head(self.blocks(self.stem(images)).mean(dim=(2, 3)))


def make_resnet(*, batch: int = 32, size: int = 32, device: torch.device | str = "cpu") -> Workload:
    """``ResNet`` on random images."""
    torch.manual_seed(0)
    model = ResNet().to(device).train()
    images = torch.randn(batch, 3, size, size).to(device)
    labels = torch.randint(10, (batch,)).to(device)
    return Workload(model, (images, labels), lambda call, images, labels: F.cross_entropy(call(images), labels))


class Classifier(nn.Module):
    """A model that returns logits, with its loss inside, so that one graph holds both."""

    def __init__(self, logits: nn.Module) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, labels: Tensor, *inputs: Tensor) -> Tensor:
        """The mean cross-entropy of ``labels [B]``."""
        return F.cross_entropy(self.logits(*inputs), labels)


def make_resnet18(*, batch: int = 32, size: int = 32, device: torch.device | str = "cpu") -> Workload:
    """ResNet-18 as it is used for images of 32 x 32: a 3x3 stem without pooling."""
    torch.manual_seed(0)
    model = Classifier(ResNet((64, 128, 256, 512), pooled=False)).to(device).train()
    images = torch.randn(batch, 3, size, size).to(device)
    labels = torch.randint(10, (batch,)).to(device)
    return Workload(model, (images, labels), lambda call, images, labels: call(labels, images))


def make_vit(*, layers: int = 4, batch: int = 32, size: int = 32, device: torch.device | str = "cpu") -> Workload:
    """Hugging Face's ViTForImageClassification, small, with patches of 4 x 4."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=size,
        patch_size=4,
        hidden_size=192,
        num_hidden_layers=layers,
        num_attention_heads=3,
        intermediate_size=768,
        num_labels=10,
        problem_type="single_label_classification",
    )
    model = ViTForImageClassification(config).to(device).train()
    images = torch.randn(batch, 3, size, size).to(device)
    labels = torch.randint(10, (batch,)).to(device)
    return Workload(model, (images, labels), lambda call, images, labels: call(images, labels=labels).loss)


class GCN(nn.Module):
    """A graph convolutional network over one whole graph.

    Args:
        sizes: Features of the nodes, hidden units of each layer, classes.
        dropout: Share of each layer's inputs that is dropped in training.

    Source: Kipf and Welling, Semi-supervised classification with graph convolutional networks, equation 2.
    """

    def __init__(self, sizes: tuple[int, ...], dropout: float = 0.5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*ends) for ends in itertools.pairwise(sizes))
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, edges: Tensor, weights: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of ``features [N, sizes[0]]``.

        ``weights [E]`` are the entries of the normalized adjacency matrix at ``edges [2, E]``, targets and sources.
        """
        targets, sources = edges.unbind()
        x = features
        for index, layer in enumerate(self.layers):
            x = layer(self.dropout(F.relu(x) if index else x))
            # The product with the sparse matrix, of operators that compilers trace.
            x = torch.zeros_like(x).index_add(0, targets, x.index_select(0, sources) * weights[:, None])
        return x


def make_gcn(*, layers: int = 3, nodes: int = 2708, width: int = 64, device: torch.device | str = "cpu") -> Workload:
    """``GCN`` on a random graph of Cora's size, some of whose nodes have labels."""
    torch.manual_seed(0)
    sizes = (CORA_FEATURES, *[width] * (layers - 1), CORA_CLASSES)
    model = Classifier(GCN(sizes)).to(device).train()
    features = torch.rand(nodes, CORA_FEATURES).to(device)
    edges = torch.randint(nodes, (2, 5 * nodes)).to(device)
    weights = torch.full((5 * nodes,), 1 / 5).to(device)
    labels = torch.randint(CORA_CLASSES, (nodes,)).to(device)
    labels[nodes // 4 :] = IGNORED
    return Workload(model, (features, edges, weights, labels), lambda call, *batch: call(batch[-1], *batch[:-1]))


WORKLOADS: Mapping[str, Callable[..., Workload]] = {
    "gpt": make_gpt,
    "llama": make_llama,
    "bert": make_bert,
    # Attention in plain math, so that its probabilities are saved.
    "bert_plain": functools.partial(make_bert, attention="eager"),
    "resnet": make_resnet,
    "resnet18": make_resnet18,
    "vit": make_vit,
    "gcn": make_gcn,
}
