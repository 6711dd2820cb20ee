# SPDX-License-Identifier: Apache-2.0
"""The only place where a size of the Gemma family is written down. Standard library only.

Holds the configuration classes, the presets and the per-layer spec that every network, cache, exporter and estimator
consumes. It does not read `config.json` (that is `hf_config.py`) and knows no tensor names (that is `weights/`).

`hidden_size` is the model width D and `intermediate_size` the MLP width F, as in every `config.json`; the JAX API's
`hidden_dim` is F. Axis letters are those of docs/axes.md. Sources of the numbers: the published `config.json` files.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal

from gemma._validate import check_int, check_number, from_mapping
from gemma.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one layer does, derived once from a configuration; nothing else decides it a second time."""

    index: int
    attention: Literal["local", "global"]
    window: int | None  # keys a query may see, itself included; None: all of them
    bidirectional: bool  # True: the future too, and local layers see |q - k| < window // 2 + 1
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    mlp_size: int  # F
    rope_base: float
    rope_scale: float  # positions are divided by it
    rope_fraction: float  # share of the head's pairs that rotate
    query_scale: float  # queries are multiplied by it
    attn_softcap: float | None
    qk_norm: bool
    kv_source: int  # the layer whose K and V are attended to; its own index unless layers share them

    def cache_length(self, length: int) -> int:
        """Cache slots needed for `length` tokens: a local layer keeps a ring of its window."""
        return length if self.window is None or self.bidirectional else min(length, self.window)


