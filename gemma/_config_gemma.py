# SPDX-License-Identifier: Apache-2.0
"""The decoder's configuration and the per-layer spec that is derived from it. Import both from `gemma.config`.

The presets and the models that are made of several parts (PaliGemma, T5Gemma) are in `config.py`. A trait that layers
can have is a field of `LayerSpec`, set in `_layer_of`; networks, caches, the weight table and the exporters read it
there. Axis letters are those of docs/axes.md.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

from gemma._validate import check_int, check_number, from_mapping
from gemma.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class AltUpConfig:
    """The streams of Gemma 3n: each layer computes one of them and predicts the others from it."""

    num_inputs: int = 4  # streams
    active_idx: int = 0  # the one that a layer computes
    coef_clip: float | None = 120.0  # most a coefficient may be, either way
    correct_scale: bool = True  # the computed stream is scaled before the per-layer inputs gate it

    def __post_init__(self):
        check_int(self, 2, 26, "num_inputs")
        check_int(self, 0, self.num_inputs - 1, "active_idx")
        check_number(self, 1e-6, 1e9, "coef_clip")


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """The experts of Gemma 4 26B-A4B, which compute beside each layer's dense MLP."""

    num_experts: int
    top_k: int  # experts that a token uses
    intermediate_size: int  # MLP width of one expert

    def __post_init__(self):
        check_int(self, 1, 2**16, "num_experts", "intermediate_size")
        check_int(self, 1, self.num_experts, "top_k")


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
    reach: tuple[int, int] | None = None  # positions seen before and after the own one; None: as window says
    value_norm: bool = False  # RMSNorm without weight over H of values
    keys_as_values: bool = False  # values are the projected keys, before their norm and RoPE
    norm_plus_one: bool = True  # norms multiply by 1 + weight; False: by the weight itself
    mlp_sparsity: float = 0.0  # share of the gate's values that are cut off before the GELU
    laurel_rank: int | None = None  # inner width of a linear branch beside attention
    altup: AltUpConfig | None = None
    per_layer_input: int | None = None  # width of what a layer gets from the per-layer table
    layer_scale: bool = False  # the result is multiplied by one learned number
    experts: ExpertsConfig | None = None

    @property
    def shares_kv(self) -> bool:
        """Whether it looks at another layer's keys and values and has none itself."""
        return self.kv_source != self.index

    @property
    def fused_qkv(self) -> bool:
        """Whether the JAX trees hold q, k and v in one array: there are as many key heads as heads."""
        return self.num_heads == self.num_kv_heads and not (self.shares_kv or self.keys_as_values)

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
    norm_plus_one: bool = True  # norms multiply by 1 + weight; False, from Gemma 3n on: by the weight itself
    use_value_norm: bool = False  # a norm without weight on the values
    global_head_dim: int | None = None  # H of global layers; None: head_dim
    num_global_key_value_heads: int | None = None  # K of global layers; None: num_key_value_heads
    attention_k_eq_v: bool = False  # global layers have no values of their own: the projected keys are
    partial_rotary_factor: float = 1.0  # share of the pairs that rotate on global layers
    num_kv_shared_layers: int = 0  # so many last layers use K and V of the last layer of their kind before them
    mlp_sizes: tuple[int, ...] | None = None  # F of each layer, where they differ; None: intermediate_size
    activation_sparsity_pattern: tuple[float, ...] = ()  # of each layer's MLP; (): none is sparse
    laurel_rank: int | None = None
    altup: AltUpConfig | None = None
    hidden_size_per_layer_input: int | None = None  # width of the per-layer embeddings; None: there are none
    vocab_size_per_layer_input: int | None = None  # rows of their table
    use_layer_scale: bool = False
    experts: ExpertsConfig | None = None
    embedding_dense: tuple[int, ...] = ()  # EmbeddingGemma: widths of the dense layers that follow the pooling

    def __post_init__(self):
        _nest(self, altup=AltUpConfig, experts=ExpertsConfig)
        check_int(self, 1, 2**24, "vocab_size", "hidden_size", "intermediate_size", "flax_vocab_rows")
        check_int(self, 1, 4096, "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
        check_int(self, 1, 2**27, "max_position_embeddings", "sliding_window")
        check_int(self, 0, 2**24, "pad_token_id", "bos_token_id", "image_token_index", "mm_tokens_per_image")
        check_int(self, 0, 2**24, "boi_token_index", "eoi_token_index")
        check_number(self, 1.0, 1e12, "rope_theta", "rope_local_base_freq", "rope_scaling_factor")
        check_number(self, 1e-12, 1.0, "rms_norm_eps")
        check_number(self, 1e-6, 1e6, "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
        _check_newer(self)
        for name in ("eos_token_id", "mlp_sizes", "activation_sparsity_pattern", "embedding_dense"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
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
        return tuple(_layer_of(self, i, pattern[: self.num_hidden_layers]) for i in range(self.num_hidden_layers))

    @property
    def is_classic(self) -> bool:
        """Whether every layer is of a kind that Gemma 1 to 3 have, which is all that the PyTorch models and the formats
        GGUF, .ckpt and .sbs know. False for Gemma 3n and 4."""
        newer = (self.use_value_norm, self.global_head_dim, self.num_global_key_value_heads, self.attention_k_eq_v)
        newer += (self.num_kv_shared_layers, self.mlp_sizes, self.activation_sparsity_pattern, self.laurel_rank)
        newer += (self.altup, self.hidden_size_per_layer_input, self.use_layer_scale, self.experts)
        return self.norm_plus_one and self.partial_rotary_factor == 1.0 and not any(newer)

    def cache_bytes(self, length: int, bytes_per_value: int = 2) -> int:
        """Bytes of one sequence's windowed K and V cache for `length` tokens, exactly."""
        own = (s for s in self.layers if s.kv_source == s.index)
        return sum(s.cache_length(length) * 2 * s.num_kv_heads * s.head_dim for s in own) * bytes_per_value

    @property
    def num_parameters(self) -> int:
        """Parameters of the published Hugging Face checkpoint, a tied head counted once."""
        d = self.hidden_size
        total = self.vocab_size * d * (1 if self.tie_word_embeddings else 2) + d
        total += sum(_layer_parameters(self, spec) for spec in self.layers)
        if self.altup is not None:
            total += 2 * (self.altup.num_inputs - 1) * d * d  # into the streams and out of them
        if self.hidden_size_per_layer_input:
            p, count = self.hidden_size_per_layer_input, self.num_hidden_layers
            total += (self.vocab_size_per_layer_input or self.vocab_size) * count * p + d * count * p + p
        if self.vision is not None:  # tower, soft-token norm, projection
            total += self.vision.num_parameters + self.vision.hidden_size * (1 + d)
        widths = (d, *self.embedding_dense)
        return total + sum(a * b for a, b in itertools.pairwise(widths))


def _nest(config: Any, **kinds: type) -> None:
    """Makes dictionaries in these fields the classes that they stand for."""
    for name, kind in kinds.items():
        if isinstance(getattr(config, name), Mapping):
            object.__setattr__(config, name, from_mapping(kind, getattr(config, name)))


def _check_newer(config: GemmaConfig) -> None:
    """The checks of what Gemma 3n and 4 brought."""
    check_int(config, 1, 4096, "global_head_dim", "num_global_key_value_heads")
    check_int(config, 1, 2**20, "laurel_rank", "hidden_size_per_layer_input")
    check_int(config, 1, 2**24, "vocab_size_per_layer_input")
    check_int(config, 0, config.num_hidden_layers - 1, "num_kv_shared_layers")
    check_number(config, 0.0, 1.0, "partial_rotary_factor")
    for name, high in (("mlp_sizes", 2**24), ("activation_sparsity_pattern", 1.0), ("embedding_dense", 2**20)):
        values = getattr(config, name) or ()
        numbers = isinstance(values, (tuple, list)) and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
        )
        whole = name == "activation_sparsity_pattern" or (numbers and all(type(v) is int and v > 0 for v in values))
        if not numbers or not whole or not all(0 <= v <= high for v in values):
            raise ConfigError(f"{name}: expected numbers in 0..{high:g}, got {values!r:.80}")
        if values and name != "embedding_dense" and len(values) != config.num_hidden_layers:
            raise ConfigError(
                f"{name}: expected {config.num_hidden_layers} numbers (num_hidden_layers), got {len(values)}"
            )
    if 1.0 in config.activation_sparsity_pattern:
        raise ConfigError("activation_sparsity_pattern: a share of 1 would cut everything off; expected less")
    heads, dim = config.num_global_key_value_heads, config.global_head_dim
    if heads is not None and config.num_attention_heads % heads:
        raise ConfigError(
            f"num_global_key_value_heads: expected a divisor of {config.num_attention_heads}, got {heads}"
        )
    if dim is not None and dim % 2:
        raise ConfigError(f"global_head_dim: expected an even number (rotary pairs), got {dim}")
    if config.altup is not None and not config.hidden_size_per_layer_input:
        raise ConfigError("altup: its streams are fed by per-layer inputs: hidden_size_per_layer_input must be set")
    if config.num_kv_shared_layers and isinstance(config.layer_pattern, str) and config.layer_pattern:
        letters = (config.layer_pattern * config.num_hidden_layers)[: config.num_hidden_layers]
        own = config.num_hidden_layers - config.num_kv_shared_layers
        if set(letters[own:]) - set(letters[:own]):
            raise ConfigError(
                f"num_kv_shared_layers: {config.num_kv_shared_layers} leave no layer of each kind whose keys and values "
                f"the others could use; the layers are {letters}"
            )


def _layer_of(config: GemmaConfig, index: int, letters: str) -> LayerSpec:
    """What layer `index` does; `letters` are the kinds of all layers."""
    local = letters[index] == "L"
    dim, heads = config.head_dim, config.num_key_value_heads
    if not local:
        dim, heads = config.global_head_dim or dim, config.num_global_key_value_heads or heads
    scalar = config.head_dim if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
    local_base = config.rope_theta if config.rope_local_base_freq is None else config.rope_local_base_freq
    own = config.num_hidden_layers - config.num_kv_shared_layers
    return LayerSpec(
        index=index,
        attention="local" if local else "global",
        window=config.sliding_window if local else None,
        bidirectional=config.use_bidirectional_attention,
        num_heads=config.num_attention_heads,
        num_kv_heads=heads,
        head_dim=dim,
        mlp_size=config.intermediate_size if config.mlp_sizes is None else config.mlp_sizes[index],
        rope_base=local_base if local else config.rope_theta,
        rope_scale=1.0 if local else config.rope_scaling_factor,
        rope_fraction=1.0 if local else config.partial_rotary_factor,
        query_scale=float(scalar) ** -0.5,
        attn_softcap=config.attn_logit_softcapping,
        qk_norm=config.use_qk_norm,
        kv_source=index if index < own else letters.rindex(letters[index], 0, own),
        value_norm=config.use_value_norm,
        keys_as_values=config.attention_k_eq_v and not local,
        norm_plus_one=config.norm_plus_one,
        mlp_sparsity=config.activation_sparsity_pattern[index] if config.activation_sparsity_pattern else 0.0,
        laurel_rank=config.laurel_rank,
        altup=config.altup,
        per_layer_input=config.hidden_size_per_layer_input,
        layer_scale=config.use_layer_scale,
        experts=config.experts,
    )


def _layer_parameters(config: GemmaConfig, s: LayerSpec) -> int:
    d, keys = config.hidden_size, s.num_kv_heads * s.head_dim
    total = 2 * d * s.num_heads * s.head_dim + 3 * d * s.mlp_size + d * (4 if config.use_post_norms else 2)
    total += s.head_dim if s.qk_norm else 0
    if not s.shares_kv:
        total += (1 if s.keys_as_values else 2) * d * keys + (s.head_dim if s.qk_norm else 0)
    total += 2 * d * s.laurel_rank + d if s.laurel_rank else 0
    total += 2 * d * s.per_layer_input + d if s.per_layer_input else 0
    if s.altup is not None:  # two tables of coefficients, the router and its norm, the output's scale
        n = s.altup.num_inputs
        total += n**3 + n**2 + n * d + 2 * d
    if s.experts is not None:  # router, its scales, the experts, three norms
        e = s.experts
        total += e.num_experts * (d + 1 + 3 * d * e.intermediate_size) + 4 * d
    return total + (1 if s.layer_scale else 0)
