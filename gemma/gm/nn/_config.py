# SPDX-License-Identifier: Apache-2.0
"""The JAX API's names for a configuration: a view of `gemma.config.GemmaConfig` that holds no number of its own.

`TransformerConfig.of(gemma_config)` renames, `.gemma` renames back, `.layers` is the per-layer spec that the networks
read. The sizes of the published models are in `gemma/config.py`, the model classes in `_gemma.py`.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from gemma.config import GemmaConfig, LayerSpec
from gemma.config import text_only as _text_only
from gemma.errors import ConfigError
from gemma.gm.nn import _cache
from gemma.gm.typing import DType, Sharding
from gemma.gm.utils import _types
from gemma.gm.vision._vision import SigLiPFromPatches


class AttentionType(enum.Enum):
    """Which keys a layer sees: all of them, or those of its sliding window."""

    GLOBAL = 1
    LOCAL_SLIDING = 2


class QueryPreAttentionNormalisation(enum.Enum):
    """What queries are multiplied by, after RoPE. D is the model width, N the number of heads, H their size."""

    BY_ONE_OVER_SQRT_HEAD_DIM = enum.auto()  # H**-0.5
    BY_EMBED_DIM_DIV_NUM_HEADS = enum.auto()  # D // N, not a reciprocal
    BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS = enum.auto()  # (D // N)**-0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What goes with a model class: the version of its tokenizer and the name of its default checkpoint."""

    tokenizer_version: int | str | None = None
    default_ckpt: str | None = None


_LETTER = {AttentionType.GLOBAL: "G", AttentionType.LOCAL_SLIDING: "L"}
_TYPE = {letter: kind for kind, letter in _LETTER.items()}

GEMMA3_ATTENTION_PATTERN = tuple(_TYPE[letter] for letter in "LLLLLG")