@dataclasses.dataclass(frozen=True)
class SiglipVisionConfig:
    """A SigLIP vision tower; the defaults are So400m/14 at 224 pixels, without a pooling head."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224  # pixels, square
    patch_size: int = 14  # pixels, square
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    num_image_tokens: int | None = None  # None: the number of patches
    projection_dim: int | None = None  # PaliGemma's files keep the text width here
    vision_use_head: bool = False  # True: stand-alone SigLIP with its attention pooling head

    def __post_init__(self):
        check_int(self, 1, 2**20, "hidden_size", "intermediate_size", "num_attention_heads", "num_image_tokens")
        check_int(self, 1, 2**20, "num_channels", "image_size", "patch_size", "projection_dim")
        check_int(self, 1, 1024, "num_hidden_layers")
        check_number(self, 1e-12, 1.0, "layer_norm_eps")
        check_number(self, 0.0, 1.0, "attention_dropout")
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SiglipVisionConfig:
        return from_mapping(cls, values)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_parameters(self) -> int:
        d, f = self.hidden_size, self.intermediate_size
        block = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
        patches = self.num_channels * self.patch_size**2 * d + d
        head = (block - 2 * d + d) if self.vision_use_head else 0  # a probe, one attention, one norm, one MLP
        return patches + self.num_patches * d + self.num_hidden_layers * block + 2 * d + head


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """A Gemma decoder, of any generation; the defaults are those of Gemma 1.

    `layer_pattern` is repeated to `num_hidden_layers`: "L" is local (sliding window), "G" global attention.
    `vision` makes it multimodal in the manner of Gemma 3.
    """

    vocab_size: int = 256_000  # V, rows of the embedding in the published Hugging Face checkpoint
    hidden_size: int = 3072  # D, the model width
    intermediate_size: int = 24_576  # F, the MLP width
    num_hidden_layers: int = 28
    num_attention_heads: int = 16  # N
    num_key_value_heads: int = 16  # K
    head_dim: int = 256  # H
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    model_type: str = "gemma"  # config.json's tag; names the generation, decides nothing
    layer_pattern: str = "G"
    sliding_window: int | None = None  # keys a local query may see, itself included
    rope_theta: float = 10_000.0  # base of global layers
    rope_local_base_freq: float | None = None  # base of local layers; None: rope_theta
    rope_scaling_factor: float = 1.0  # divides the positions of global layers
    query_pre_attn_scalar: float | None = None  # queries are scaled by its -0.5 power; None: head_dim
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    use_post_norms: bool = False  # norms after attention and after the MLP
    use_qk_norm: bool = False
    use_bidirectional_attention: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    hidden_activation: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int | tuple[int, ...] = 1
    flax_vocab_rows: int | None = None  # rows of the JAX package's table, where they differ
    transpose_gating_einsum: bool = False  # the JAX gate/up kernel is [2, F, D] instead of [2, D, F]
    vision: SiglipVisionConfig | None = None
    mm_tokens_per_image: int = 256
    image_token_index: int = 262_144
    boi_token_index: int = 255_999
    eoi_token_index: int = 256_000

    def __post_init__(self):
        check_int(self, 1, 2**24, "vocab_size", "hidden_size", "intermediate_size", "flax_vocab_rows")
        check_int(self, 1, 4096, "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        check_int(self, 1, 2**27, "max_position_embeddings", "sliding_window")
        check_int(self, 0, 2**24, "pad_token_id", "bos_token_id", "image_token_index", "mm_tokens_per_image")
        check_int(self, 0, 2**24, "boi_token_index", "eoi_token_index")
        check_number(self, 1.0, 1e12, "rope_theta", "rope_local_base_freq", "rope_scaling_factor")
        check_number(self, 1e-12, 1.0, "rms_norm_eps")
        check_number(self, 1e-6, 1e6, "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"{self.num_attention_heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}"
            raise ConfigError(f"num_attention_heads {heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim: expected an even number (rotary pairs), got {self.head_dim}")
        if not self.layer_pattern or set(self.layer_pattern) - {"L", "G"}:
            raise ConfigError(f'layer_pattern: expected letters L and G, such as "LLLLLG", got {self.layer_pattern!r}')
        if "L" in self.layer_pattern and self.sliding_window is None:
            raise ConfigError("layer_pattern has local layers (L): sliding_window must be set")
        fixed = dict(attention_bias=False, attention_dropout=0.0, hidden_activation="gelu_pytorch_tanh")
        for name, only in fixed.items():
            if getattr(self, name) != only:
                raise ConfigError(f"{name}: every Gemma has {only!r}, got {getattr(self, name)!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GemmaConfig:
        return from_mapping(cls, values)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """`eos_token_id` as a tuple; the chat format adds its end-of-turn ids (`chat.py`)."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def table_rows(self) -> int:
        """Rows of the embedding table in the JAX package's checkpoints."""
        return self.vocab_size if self.flax_vocab_rows is None else self.flax_vocab_rows

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        pattern = self.layer_pattern * (self.num_hidden_layers // len(self.layer_pattern) + 1)
        return tuple(self._layer(i, pattern[i] == "L") for i in range(self.num_hidden_layers))

    def _layer(self, index: int, local: bool) -> LayerSpec:
        scalar = self.head_dim if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar
        local_base = self.rope_theta if self.rope_local_base_freq is None else self.rope_local_base_freq
        return LayerSpec(
            index=index,
            attention="local" if local else "global",
            window=self.sliding_window if local else None,
            bidirectional=self.use_bidirectional_attention,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            mlp_size=self.intermediate_size,
            rope_base=local_base if local else self.rope_theta,
            rope_scale=1.0 if local else self.rope_scaling_factor,
            rope_fraction=1.0,
            query_scale=float(scalar) ** -0.5,
            attn_softcap=self.attn_logit_softcapping,
            qk_norm=self.use_qk_norm,
            kv_source=index,
        )

    def cache_bytes(self, length: int, bytes_per_value: int = 2) -> int:
        """Bytes of one sequence's windowed K and V cache for `length` tokens, exactly."""
        own = (s for s in self.layers if s.kv_source == s.index)
        return sum(s.cache_length(length) * 2 * s.num_kv_heads * s.head_dim for s in own) * bytes_per_value

    @property
    def num_parameters(self) -> int:
        """Parameters of the published Hugging Face checkpoint, a tied head counted once."""
        d = self.hidden_size
        total = self.vocab_size * d * (1 if self.tie_word_embeddings else 2) + d
        for s in self.layers:
            total += 2 * d * s.num_heads * s.head_dim + 2 * d * s.num_kv_heads * s.head_dim + 3 * d * s.mlp_size
            total += d * (4 if self.use_post_norms else 2) + (2 * s.head_dim if s.qk_norm else 0)
        if self.vision is not None:
            total += self.vision.num_parameters + self.vision.hidden_size * (
                1 + d
            )  # tower, soft-token norm, projection
        return total


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


@dataclasses.dataclass(frozen=True)
class T5GemmaConfig:
    """An encoder and a decoder of Gemma blocks; decoder layers add cross-attention over the encoder's width."""

    encoder: GemmaConfig
    decoder: GemmaConfig
    pad_token_id: int = 0

    def __post_init__(self):
        for side in ("encoder", "decoder"):
            if isinstance(getattr(self, side), Mapping):
                object.__setattr__(self, side, GemmaConfig.from_dict(getattr(self, side)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> T5GemmaConfig:
        return from_mapping(cls, values)

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def num_parameters(self) -> int:
        d, width = self.decoder.hidden_size, self.encoder.hidden_size
        cross = sum(
            2 * d * s.num_heads * s.head_dim + 2 * width * s.num_kv_heads * s.head_dim + 2 * d
            for s in self.decoder.layers
        )
        return self.encoder.num_parameters + self.decoder.num_parameters + cross


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
}


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


PRESETS: dict[str, GemmaConfig | PaliGemmaConfig | T5GemmaConfig] = {
    **_TEXT,
    **{f"{name}_{px}": _paligemma(text, px) for name, text in _PALIGEMMA.items() for px in (224, 448, 896)},
    **{f"t5gemma_{pair}": _t5gemma(*pair.split("_")) for pair in _T5_PAIRS},
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
    for spelled in (key, key.replace("gemma_2_", "gemma2_").replace("gemma_3_", "gemma3_")):
        spelled = ALIASES.get(spelled, spelled)
        if spelled in PRESETS:
            return spelled
    near = difflib.get_close_matches(key, [*PRESETS, *ALIASES], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the presets are: {', '.join(PRESETS)}"
    raise ConfigError(f"unknown model size {name!r}: {hint}")


def preset(name: str) -> GemmaConfig | PaliGemmaConfig | T5GemmaConfig:
    """The configuration of a preset or alias."""
    return PRESETS[preset_name(name)]


def text_only(config: GemmaConfig) -> GemmaConfig:
    """The same decoder without its vision tower."""
    return dataclasses.replace(config, vision=None)
