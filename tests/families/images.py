"""Vision, audio and paired models of Hugging Face's, with random weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.families.family import VOCABULARY, Build, Family, from_transformers, mean_square

_BATCH, _CLASSES = 8, 8
_WIDE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _pictures(size: int, batch: int = _BATCH) -> Mapping[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size), "labels": torch.arange(batch) % _CLASSES}


def _unlabelled(size: int, batch: int = _BATCH) -> Mapping[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def _classifier(kind: str, size: int = 64, batch: int = _BATCH, **settings: Any) -> Build:
    return from_transformers(kind, lambda: _pictures(size, batch), num_labels=_CLASSES, **settings)


def _segmentation() -> Mapping[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 64, 64), "labels": torch.randint(_CLASSES, (4, 64, 64))}


def _videos() -> Mapping[str, Tensor]:
    return {"pixel_values": torch.randn(4, 4, 3, 48, 48), "labels": torch.arange(4)}


def _captions() -> Mapping[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (_BATCH, 64))
    ids[:, -1] = VOCABULARY - 1
    return {"input_ids": ids, "pixel_values": torch.randn(_BATCH, 3, 64, 64), "attention_mask": torch.ones_like(ids)}


def _spectra() -> Mapping[str, Tensor]:
    return {"input_features": torch.randn(4, 80, 240), "labels": torch.randint(3, VOCABULARY, (4, 64))}


def _waves(length: int = 16000) -> Mapping[str, Tensor]:
    return {"input_values": torch.randn(4, length), "labels": torch.randint(3, 32, (4, 10))}


def _clip() -> Build:
    text = {**_WIDE, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "eos_token_id": VOCABULARY - 1}
    image = {**_WIDE, "image_size": 64, "patch_size": 8}
    return _paired("CLIPModel", text_config=text, vision_config=image, projection_dim=64)


def _paired(kind: str, **settings: Any) -> Build:
    def contrast(output: Any) -> Tensor:
        targets = torch.arange(_BATCH)
        cross_entropy = torch.nn.functional.cross_entropy
        logits = output.logits_per_image
        return cross_entropy(logits, targets) + cross_entropy(logits.T, targets)

    return from_transformers(kind, _captions, contrast, **settings)


_SPEECH: dict[str, Any] = {
    **_WIDE,
    "vocab_size": 32,
    "conv_dim": (64, 64, 128),
    "conv_stride": (5, 4, 4),
    "conv_kernel": (10, 8, 4),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "mask_time_prob": 0.0,
    "ctc_zero_infinity": True,
}
_PATCHES = {**_WIDE, "image_size": 64, "patch_size": 8}

FAMILIES = (
    Family(name="vit", needs="transformers", narrow=True, build=_classifier("ViTForImageClassification", **_PATCHES)),
    Family(name="deit", needs="transformers", build=_classifier("DeiTForImageClassification", **_PATCHES)),
    Family(
        name="swin",
        needs="transformers",
        narrow=True,
        build=_classifier(
            "SwinForImageClassification",
            image_size=64,
            patch_size=2,
            embed_dim=48,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            drop_path_rate=0.0,
        ),
    ),
    Family(name="beit", needs="transformers", build=_classifier("BeitForImageClassification", **_PATCHES)),
    Family(
        name="vit-mae",
        needs="transformers",
        build=from_transformers(
            "ViTMAEForPreTraining",
            lambda: _unlabelled(64),
            decoder_hidden_size=96,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=4,
            decoder_intermediate_size=256,
            **_PATCHES,
        ),
    ),
    Family(
        name="dinov2",
        needs="transformers",
        build=_classifier("Dinov2ForImageClassification", mlp_ratio=3, drop_path_rate=0.0, **_PATCHES),
    ),
    Family(
        name="segformer",
        needs="transformers",
        build=from_transformers(
            "SegformerForSemanticSegmentation",
            _segmentation,
            num_labels=_CLASSES,
            num_encoder_blocks=4,
            depths=[1, 1, 1, 1],
            hidden_sizes=[32, 64, 96, 128],
            num_attention_heads=[1, 2, 3, 4],
            decoder_hidden_size=64,
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
            **_NO_DROPOUT,
        ),
    ),
    Family(
        name="convnext",
        needs="transformers",
        narrow=True,
        build=_classifier("ConvNextForImageClassification", hidden_sizes=[48, 96], depths=[2, 2], num_stages=2),
    ),
    Family(
        name="convnext-v2",
        needs="transformers",
        build=_classifier("ConvNextV2ForImageClassification", hidden_sizes=[48, 96], depths=[2, 2], num_stages=2),
    ),
    Family(
        name="resnet, transformers",
        needs="transformers",
        build=_classifier("ResNetForImageClassification", embedding_size=32, hidden_sizes=[64, 128], depths=[2, 2]),
    ),
    Family(
        name="regnet",
        needs="transformers",
        build=_classifier(
            "RegNetForImageClassification", embedding_size=32, hidden_sizes=[64, 128], depths=[2, 2], groups_width=16
        ),
    ),
    Family(
        name="mobilevit",
        needs="transformers",
        build=_classifier(
            "MobileViTForImageClassification",
            size=64,
            hidden_sizes=[48, 64, 80],
            neck_hidden_sizes=[16, 16, 32, 48, 64, 80, 160],
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            classifier_dropout_prob=0.0,
            image_size=64,
        ),
    ),
    Family(
        name="mobilenet-v2, transformers",
        needs="transformers",
        build=_classifier(
            "MobileNetV2ForImageClassification", size=64, depth_multiplier=0.5, classifier_dropout_prob=0.0
        ),
    ),
    Family(
        name="poolformer",
        needs="transformers",
        build=_classifier(
            "PoolFormerForImageClassification",
            depths=[1, 1, 1, 1],
            hidden_sizes=[32, 64, 96, 128],
            drop_path_rate=0.0,
        ),
    ),
    Family(
        name="timesformer",
        needs="transformers",
        build=from_transformers(
            "TimesformerForVideoClassification",
            _videos,
            num_labels=_CLASSES,
            num_frames=4,
            **{**_PATCHES, "image_size": 48},
        ),
    ),
    Family(
        name="yolos",
        needs="transformers",
        build=from_transformers(
            "YolosModel",
            lambda: _unlabelled(64),
            mean_square,
            num_detection_tokens=10,
            **{**_PATCHES, "image_size": [64, 64]},
        ),
    ),
    Family(name="clip", needs="transformers", narrow=True, build=_clip()),
    Family(
        name="siglip",
        needs="transformers",
        build=_paired(
            "SiglipModel",
            text_config={**_WIDE, "vocab_size": VOCABULARY, "max_position_embeddings": 64},
            vision_config={**_WIDE, "image_size": 64, "patch_size": 8},
        ),
    ),
    Family(
        name="whisper",
        needs="transformers",
        narrow=True,
        build=from_transformers(
            "WhisperForConditionalGeneration",
            _spectra,
            vocab_size=VOCABULARY,
            d_model=128,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=384,
            decoder_ffn_dim=384,
            dropout=0.0,
            max_source_positions=120,
            max_target_positions=64,
            use_cache=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
    ),
    Family(name="wav2vec2", needs="transformers", build=from_transformers("Wav2Vec2ForCTC", _waves, **_SPEECH)),
    Family(name="hubert", needs="transformers", build=from_transformers("HubertForCTC", _waves, **_SPEECH)),
    Family(
        name="audio spectrogram transformer",
        needs="transformers",
        build=from_transformers(
            "ASTForAudioClassification",
            lambda: {"input_values": torch.randn(4, 96, 64), "labels": torch.arange(4)},
            num_labels=_CLASSES,
            patch_size=8,
            max_length=96,
            num_mel_bins=64,
            frequency_stride=8,
            time_stride=8,
            **_WIDE,
        ),
    ),
)