def make_attention_layers_types(pattern: Iterable[AttentionType], *, num_layers: int) -> tuple[AttentionType, ...]:
    """Repeats a pattern of attention types and cuts it to `num_layers`."""
    return tuple(itertools.islice(itertools.cycle(pattern), num_layers))


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A Gemma decoder in the names of the JAX API. Frozen and hashable.

    `hidden_dim` is the MLP width F (in `GemmaConfig` and in every config.json, `hidden_size` is the model width D).
    `source` holds what these names cannot say (special tokens, context length, norm epsilon, ...).
    """

    num_embed: int  # V, rows of the embedding table
    embed_dim: int  # D
    hidden_dim: int  # F
    num_heads: int  # N
    head_dim: int  # H
    num_kv_heads: int  # K
    final_logit_softcap: float | None
    use_post_attn_norm: bool
    use_post_ffw_norm: bool
    attention_types: tuple[AttentionType, ...]
    query_pre_attn_norm: QueryPreAttentionNormalisation = QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_HEAD_DIM
    attn_logits_soft_cap: float | None = None
    sliding_window_size: int | None = None  # keys a local query sees, itself included
    transpose_gating_einsum: bool = False
    use_qk_norm: bool = False
    local_base_frequency: float = 10_000
    global_base_frequency: float = 10_000
    local_scale_factor: float = 1.0
    global_scale_factor: float = 1.0
    vision_encoder: Any = None  # a SigLiPFromPatches, or another module with its interface
    source: GemmaConfig = dataclasses.field(default=GemmaConfig(), repr=False, kw_only=True)

    def __post_init__(self):
        object.__setattr__(self, "attention_types", tuple(self.attention_types))

    @classmethod
    def of(cls, config: GemmaConfig) -> TransformerConfig:
        """The view of a GemmaConfig; `.gemma` of the result equals `config`."""
        encoder = None if config.vision is None else SigLiPFromPatches.of(config)
        return cls(**_fields(config), vision_encoder=encoder, source=config)

    def text_only(self) -> TransformerConfig:
        """The same decoder without its vision encoder."""
        return dataclasses.replace(self, vision_encoder=None, source=_text_only(self.source))

    @property
    def num_layers(self) -> int:
        return len(self.attention_types)

    @property
    def vocab_size(self) -> int:
        """Another name of `num_embed`."""
        return self.num_embed

    def query_pre_attn_scalar(self) -> float:
        """What queries are multiplied by, after RoPE."""
        return self.layers[0].query_scale

    @property
    def gemma(self) -> GemmaConfig:
        """The GemmaConfig that this is a view of: `source`, with every field that was changed here.

        Raises:
          ConfigError: a combination that GemmaConfig has no fields for; the networks can still run it.
        """
        if self.use_post_attn_norm != self.use_post_ffw_norm:
            raise ConfigError("use_post_attn_norm and use_post_ffw_norm differ: GemmaConfig has one field for both")
        if self.local_scale_factor != 1.0:
            raise ConfigError(f"local_scale_factor {self.local_scale_factor}: GemmaConfig scales global layers only")
        return self._gemma()

    @property
    def input_config(self) -> _types.InputConfig:
        """What a sampler has to know about images."""
        encoder = self.vision_encoder
        return _types.InputConfig(
            support_images=encoder is not None,
            num_tokens_per_image=0 if encoder is None else encoder.num_mm_tokens_per_image,
            special_tokens=_types.image_tokens_of(self.source),
        )

    def _gemma(self) -> GemmaConfig:
        seen = _fields(self.source)
        changed = {name for name, value in seen.items() if getattr(self, name) != value}
        values: dict[str, Any] = {}
        if "num_embed" in changed:
            values |= dict(vocab_size=self.num_embed, flax_vocab_rows=None)
        if "attention_types" in changed:
            letters = "".join(_LETTER[kind] for kind in self.attention_types)
            values |= dict(num_hidden_layers=self.num_layers, layer_pattern=letters)
        if changed & {"query_pre_attn_norm", "embed_dim", "num_heads", "head_dim"}:
            values["query_pre_attn_scalar"] = self._scalar(changed)
        for mine, theirs in _SAME_MEANING.items():
            if mine in changed:
                values[theirs] = getattr(self, mine)
        if "global_base_frequency" in changed:  # a source without a local base would let it follow the global one
            values["rope_local_base_freq"] = self.local_base_frequency
        if "use_post_ffw_norm" in changed:
            values["use_post_norms"] = self.use_post_ffw_norm
        values |= self._vision()
        return dataclasses.replace(self.source, **values)

    def _vision(self) -> dict[str, Any]:
        """The fields of GemmaConfig about images, where `vision_encoder` says something else than `source`."""
        encoder = self.vision_encoder
        if encoder is None:
            return {} if self.source.vision is None else dict(vision=None)
        if not isinstance(encoder, SigLiPFromPatches):
            return {}  # an encoder of the user's own: GemmaConfig has no fields for it
        vision, tokens = encoder.vision_config, encoder.num_mm_tokens_per_image
        known = self.source.vision
        if known is not None:  # two fields that the encoder does not carry
            vision = dataclasses.replace(
                vision, num_image_tokens=known.num_image_tokens, projection_dim=known.projection_dim
            )
        return (
            {}
            if (vision, tokens) == (known, self.source.mm_tokens_per_image)
            else dict(vision=vision, mm_tokens_per_image=tokens)
        )

    def _scalar(self, changed: set[str]) -> float | None:
        kind, per_head = self.query_pre_attn_norm, self.embed_dim // self.num_heads
        if kind is QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_HEAD_DIM:
            kept = self.source.query_pre_attn_scalar if "query_pre_attn_norm" not in changed else None
            return None if kept == self.source.head_dim else kept
        reciprocal = kind is QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
        return float(per_head) if reciprocal else float(per_head) ** -2.0

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """What each layer does; the only thing the networks ask about attention."""
        specs = self._gemma().layers
        if self.local_scale_factor == 1.0:
            return specs
        scale = float(self.local_scale_factor)
        return tuple(dataclasses.replace(s, rope_scale=scale) if s.attention == "local" else s for s in specs)

    def init_cache(
        self,
        batch_size: int,
        dtype: DType = jnp.bfloat16,
        *,
        cache_length: int | None,
        windowed: bool = False,
        sharding: Sharding | None = None,
    ) -> _cache.Cache:
        """An empty cache; see `Transformer.init_cache`."""
        if cache_length is None:
            raise ConfigError("Missing `cache_length=` kwarg when calling `init_cache()`.")
        return _cache.init_cache(self.layers, batch_size, dtype, cache_length, windowed=windowed, sharding=sharding)


# Fields that only differ in name.
_SAME_MEANING = {
    "embed_dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "num_kv_heads": "num_key_value_heads",
    "final_logit_softcap": "final_logit_softcapping",
    "attn_logits_soft_cap": "attn_logit_softcapping",
    "sliding_window_size": "sliding_window",
    "transpose_gating_einsum": "transpose_gating_einsum",
    "use_qk_norm": "use_qk_norm",
    "local_base_frequency": "rope_local_base_freq",
    "global_base_frequency": "rope_theta",
    "global_scale_factor": "rope_scaling_factor",
}


def _fields(config: GemmaConfig) -> dict[str, Any]:
    values = {mine: getattr(config, theirs) for mine, theirs in _SAME_MEANING.items()}
    if config.rope_local_base_freq is None:
        values["local_base_frequency"] = config.rope_theta
    per_head = config.hidden_size // config.num_attention_heads
    # A scalar that is neither H nor D // N stays in `source`, under the default name.
    by_width = config.query_pre_attn_scalar not in (None, config.head_dim) and config.query_pre_attn_scalar == per_head
    return values | dict(
        num_embed=config.table_rows,
        use_post_attn_norm=config.use_post_norms,
        use_post_ffw_norm=config.use_post_norms,
        attention_types=tuple(_TYPE[spec.attention[0].upper()] for spec in config.layers),
        query_pre_attn_norm=(
            QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS
            if by_width
            else QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_HEAD_DIM
        ),
    )
