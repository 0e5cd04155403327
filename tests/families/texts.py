"""Language models of Hugging Face's, with random weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.families.family import VOCABULARY, Build, Family, from_transformers, mean_square

_BATCH, _TOKENS = 4, 160
_WIDE = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 384}
_TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _labelled() -> Mapping[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (_BATCH, _TOKENS))
    return {"input_ids": ids, "labels": ids}


def _masked() -> Mapping[str, Tensor]:
    mask = torch.ones(_BATCH, _TOKENS, dtype=torch.int64)
    mask[: _BATCH // 2, _TOKENS - 24 :] = 0
    return {**_labelled(), "attention_mask": mask}


def _unlabelled() -> Mapping[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (_BATCH, _TOKENS))}


def _decoder(kind: str, batch: Any = _labelled, **settings: Any) -> Build:
    return from_transformers(kind, batch, vocab_size=VOCABULARY, use_cache=False, **_TOKEN_IDS, **settings)


def _encoder(kind: str, **settings: Any) -> Build:
    return from_transformers(
        kind, _masked, vocab_size=VOCABULARY, max_position_embeddings=_TOKENS + 8, **_NO_DROPOUT, **settings
    )


def _sequence_to_sequence(kind: str, **settings: Any) -> Build:
    return from_transformers(kind, _labelled, vocab_size=VOCABULARY, use_cache=False, **settings)


_BART = {
    "d_model": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 384,
    "decoder_ffn_dim": 384,
    "dropout": 0.0,
    "max_position_embeddings": _TOKENS + 8,
}

FAMILIES = (
    Family(
        name="llama",
        needs="transformers",
        narrow=True,
        build=_decoder("LlamaForCausalLM", num_key_value_heads=2, **_WIDE),
    ),
    Family(
        name="llama, padded",
        needs="transformers",
        build=_decoder("LlamaForCausalLM", _masked, num_key_value_heads=2, **_WIDE),
    ),
    Family(
        name="mistral",
        needs="transformers",
        build=_decoder("MistralForCausalLM", num_key_value_heads=2, sliding_window=64, **_WIDE),
    ),
    Family(
        name="mixtral",
        needs="transformers",
        build=_decoder("MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4, **_WIDE),
    ),
    Family(
        name="qwen2",
        needs="transformers",
        narrow=True,
        build=_decoder("Qwen2ForCausalLM", num_key_value_heads=2, **_WIDE),
    ),
    Family(
        name="qwen3",
        needs="transformers",
        build=_decoder("Qwen3ForCausalLM", num_key_value_heads=2, head_dim=32, **_WIDE),
    ),
    Family(
        name="gemma2",
        needs="transformers",
        build=_decoder("Gemma2ForCausalLM", num_key_value_heads=2, head_dim=32, **_WIDE),
    ),
    Family(name="phi", needs="transformers", build=_decoder("PhiForCausalLM", **_WIDE)),
    Family(
        name="gpt2",
        needs="transformers",
        narrow=True,
        build=_decoder(
            "GPT2LMHeadModel", n_embd=128, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        ),
    ),
    Family(
        name="gpt2, attention by hand",
        needs="transformers",
        build=_decoder(
            "GPT2LMHeadModel",
            n_embd=128,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
        ),
    ),
    Family(
        name="gpt2, dropout",
        needs="transformers",
        build=_decoder("GPT2LMHeadModel", n_embd=128, n_layer=2, n_head=4, attn_implementation="eager"),
    ),
    Family(name="gpt-neox", needs="transformers", build=_decoder("GPTNeoXForCausalLM", **_WIDE)),
    Family(
        name="gpt-j",
        needs="transformers",
        build=_decoder("GPTJForCausalLM", n_embd=128, n_layer=2, n_head=4, rotary_dim=16, n_positions=_TOKENS),
    ),
    Family(
        name="opt",
        needs="transformers",
        build=_decoder(
            "OPTForCausalLM",
            hidden_size=128,
            word_embed_proj_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=384,
            dropout=0.0,
        ),
    ),
    Family(
        name="bloom", needs="transformers", build=_decoder("BloomForCausalLM", hidden_size=128, n_layer=2, n_head=4)
    ),
    Family(
        name="mamba",
        needs="transformers",
        build=from_transformers(
            "MambaForCausalLM",
            lambda: {key: value[:, :48] for key, value in _labelled().items()},
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=1,
            use_cache=False,
        ),
    ),
    Family(name="bert", needs="transformers", narrow=True, quick=True, build=_encoder("BertForMaskedLM", **_WIDE)),
    Family(name="roberta", needs="transformers", build=_encoder("RobertaForMaskedLM", **_WIDE)),
    Family(
        name="distilbert",
        needs="transformers",
        build=from_transformers(
            "DistilBertForMaskedLM",
            _masked,
            vocab_size=VOCABULARY,
            dim=128,
            n_layers=2,
            n_heads=4,
            hidden_dim=384,
            dropout=0.0,
            attention_dropout=0.0,
        ),
    ),
    Family(
        name="albert",
        needs="transformers",
        build=_encoder(
            "AlbertForMaskedLM",
            embedding_size=64,
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=384,
        ),
    ),
    Family(name="electra", needs="transformers", build=_encoder("ElectraForMaskedLM", embedding_size=64, **_WIDE)),
    Family(
        name="deberta-v2",
        needs="transformers",
        build=_encoder(
            "DebertaV2ForMaskedLM", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=32, **_WIDE
        ),
    ),
    Family(name="mpnet", needs="transformers", build=_encoder("MPNetForMaskedLM", **_WIDE)),
    Family(
        name="perceiver",
        needs="transformers",
        build=from_transformers(
            "PerceiverForMaskedLM",
            _masked,
            vocab_size=VOCABULARY,
            max_position_embeddings=_TOKENS,
            d_model=128,
            d_latents=128,
            num_latents=128,
            num_blocks=1,
            num_self_attends_per_block=2,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
            qk_channels=128,
            v_channels=128,
            attention_probs_dropout_prob=0.0,
        ),
    ),
    Family(
        name="t5",
        needs="transformers",
        narrow=True,
        build=_sequence_to_sequence(
            "T5ForConditionalGeneration",
            d_model=128,
            d_kv=32,
            d_ff=384,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
    ),
    Family(name="bart", needs="transformers", build=_sequence_to_sequence("BartForConditionalGeneration", **_BART)),
    Family(
        name="pegasus",
        needs="transformers",
        build=_sequence_to_sequence("PegasusForConditionalGeneration", decoder_start_token_id=0, **_BART),
    ),
    Family(
        name="fnet",
        needs="transformers",
        build=from_transformers(
            "FNetForMaskedLM",
            _labelled,
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_hidden_layers=2,
            intermediate_size=384,
            hidden_dropout_prob=0.0,
            max_position_embeddings=_TOKENS,
        ),
    ),
    Family(
        name="openai-gpt, no loss",
        needs="transformers",
        build=from_transformers(
            "OpenAIGPTModel",
            _unlabelled,
            mean_square,
            vocab_size=VOCABULARY,
            n_embd=128,
            n_layer=2,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            n_positions=_TOKENS,
        ),
    ),
)
