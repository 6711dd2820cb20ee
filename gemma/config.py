# SPDX-License-Identifier: Apache-2.0
"""The only place where a size of the Gemma family is written down. Standard library only.

Holds the configuration classes and the presets; the decoder's class and the per-layer spec that every network, cache,
exporter and estimator consumes are stated in `_config_gemma.py`, and this is where to import them from. It does not
read `config.json` (that is `hf_config.py`) and knows no tensor names (that is `weights/`).

`hidden_size` is the model width D and `intermediate_size` the MLP width F, as in every `config.json`; the JAX API's
`hidden_dim` is F. Axis letters are those of docs/axes.md. Sources of the numbers: the published `config.json` files.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from gemma._config_gemma import (
    AltUpConfig,
    ExpertsConfig,
    GemmaConfig,
    LayerSpec,
    SiglipVisionConfig,
)
from gemma._config_t5gemma import T5Gemma2Config, T5GemmaConfig, encoder_layers
from gemma._validate import check_int, from_mapping
from gemma.errors import ConfigError

__all__ = [
    "ALIASES",
    "EMBEDDING_DENSE",
    "PRESETS",
    "AltUpConfig",
    "ExpertsConfig",
    "GemmaConfig",
    "LayerSpec",
    "PaliGemmaConfig",
    "SiglipVisionConfig",
    "T5Gemma2Config",
    "T5GemmaConfig",
    "encoder_layers",
    "preset",
    "preset_name",
    "text_only",
]


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
    """SigLIP, one linear projection and a Gemma text decoder. `text_config` and `vision_config` may be dictionaries."""

    vision_config: SiglipVisionConfig = SiglipVisionConfig()
    text_config: GemmaConfig = GemmaConfig()
    image_token_index: int = 257_152
    vocab_size: int = 257_216  # rows of the published table; the tokenizer ends at tokenizer_vocab_size
    projection_dim: int = 2048  # D of the text model
    hidden_size: int = 2048
    pad_token_id: int = 0
    ignore_index: int = -100
    tokenizer_vocab_size: int = 257_152  # 256,000 pieces, 1,024 locations, 128 segments; the image token is the next id

    def __post_init__(self):
        if isinstance(self.text_config, Mapping):
            object.__setattr__(self, "text_config", GemmaConfig.from_dict(self.text_config))
        if isinstance(self.vision_config, Mapping):
            object.__setattr__(self, "vision_config", SiglipVisionConfig.from_dict(self.vision_config))
        check_int(self, 1, 2**24, "vocab_size", "projection_dim", "hidden_size", "tokenizer_vocab_size")
        check_int(self, 0, 2**24, "image_token_index", "pad_token_id")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PaliGemmaConfig:
        return from_mapping(cls, values)

    @property
    def num_parameters(self) -> int:
        projector = self.vision_config.hidden_size * self.projection_dim + self.projection_dim
        return self.text_config.num_parameters + self.vision_config.num_parameters + projector


# A family is a base and what differs. Widths in the order L (layers), D, F, N, K, H.


def _sizes(L: int, D: int, F: int, N: int, K: int, H: int) -> dict[str, int]:
    heads = dict(num_attention_heads=N, num_key_value_heads=K, head_dim=H)
    return dict(num_hidden_layers=L, hidden_size=D, intermediate_size=F) | heads


_GEMMA1 = dict(model_type="gemma", vocab_size=256_000, flax_vocab_rows=256_128)
_CAPS = dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
_GEMMA2 = _GEMMA1 | dict(model_type="gemma2", layer_pattern="LG", sliding_window=4096, use_post_norms=True) | _CAPS
_GEMMA3 = dict(
    model_type="gemma3_text",
    vocab_size=262_144,
    layer_pattern="LLLLLG",
    sliding_window=512,
    max_position_embeddings=32_768,
    transpose_gating_einsum=True,
) | dict(rope_theta=1_000_000.0, rope_local_base_freq=10_000.0, use_post_norms=True, use_qk_norm=True)
_GEMMA3_VISION = _GEMMA3 | dict(
    model_type="gemma3",
    vocab_size=262_208,
    flax_vocab_rows=262_144,
    sliding_window=1024,
    rope_scaling_factor=8.0,
    max_position_embeddings=131_072,
    vision=SiglipVisionConfig(image_size=896),
)
# Norms multiply by w itself, queries are not scaled, values are normed, too.
_NEWER = _GEMMA3 | dict(norm_plus_one=False, query_pre_attn_scalar=1.0, use_value_norm=True)
_PLE = dict(hidden_size_per_layer_input=256, vocab_size_per_layer_input=262_144)
_GEMMA4 = _NEWER | dict(
    model_type="gemma4_text",
    max_position_embeddings=131_072,
    final_logit_softcapping=30.0,
    global_head_dim=512,
    partial_rotary_factor=0.25,
    use_layer_scale=True,
)
_GEMMA4_LARGE = _GEMMA4 | dict(sliding_window=1024, max_position_embeddings=262_144, attention_k_eq_v=True)


def _gemma3n(layers: int, width: int, shared: int) -> GemmaConfig:
    streams = dict(
        altup=AltUpConfig(), laurel_rank=64, activation_sparsity_pattern=(0.95,) * 10 + (0.0,) * (layers - 10)
    )
    base = _NEWER | dict(model_type="gemma3n_text", vocab_size=262_400, flax_vocab_rows=262_144, layer_pattern="LLLLG")
    base |= _PLE | streams | dict(num_kv_shared_layers=shared, final_logit_softcapping=30.0)
    return GemmaConfig(**base, **_sizes(layers, 2048, width, 8, 2, 256))


def _gemma4_e(pattern: str, shared: int, doubled: bool = False, **sizes: int) -> GemmaConfig:
    layers, width = sizes["num_hidden_layers"], sizes["intermediate_size"]
    widths = (width,) * (layers - shared) + (2 * width,) * shared if doubled else None
    shape = dict(layer_pattern=pattern, num_kv_shared_layers=shared, mlp_sizes=widths)
    return GemmaConfig(**_GEMMA4 | _PLE | shape, **sizes)


_2B, _7B = _sizes(18, 2048, 16_384, 8, 1, 256), _sizes(28, 3072, 24_576, 16, 16, 256)
_2_2B = _sizes(26, 2304, 9216, 8, 4, 256)
_2_9B = _sizes(42, 3584, 14_336, 16, 8, 256) | dict(transpose_gating_einsum=True)
_2_27B = _sizes(46, 4608, 36_864, 32, 16, 128) | dict(transpose_gating_einsum=True, query_pre_attn_scalar=144.0)

_TEXT = {
    "gemma_2b": GemmaConfig(**_GEMMA1, **_2B),
    "gemma_7b": GemmaConfig(**_GEMMA1, **_7B),
    "gemma2_2b": GemmaConfig(**_GEMMA2, **_2_2B),
    "gemma2_9b": GemmaConfig(**_GEMMA2 | _2_9B),
    "gemma2_27b": GemmaConfig(**_GEMMA2 | _2_27B),
    "gemma3_270m": GemmaConfig(**_GEMMA3, **_sizes(18, 640, 2048, 4, 1, 256)),
    "gemma3_1b": GemmaConfig(**_GEMMA3, **_sizes(26, 1152, 6912, 4, 1, 256)),
    "gemma3_4b": GemmaConfig(**_GEMMA3_VISION, **_sizes(34, 2560, 10_240, 8, 4, 256)),
    "gemma3_12b": GemmaConfig(**_GEMMA3_VISION, **_sizes(48, 3840, 15_360, 16, 8, 256)),
    "gemma3_27b": GemmaConfig(**_GEMMA3_VISION, **_sizes(62, 5376, 21_504, 32, 16, 128), query_pre_attn_scalar=168.0),
    "embeddinggemma_300m": GemmaConfig(
        **_GEMMA3 | dict(max_position_embeddings=2048, use_bidirectional_attention=True),
        **_sizes(24, 768, 1152, 3, 1, 256),
    ),
    "gemma3n_e2b": _gemma3n(30, 8192, shared=10),
    "gemma3n_e4b": _gemma3n(35, 16_384, shared=15),
    "gemma4_e2b": _gemma4_e("LLLLG", 20, **_sizes(35, 1536, 6144, 8, 1, 256), doubled=True),
    "gemma4_e4b": _gemma4_e("LLLLLG", 18, **_sizes(42, 2560, 10_240, 8, 2, 256)),
    "gemma4_31b": GemmaConfig(**_GEMMA4_LARGE, **_sizes(60, 5376, 21_504, 32, 16, 256), num_global_key_value_heads=4),
    "gemma4_26b_a4b": GemmaConfig(
        **_GEMMA4_LARGE,
        **_sizes(30, 2816, 2112, 16, 8, 256),
        num_global_key_value_heads=2,
        experts=ExpertsConfig(num_experts=128, top_k=8, intermediate_size=704),
    ),
}
# The dense layers that follow the pooling of EmbeddingGemma, by their output widths.
EMBEDDING_DENSE = (3072, 768)


def _paligemma(text: dict[str, Any], pixels: int) -> PaliGemmaConfig:
    # The published decoders have 257,216 rows and attend without a window (reference: the training code).
    rows = dict(vocab_size=257_216, flax_vocab_rows=257_152)
    config = GemmaConfig(**text | rows | dict(layer_pattern="G", sliding_window=None))
    width = config.hidden_size
    vision = SiglipVisionConfig(image_size=pixels, projection_dim=width)
    return PaliGemmaConfig(vision_config=vision, text_config=config, projection_dim=width, hidden_size=width)


_PALIGEMMA = {"paligemma_3b": _GEMMA1 | _2B, "paligemma2_3b": _GEMMA2 | _2_2B}
_PALIGEMMA |= {"paligemma2_10b": _GEMMA2 | _2_9B, "paligemma2_28b": _GEMMA2 | _2_27B}

_T5_SIDES = {
    "s": _sizes(8, 512, 1024, 8, 8, 64),
    "b": _sizes(12, 768, 2048, 12, 12, 64),
    "l": _sizes(24, 1024, 2816, 16, 16, 64),
    "ml": _sizes(26, 1152, 6912, 4, 4, 256),
    "xl": _sizes(24, 2048, 5120, 32, 32, 64),
    "2b": _2_2B,
    "9b": _2_9B,
}
_T5_PAIRS = ("s_s", "b_b", "l_l", "ml_ml", "xl_xl", "2b_2b", "9b_2b", "9b_9b")


def _t5gemma(encoder: str, decoder: str) -> T5GemmaConfig:
    base = _GEMMA2 | dict(model_type="t5_gemma_module")
    return T5GemmaConfig(*(GemmaConfig(**base | _T5_SIDES[side]) for side in (encoder, decoder)))


def _t5gemma2(size: str) -> T5Gemma2Config:
    decoder = dataclasses.replace(_TEXT[f"gemma3_{size}"], vision=None, model_type="t5gemma2", **_T5_2)
    rows = dict(eoi_token_index=256_000, image_token_index=256_001)
    return T5Gemma2Config(dataclasses.replace(decoder, vision=SiglipVisionConfig(image_size=896), **rows), decoder)


_T5_2 = dict(vocab_size=262_144, flax_vocab_rows=None, max_position_embeddings=131_072)
_T5_2_SIZES = ("270m", "1b", "4b")


PRESETS: dict[str, GemmaConfig | PaliGemmaConfig | T5GemmaConfig | T5Gemma2Config] = {
    **_TEXT,
    **{f"{name}_{px}": _paligemma(text, px) for name, text in _PALIGEMMA.items() for px in (224, 448, 896)},
    **{f"t5gemma_{pair}": _t5gemma(*pair.split("_")) for pair in _T5_PAIRS},
    **{f"t5gemma2_{size}_{size}": _t5gemma2(size) for size in _T5_2_SIZES},
}

# Published fine-tunes that are one of the presets in every size.
ALIASES: dict[str, str] = {
    **{f"codegemma_{size}": f"gemma_{size}" for size in ("2b", "7b")},
    **{f"shieldgemma_{size}": f"gemma2_{size}" for size in ("2b", "9b", "27b")},
    **{f"medgemma_{size}": f"gemma3_{size}" for size in ("4b", "27b")},
    **{f"translategemma_{size}": f"gemma3_{size}" for size in ("4b", "12b", "27b")},
    "shieldgemma2_4b": "gemma3_4b",
    "functiongemma_270m": "gemma3_270m",
}


def preset_name(name: str) -> str:
    """The preset that a name or alias stands for; dashes, dots and case do not matter ("Gemma-3-1B" is "gemma3_1b")."""
    key = name.strip().lower().replace("-", "_").replace(".", "_")
    for spelled in (key, re.sub(r"^gemma_(\d)n?_", lambda m: m[0].replace("_", "", 1), key)):
        spelled = ALIASES.get(spelled, spelled)
        if spelled in PRESETS:
            return spelled
    near = difflib.get_close_matches(key, [*PRESETS, *ALIASES], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the presets are: {', '.join(PRESETS)}"
    raise ConfigError(f"unknown model size {name!r}: {hint}")


def preset(name: str) -> GemmaConfig | PaliGemmaConfig | T5GemmaConfig | T5Gemma2Config:
    """The configuration of a preset or alias."""
    return PRESETS[preset_name(name)]


def text_only(config: GemmaConfig) -> GemmaConfig:
    """The same decoder without its vision tower."""
    return dataclasses.replace(config, vision=None)
