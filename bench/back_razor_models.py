"""The models that Back Razor was shown on, fp32, random weights, with its own settings of what is pruned.

    vit        ViT-B/16 at 224 pixels
    bert       BERT-base on RTE, every sample padded to 512 tokens
    mobilenet  MobileNetV2 at 224 pixels, batch normalization trained
    deeplab    DeepLabV3 on MobileNetV2 with output stride 16, at 129 pixels instead of 513

Ids of BERT are random, the lengths of RTE's pairs are real: words and marks, each a token, and the three special ones.
"""

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .large_models import make_large
from .models import Classifier, Workload

_CPU = torch.device("cpu")
_RTE_TOKENS, _RTE_LABELS, _SPECIAL_TOKENS = 512, 2, 3
_CLASSES, _SEGMENT_CLASSES, _CROP = 1000, 21, 129

# Expansion, channels, blocks and stride of each stage.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _FEATURES = 32, 1280
_ASPP, _RATES = 256, (6, 12, 18)


@dataclass(frozen=True)
class Model:
    """How one model is made.

    Args:
        make: From a number of samples and the data folder.
        batch: Samples of a step that a CPU core takes seconds for.
        sparsity: Share that Back Razor's scripts drop.
        dense: Patterns of the modules that Back Razor leaves as they are.
    """

    make: Callable[[int, Path], Workload]
    batch: int
    sparsity: float
    dense: tuple[str, ...]


