# SPDX-License-Identifier: Apache-2.0
"""The writers behind `hf_config.write_config`: dictionaries that transformers 4 and 5 both read.

Rotary settings are written in both spellings. Which class a decoder belongs to is decided by what it computes, never by
its `model_type`. Reading is in `_hf_read.py`.
"""

from __future__ import annotations

from typing import Any

from gemma._hf_read import OWN_KEY, SIZES
from gemma.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig, T5GemmaConfig
from gemma.errors import ConfigError

_CLASSES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
COPIED = (
    *SIZES,
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
)


def text_kind(config: GemmaConfig) -> str:
    """The `model_type` of a decoder by what its layers do."""
    kinds = {(False, False): "gemma", (True, False): "gemma2", (True, True): "gemma3_text"}
    kind = kinds.get((config.use_post_norms, config.use_qk_norm))
    if kind is None:
        raise ConfigError("use_qk_norm without use_post_norms: no class of transformers has such layers")
    return kind


def write_text(config: GemmaConfig, kind: str) -> dict[str, Any]:
    """The text section of any generation."""
    values: dict[str, Any] = dict(model_type=kind) | {name: getattr(config, name) for name in COPIED}
    values["rms_norm_eps"], values["attention_dropout"] = float(config.rms_norm_eps), float(config.attention_dropout)
    values["eos_token_id"] = (
        list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id
    )
    values["hidden_act" if kind == "gemma" else "hidden_activation"] = "gelu_pytorch_tanh"
    values |= _rope(config, kind)
    if config.use_bidirectional_attention or kind == "gemma3_text":
        values["use_bidirectional_attention"] = config.use_bidirectional_attention
    if kind != "gemma":
        values |= _gemma2_values(config, kind)
    return values


def layer_types(config: GemmaConfig) -> list[str]:
    """transformers' word for the kind of each layer."""
    words = {"local": "sliding_attention", "global": "full_attention"}
    return [words[spec.attention] for spec in config.layers]


def _rope(config: GemmaConfig, kind: str) -> dict[str, Any]:
    base, factor = float(config.rope_theta), float(config.rope_scaling_factor)
    entry: dict[str, Any] = dict(rope_type="default", rope_theta=base)
    if factor != 1.0:
        entry |= dict(rope_type="linear", factor=factor)
    old = dict(rope_theta=base, rope_scaling=None if factor == 1.0 else dict(rope_type="linear", factor=factor))
    if kind != "gemma3_text":
        return old | dict(rope_parameters=entry)
    local = base if config.rope_local_base_freq is None else float(config.rope_local_base_freq)
    both = dict(full_attention=entry, sliding_attention=dict(rope_type="default", rope_theta=local))
    return old | dict(rope_local_base_freq=local, rope_parameters=both)


def _gemma2_values(config: GemmaConfig, kind: str) -> dict[str, Any]:
    scalar = config.head_dim if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
    if float(scalar) != int(scalar):
        raise ConfigError(f"query_pre_attn_scalar: transformers stores a whole number, got {scalar!r}")
    caps = {name: getattr(config, name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    values = {name: None if cap is None else float(cap) for name, cap in caps.items()}
    values |= dict(query_pre_attn_scalar=int(scalar), layer_types=layer_types(config))
    # transformers builds the local mask even if no layer uses it, so it wants a number.
    window = config.sliding_window
    values["sliding_window"] = config.max_position_embeddings if window is None else window
    period = len(config.layer_pattern)
    if kind == "gemma3_text" and config.layer_pattern == "L" * (period - 1) + "G":
        values["sliding_window_pattern"] = period
    return values


def write_vision(config: SiglipVisionConfig) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
    names += ("image_size", "patch_size", "vision_use_head")
    values: dict[str, Any] = dict(model_type="siglip_vision_model") | {name: getattr(config, name) for name in names}
    values |= dict(layer_norm_eps=float(config.layer_norm_eps), attention_dropout=float(config.attention_dropout))
    values["hidden_act"] = "gelu_pytorch_tanh"
    optional = {name: getattr(config, name) for name in ("num_image_tokens", "projection_dim")}
    return values | {name: value for name, value in optional.items() if value is not None}


def _ids(text: dict[str, Any]) -> dict[str, Any]:
    return {name: text[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")}


def write_gemma(config: GemmaConfig) -> dict[str, Any]:
    kind = text_kind(config)
    text = write_text(config, kind)
    if config.vision is None:
        name = "Gemma3TextModel" if kind == "gemma3_text" and config.use_bidirectional_attention else _CLASSES[kind]
        return dict(architectures=[name]) | text
    if kind != "gemma3_text":
        raise ConfigError(f"vision: only Gemma 3 has image tokens in this form, not {kind}")
    names = ("mm_tokens_per_image", "image_token_index", "boi_token_index", "eoi_token_index")
    top = dict(architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3")
    top |= {name: getattr(config, name) for name in names} | _ids(text)
    return top | dict(text_config=text, vision_config=write_vision(config.vision))


def write_paligemma(config: PaliGemmaConfig) -> dict[str, Any]:
    kind = text_kind(config.text_config)
    if kind == "gemma3_text":
        raise ConfigError("text_config: a PaliGemma decoder is a Gemma 1 or Gemma 2, not a Gemma 3")
    text = write_text(config.text_config, kind) | dict(num_image_tokens=config.vision_config.num_patches)
    names = ("image_token_index", "vocab_size", "projection_dim", "hidden_size", "ignore_index")
    names += ("tokenizer_vocab_size",)
    top = dict(architectures=["PaliGemmaForConditionalGeneration"], model_type="paligemma")
    top |= {name: getattr(config, name) for name in names} | _ids(text) | dict(pad_token_id=config.pad_token_id)
    return top | dict(text_config=text, vision_config=write_vision(config.vision_config))


def write_t5gemma(config: T5GemmaConfig) -> dict[str, Any]:
    sides = {}
    for name in ("encoder", "decoder"):
        side = getattr(config, name)
        if text_kind(side) != "gemma2":
            raise ConfigError(f"{name}: both sides of a T5Gemma have Gemma 2 layers, not {text_kind(side)}")
        sides[name] = write_text(side, "t5_gemma_module") | dict(is_decoder=name == "decoder", dropout_rate=0.0)
    sides["decoder"]["cross_attention_hidden_size"] = config.encoder.hidden_size
    top = dict(architectures=["T5GemmaForConditionalGeneration"], model_type="t5gemma", is_encoder_decoder=True)
    top |= dict(vocab_size=config.vocab_size, dropout_rate=0.0, classifier_dropout_rate=0.0, attention_dropout=0.0)
    return top | _ids(sides["decoder"]) | dict(pad_token_id=config.pad_token_id) | sides


def add_own(section: dict[str, Any], fields: dict[str, Any]) -> None:
    """Puts what config.json has no word for under our own key, which transformers passes over."""
    if fields:
        section[OWN_KEY] = fields
