"""The models of ``bench.step`` by name and size, with random weights and inputs, attention by SDPA in all of them.

Size "full" is the model of that name in the literature: GPT-2 medium, Llama 3.2 1B (grouped queries), BERT-large,
ViT-B/16, ResNet-50 and Swin-T. "cpu" is what a CPU takes a second or two for. "tiny" runs in an instant there and
measures nothing but whether all of it works.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .models import Workload, make_gpt

_CLASSES = 1000


@dataclass(frozen=True)
class Size:
    """How a model is configured and fed.

    Args:
        settings: Fields of the model's config, or of ``make_gpt``.
        sample: Shape of one sample: ``(tokens,)`` or ``(channels, height, width)``.
        batches: Numbers of samples to measure with.
    """

    settings: Mapping[str, Any]
    sample: tuple[int, ...]
    batches: tuple[int, ...]


SIZES: Mapping[str, Mapping[str, Size]] = {
    "gpt": {
        "tiny": Size({"layers": 2, "width": 64, "heads": 4, "ff": 256, "vocabulary": 256}, (128,), (8,)),
        "demo": Size({}, (256,), (8,)),
        "cpu": Size({"layers": 4, "width": 512, "heads": 8, "ff": 2048, "vocabulary": 1024}, (256,), (8,)),
        "small": Size({"layers": 12, "width": 768, "heads": 12, "ff": 3072, "vocabulary": 50304}, (1024,), (8, 32)),
        "full": Size({"layers": 24, "width": 1024, "heads": 16, "ff": 4096, "vocabulary": 50304}, (1024,), (8, 16)),
    },
    "llama": {
        "tiny": Size(
            {
                "num_hidden_layers": 2,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "intermediate_size": 192,
                "vocab_size": 256,
            },
            (128,),
            (8,),
        ),
        "small": Size(
            {
                "num_hidden_layers": 12,
                "hidden_size": 1024,
                "num_attention_heads": 16,
                "num_key_value_heads": 4,
                "intermediate_size": 3584,
                "vocab_size": 32000,
            },
            (2048,),
            (4, 8),
        ),
        "full": Size(
            {
                "num_hidden_layers": 16,
                "hidden_size": 2048,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "intermediate_size": 8192,
                "vocab_size": 128256,
            },
            (2048,),
            (2, 4),
        ),
    },
    "bert": {
        "tiny": Size(
            {
                "num_hidden_layers": 2,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "intermediate_size": 256,
                "vocab_size": 256,
                "num_labels": 2,
            },
            (128,),
            (8,),
        ),
        "cpu": Size(
            {
                "num_hidden_layers": 4,
                "hidden_size": 512,
                "num_attention_heads": 8,
                "intermediate_size": 2048,
                "vocab_size": 1024,
                "num_labels": 2,
            },
            (256,),
            (8,),
        ),
        "full": Size(
            {
                "num_hidden_layers": 24,
                "hidden_size": 1024,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
                "num_labels": 2,
            },
            (512,),
            (16, 32),
        ),
    },
    "vit": {
        "tiny": Size(
            {
                "image_size": 32,
                "patch_size": 4,
                "num_hidden_layers": 2,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "intermediate_size": 256,
            },
            (3, 32, 32),
            (8,),
        ),
        "full": Size({}, (3, 224, 224), (64, 256)),
    },
    "resnet": {
        "tiny": Size(
            {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}, (3, 32, 32), (8,)
        ),
        "full": Size({}, (3, 224, 224), (64, 256)),
    },
    "swin": {
        "tiny": Size(
            {
                "image_size": 32,
                "patch_size": 2,
                "embed_dim": 32,
                "depths": [1, 1],
                "num_heads": [2, 4],
                "window_size": 4,
            },
            (3, 32, 32),
            (8,),
        ),
        "full": Size({}, (3, 224, 224), (64, 128)),
    },
}

# Model -> its classes in transformers: config and model.
_CLASS_NAMES: Mapping[str, tuple[str, str]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "bert": ("BertConfig", "BertForSequenceClassification"),
    "vit": ("ViTConfig", "ViTForImageClassification"),
    "resnet": ("ResNetConfig", "ResNetForImageClassification"),
    "swin": ("SwinConfig", "SwinForImageClassification"),
}


def make_large(
    model: str, size: str, batch: int, *, checkpointed: bool, device: torch.device, dtype: torch.dtype
) -> Workload:
    """A model in training, its weights and floating-point inputs in ``dtype``.

    Args:
        model: A name in ``SIZES``.
        size: One of the model's sizes there.
        batch: Number of samples.
        checkpointed: Whether each block is recomputed in the backward.
        device: Where everything is.
        dtype: Of weights and inputs; nothing is cast automatically.

    """
    spec = SIZES[model][size]
    if model == "gpt":
        made = make_gpt(**spec.settings, tokens=spec.sample[0], batch=batch, checkpointed=checkpointed, device=device)
        made.model.to(dtype)
        return made
    network = _make_network(model, spec)
    network.to(device, dtype).train()
    if checkpointed and network.supports_gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    elif checkpointed:
        _checkpoint_blocks(network.resnet.encoder)
    if model == "llama":
        ids = torch.randint(network.config.vocab_size, (batch, *spec.sample)).to(device)
        return Workload(network, (ids,), lambda call, ids: call(input_ids=ids, labels=ids).loss)
    labels = torch.randint(network.config.num_labels, (batch,)).to(device)
    inputs: Tensor
    if model == "bert":
        # Without padding there is no mask to pass.
        inputs = torch.randint(network.config.vocab_size, (batch, *spec.sample)).to(device)
    else:
        inputs = torch.randn(batch, *spec.sample).to(device, dtype)
    return Workload(network, (inputs, labels), lambda call, inputs, labels: call(inputs, labels=labels).loss)


def _checkpoint_blocks(encoder: nn.Module) -> None:
    """Recomputes each residual block in the backward, in a model that has no switch for it."""
    for stage in encoder.stages:  # type: ignore[union-attr]
        for block in stage.layers:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def _make_network(model: str, spec: Size) -> Any:
    import transformers

    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_labels": _CLASSES, **spec.settings, "attn_implementation": "sdpa"}
    if model in ("llama", "bert"):
        settings |= {"use_cache": False}
    if model != "llama":
        # The model would find this out in its first forward, and be compiled again for it.
        settings |= {"problem_type": "single_label_classification"}
    config_class, model_class = (getattr(transformers, name) for name in _CLASS_NAMES[model])
    if model == "resnet":
        # It has no attention and refuses to be asked for any.
        del settings["attn_implementation"]
    return model_class(config_class(**settings))
