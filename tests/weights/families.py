# SPDX-License-Identifier: Apache-2.0
"""Tiny configurations of every family and variant that the weight table has to tell apart."""

from __future__ import annotations

import dataclasses

from gemma.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig, T5Gemma2Config, T5GemmaConfig
from gemma.testing import tiny_config

# Every size differs from every other, so that no transposition can pass unseen. E = 48 is 4 heads of 12.
TOWER = SiglipVisionConfig(48, 80, 2, 4, 3, 56, 14)
ALONE = dataclasses.replace(TOWER, vision_use_head=True)
_GEMMA1 = tiny_config("gemma", num_hidden_layers=2, flax_vocab_rows=384)
_GEMMA2 = tiny_config("gemma2", num_hidden_layers=2, flax_vocab_rows=384)
_SIDE = dict(num_hidden_layers=2, model_type="t5_gemma_module", flax_vocab_rows=384)


def _paligemma(text: GemmaConfig) -> PaliGemmaConfig:
    text = dataclasses.replace(text, layer_pattern="G", sliding_window=None, flax_vocab_rows=256)
    return PaliGemmaConfig(
        TOWER, text, 310, text.vocab_size, projection_dim=text.hidden_size, hidden_size=text.hidden_size
    )


FAMILIES: dict[str, GemmaConfig | PaliGemmaConfig | T5GemmaConfig | SiglipVisionConfig] = {
    "gemma": _GEMMA1,
    "gemma-as-many-key-heads": dataclasses.replace(_GEMMA1, num_key_value_heads=4),
    "gemma2": _GEMMA2,
    "gemma2-transposed": dataclasses.replace(_GEMMA2, transpose_gating_einsum=True),
    "gemma2-untied": dataclasses.replace(_GEMMA2, tie_word_embeddings=False),
    "gemma3": tiny_config("gemma3", num_hidden_layers=3),
    "gemma3-vision": tiny_config("gemma3", num_hidden_layers=3, vision=TOWER, model_type="gemma3", flax_vocab_rows=256),
    "embeddinggemma": tiny_config("gemma3", num_hidden_layers=2, use_bidirectional_attention=True),
    "paligemma": _paligemma(_GEMMA1),
    "paligemma2": _paligemma(_GEMMA2),
    "t5gemma": T5GemmaConfig(tiny_config("gemma2", **_SIDE), tiny_config("gemma2", **_SIDE)),
    "t5gemma-unbalanced": T5GemmaConfig(
        tiny_config("gemma2", **_SIDE | dict(hidden_size=88, num_hidden_layers=3, num_key_value_heads=4)),
        tiny_config("gemma2", **_SIDE),
    ),
    "t5gemma2": T5Gemma2Config(
        tiny_config("gemma3", num_hidden_layers=2, vision=TOWER, model_type="t5gemma2"),
        tiny_config("gemma3", num_hidden_layers=3, model_type="t5gemma2"),
    ),
    "siglip": TOWER,
    "siglip-head": ALONE,
}
# Which formats hold a whole model of the family.
WHOLE = {
    "gemma": ("hf", "flax", "gguf", "ckpt", "sbs"),
    "gemma-as-many-key-heads": ("hf", "flax", "gguf", "ckpt", "sbs"),
    "gemma2": ("hf", "flax", "gguf", "ckpt", "sbs"),
    "gemma2-transposed": ("hf", "flax", "gguf", "ckpt", "sbs"),
    "gemma2-untied": ("hf", "gguf", "sbs"),
    "gemma3": ("hf", "flax", "gguf", "ckpt", "sbs"),
    "gemma3-vision": ("hf", "flax", "ckpt"),
    "embeddinggemma": ("hf", "flax", "gguf", "ckpt", "sbs"),
    "paligemma": ("hf", "npz"),
    "paligemma2": ("hf", "npz"),
    "t5gemma": ("hf", "flax"),
    "t5gemma-unbalanced": ("hf", "flax"),
    "t5gemma2": ("hf", "flax"),
    "siglip": ("hf", "flax", "npz"),
    "siglip-head": ("hf", "flax", "npz"),
}
PAIRS = [(family, format) for family, formats in WHOLE.items() for format in formats]