def _normalized(
    inputs: int, outputs: int, size: int, stride: int = 1, dilation: int = 1, groups: int = 1
) -> list[nn.Module]:
    padding = (size - 1) // 2 * dilation
    return [
        nn.Conv2d(inputs, outputs, size, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class InvertedResidual(nn.Module):
    """Expansion, a convolution of each channel by itself, and projection, added to the input where shapes allow.

    Args:
        inputs: Channels.
        outputs: Channels.
        expansion: Channels in the middle, as a multiple of ``inputs``.
        stride: Of the middle convolution.
        dilation: Of the middle convolution.

    Source: Sandler et al., MobileNetV2, section 3.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, dilation: int = 1) -> None:
        super().__init__()
        width = expansion * inputs
        expand = [*_normalized(inputs, width, 1), nn.ReLU6()] if expansion > 1 else []
        middle = [*_normalized(width, width, 3, stride, dilation, groups=width), nn.ReLU6()]
        self.layers = nn.Sequential(*expand, *middle, *_normalized(width, outputs, 1))
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, inputs, H, W]`` -> ``[B, outputs, H / stride, W / stride]``."""
        y = self.layers(x)
        return x + y if self.is_residual else y


def make_backbone(output_stride: int = 32) -> nn.Sequential:
    """MobileNetV2 without its head, 320 channels; what would stride beyond ``output_stride`` is dilated instead."""
    layers = [*_normalized(3, _STEM, 3, stride=2), nn.ReLU6()]
    inputs, reached, dilation = _STEM, 2, 1
    for expansion, outputs, blocks, stride in _STAGES:
        for block in range(blocks):
            step = stride if block == 0 else 1
            if reached * step > output_stride:
                dilation, step = dilation * step, 1
            reached *= step
            layers.append(InvertedResidual(inputs, outputs, expansion, step, dilation))
            inputs = outputs
    return nn.Sequential(*layers)


class ASPP(nn.Module):
    """Convolutions of several dilations and the mean of the image, side by side, and class scores of them all.

    Source: Chen et al., Rethinking atrous convolution, section 3.3.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        sizes = [(1, 1), *((3, rate) for rate in _RATES)]
        self.branches = nn.ModuleList(
            nn.Sequential(*_normalized(inputs, _ASPP, size, dilation=rate), nn.ReLU()) for size, rate in sizes
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_normalized(inputs, _ASPP, 1), nn.ReLU())
        self.project = nn.Sequential(
            *_normalized(_ASPP * (len(sizes) + 1), _ASPP, 1),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(_ASPP, _SEGMENT_CLASSES, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, inputs, H, W]`` -> scores ``[B, 21, H, W]``."""
        found = [branch(x) for branch in self.branches]
        found.append(self.pooled(x).expand_as(found[0]))
        return self.project(torch.cat(found, 1))


class DeepLab(nn.Module):
    """Class scores for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = make_backbone(output_stride=16)
        self.head = ASPP(_STAGES[-1][1])

    def forward(self, images: Tensor) -> Tensor:
        """``images [B, 3, H, W]`` -> ``[B, 21, H, W]``."""
        scores = self.head(self.backbone(images))
        return F.interpolate(scores, size=images.shape[2:], mode="bilinear", align_corners=False)


def make_mobilenet(batch: int, *, size: int = 224, classes: int = _CLASSES) -> Workload:
    """MobileNetV2 on random images."""
    torch.manual_seed(0)
    head = [*_normalized(_STAGES[-1][1], _FEATURES, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = Classifier(nn.Sequential(make_backbone(), *head, nn.Linear(_FEATURES, classes))).train()
    images, labels = torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))
    return Workload(model, (images, labels), lambda call, images, labels: call(labels, images))


def make_deeplab(batch: int, *, size: int = _CROP) -> Workload:
    """``DeepLab`` on random images."""
    torch.manual_seed(0)
    model = Classifier(DeepLab()).train()
    images, labels = torch.randn(batch, 3, size, size), torch.randint(_SEGMENT_CLASSES, (batch, size, size))
    return Workload(model, (images, labels), lambda call, images, labels: call(labels, images))


def make_rte_bert(batch: int, data: Path) -> Workload:
    """BERT-base, padded as Back Razor's script pads.

    Raises:
        FileNotFoundError: When the data lacks ``glue/RTE/train.tsv``.
    """
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        num_labels=_RTE_LABELS,
        problem_type="single_label_classification",
        use_cache=False,
        # Back Razor's attention never drops probabilities, pruned or not.
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config).train()
    lengths = torch.tensor(rte_lengths(data / "glue" / "RTE" / "train.tsv")[:batch])
    mask = (torch.arange(_RTE_TOKENS) < lengths[:, None]).long()
    ids, labels = torch.randint(config.vocab_size, mask.shape) * mask, torch.randint(_RTE_LABELS, (batch,))
    return Workload(
        model,
        (ids, mask, labels),
        lambda call, ids, mask, labels: call(input_ids=ids, attention_mask=mask, labels=labels).loss,
    )


def rte_lengths(path: Path) -> list[int]:
    """Tokens of each pair of RTE's file, the special ones among them.

    Raises:
        FileNotFoundError: When there is no such file.
    """
    if not path.exists():
        raise FileNotFoundError(f"the data must hold glue/RTE/train.tsv, got none at {str(path)!r}: name it by --data")
    with path.open(newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        texts = [row["sentence1"] + " " + row["sentence2"] for row in rows]
    return [min(len(re.findall(r"\w+|[^\w\s]", text)) + _SPECIAL_TOKENS, _RTE_TOKENS) for text in texts]


MODELS: Mapping[str, Model] = {
    "vit": Model(
        lambda batch, data: make_large("vit", "full", batch, checkpointed=False, device=_CPU, dtype=torch.float32),
        batch=4,
        sparsity=0.8,
        dense=("vit.embeddings.*", "vit.layernorm", "classifier"),
    ),
    "bert": Model(
        make_rte_bert,
        batch=8,
        sparsity=0.8,
        dense=("*.intermediate.*", "*.layer.[0-9].output.*", "*.layer.1[01].output.*", "*.pooler.*", "*.embeddings.*"),
    ),
    "mobilenet": Model(lambda batch, data: make_mobilenet(batch), batch=8, sparsity=0.9, dense=()),
    "deeplab": Model(lambda batch, data: make_deeplab(batch), batch=4, sparsity=0.7, dense=("logits.head.*",)),
}
