# SPDX-License-Identifier: Apache-2.0
"""The parts of a decoder: the embedding, and the block that joins the rest. One file serves every generation.

A trait that the public constructors have no field for comes in `traits`, the layer's `LayerSpec`. Attention is
`_attention.py`; the MLP and what Gemma 3n and 4 put beside it are `_feed_forward.py`, `_streams.py`, `_experts.py`.

What depends on the kind of layer and not on its weights (RoPE table, mask, cache write) comes in a `LayerPlan` from
`_plan.py`; parameters live in the layers of `_layers.py`. Axis letters: B batch, T queries, S keys, N query heads,
K key/value heads, G = N/K, H head size, D model width, F MLP width, V vocabulary.

    x ── norm ── attention ─┬─ (norm) ── + ── norm ── MLP ── (norm) ── + ──      the norms in brackets: Gemma 2 and 3
    └───────────────────────┼────────────┘└───────────────────────────┘
                            └ qk norm (Gemma 3), RoPE, scale, soft-cap (Gemma 2), mask, softmax
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from gemma.config import LayerSpec
from gemma.errors import ConfigError, ShapeError
from gemma.gm.nn import _cache, _cross, _experts, _layers, _per_layer, _plan, _streams
from gemma.gm.nn._attention import Attention, attention_fields, norm_fields, spec_of
from gemma.gm.nn._config import AttentionType, TransformerConfig
from gemma.gm.nn._feed_forward import FeedForward, Laurel, PerLayerMapping
from gemma.gm.nn._packed import Packed
from gemma.gm.typing import Array, Bool, DType, Float, Int


class Embedder(nn.Module):
    """The embedding table, which is also the output head.

    Attributes:
      vocab_size: V, rows of the table.
      embed_dim: D.
      vision_proj_dim: E, width of the image features that are projected to D; None for a text model.
      dtype: in which the table is created; None: float32. What belongs to images is float32.
      vision_norm_eps: of the norm of image features.
      eoi_token: the id whose embedding is a vector of its own, not scaled (T5Gemma 2's end of an image); None: none.
      per_layer: fields of a `PerLayerInputs`, whose parameters are this module's; None: there are none.
    """

    vocab_size: int
    embed_dim: int
    vision_proj_dim: int | None = None
    dtype: DType | None = None
    vision_norm_eps: float = 1e-6
    eoi_token: int | None = None
    per_layer: dict[str, Any] | None = None

    def setup(self):
        shape = (self.vocab_size, self.embed_dim)
        dtype = self.dtype or jnp.float32
        initializer = nn.initializers.normal()
        self.input_embedding_table = _layers.parameter(self, "input_embedding", initializer, shape, dtype)
        if self.eoi_token is not None:
            self.eoi_embedding = self.param("eoi_embedding", nn.initializers.zeros_init(), shape[1:], dtype)
        if self.per_layer is not None:
            self.per_layer_inputs = _per_layer.PerLayerInputs(**self.per_layer, features=self.embed_dim, dtype=dtype)
            nn.share_scope(self, self.per_layer_inputs)
        if self.vision_proj_dim:
            self.mm_soft_embedding_norm = _layers.RMSNorm(eps=self.vision_norm_eps)
            self.mm_input_projection = _layers.Einsum(shape=(self.vision_proj_dim, self.embed_dim))

    def encode(self, x: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Token ids to embeddings, scaled by sqrt(D) rounded to the dtype of the table (in bfloat16, 25.25 for 640)."""
        table = self.input_embedding_table
        rows = table.take(x) if isinstance(table, Packed) else table[x]
        rows = rows * jnp.sqrt(jnp.float32(self.embed_dim)).astype(rows.dtype)
        if self.eoi_token is None:
            return rows
        own = jnp.broadcast_to(self.eoi_embedding.astype(rows.dtype), rows.shape)
        return jnp.where((x == self.eoi_token)[..., None], own, rows)

    def encode_per_layer(self, tokens: Int[Array, "B T"], x: Float[Array, "B T D"]) -> Float[Array, "B T L p"]:
        """What each layer gets besides the activations, from token ids and what `encode` made of them."""
        return self.per_layer_inputs(tokens, x)

    def encode_vision(self, x: Float[Array, "*B Q E"]) -> Float[Array, "*B Q D"]:
        """Image features to the width of the decoder: norm and projection, not scaled by sqrt(D)."""
        if not self.vision_proj_dim:
            raise ConfigError("encode_vision: this embedder was made without vision_proj_dim, for a text model")
        return self.mm_input_projection("...QE,ED->...QD", self.mm_soft_embedding_norm(x))

    def decode(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Activations to logits with the same table; summed in float32, returned in the common dtype."""
        return self.logits(x).astype(_layers.common_dtype(x, self.input_embedding_table))

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """As `decode`, left in float32."""
        return _layers.weight_einsum("...D,VD->...V", x, self.input_embedding_table, accumulate=jnp.float32)


class Block(nn.Module):
    """One layer of the decoder. The fields are the public constructor; the networks build it with `of`.

    Attributes: those of `Attention`, and
      embed_dim: D.
      hidden_dim: F.
      use_post_attn_norm: a norm on what attention adds.
      use_post_ffw_norm: a norm on what the MLP adds.
      transpose_gating_einsum: see `FeedForward`.
      traits: as in `Attention`; the streams, per-layer inputs, sparse MLPs and experts of a layer come with it.
      cross_features: Z, width of the encoded input that a cross-attention of its own reads; None: there is none.
    """

    num_heads: int
    num_kv_heads: int
    embed_dim: int
    head_dim: int
    hidden_dim: int
    use_post_attn_norm: bool
    use_post_ffw_norm: bool
    attn_type: AttentionType
    query_pre_attn_scalar: float
    transpose_gating_einsum: bool
    rope_base_frequency: float = 10_000
    rope_scale_factor: float = 1.0
    attn_logits_soft_cap: float | None = None
    sliding_window_size: int | None = None
    use_qk_norm: bool = False
    rope_proportion: float = 1.0
    bidirectional: bool = False
    norm_eps: float = 1e-6
    dtype: DType | None = None
    cross_features: int | None = None
    traits: LayerSpec | None = None

    @classmethod
    def of(cls, spec: LayerSpec, config: TransformerConfig, *, dtype: DType | None = None, **fields: Any):
        """One layer of a configuration; `fields` are others of the constructor, such as `name`."""
        return cls(
            **attention_fields(spec),
            embed_dim=config.embed_dim,
            hidden_dim=spec.mlp_size,
            use_post_attn_norm=config.use_post_attn_norm,
            use_post_ffw_norm=config.use_post_ffw_norm,
            transpose_gating_einsum=config.transpose_gating_einsum,
            norm_eps=config.source.rms_norm_eps,
            dtype=dtype,
            traits=spec,
            **fields,
        )

    def setup(self):
        spec, norm, dtype = spec_of(self), norm_fields(self), self.dtype
        self.spec = spec
        self.pre_attention_norm = _layers.RMSNorm(**norm)
        self.attn = Attention.of(spec, features=self.embed_dim, norm_eps=self.norm_eps, dtype=dtype)
        if self.use_post_attn_norm:
            self.post_attention_norm = _layers.RMSNorm(**norm)
        if self.cross_features is not None:
            self.pre_cross_attention_norm = _layers.RMSNorm(**norm)
            self.cross_attn = _cross.CrossAttention.of(spec, self.embed_dim, self.cross_features, dtype)
            self.post_cross_attention_norm = _layers.RMSNorm(**norm)
        self.pre_ffw_norm = _layers.RMSNorm(**norm)
        self.mlp = FeedForward(
            self.embed_dim, self.hidden_dim, self.transpose_gating_einsum, dtype=dtype, sparsity=spec.mlp_sparsity
        )
        if self.use_post_ffw_norm:
            self.post_ffw_norm = _layers.RMSNorm(**norm)
        if spec.experts is not None:
            self.experts = _experts.Experts(spec.experts, self.embed_dim, norm, dtype)
        if spec.altup is not None:
            self.altup = _streams.AltUp(spec.altup, self.embed_dim, norm, dtype)
        if spec.laurel_rank is not None:
            self.laurel = Laurel(self.embed_dim, spec.laurel_rank, dtype)
            self.post_laurel_norm = _layers.RMSNorm(**norm)
        if spec.per_layer_input is not None:
            self.per_layer_mapping = PerLayerMapping(self.embed_dim, spec.per_layer_input, norm, dtype)
        if spec.layer_scale:
            self.skip_scale = self.param("skip_scale", nn.initializers.ones_init(), (1,), dtype or jnp.float32)

    def __call__(
        self,
        x: Float[Array, "B T D"] | Float[Array, "a B T D"],
        segment_pos: Int[Array, "B T"],
        cache: _cache.LayerCache | None,
        attn_mask: Bool[Array, "B T S"],
        plan: _plan.LayerPlan | None = None,
        memory: _cross.Memory | None = None,
        inputs: _per_layer.LayerInputs | None = None,
    ) -> tuple[_cache.LayerCache | None, Float[Array, "B T D"]]:
        """Arguments and results as in `Attention`; a cross-attention is who looks at `memory` where there is one.

        `x` has the streams as its first axis in a network that has several, and so has the result.
        """
        predicted = None if self.spec.altup is None else self.altup.predict(x)
        if predicted is not None:
            x = predicted[self.spec.altup.active_idx]
        crossing = self.cross_features is not None
        more = {} if memory is None or crossing else dict(memory=memory)
        more |= {} if inputs is None else dict(inputs=inputs)
        normed = self.pre_attention_norm(x)
        cache, added, *kv = self.attn(normed, segment_pos, cache, attn_mask, plan, **more)
        if self.use_post_attn_norm:
            added = self.post_attention_norm(added)
        x = x + added
        if crossing:
            x = x + self.post_cross_attention_norm(self.cross_attn(self.pre_cross_attention_norm(x), memory))
        if self.spec.laurel_rank is not None:
            x = (x + normed + self.post_laurel_norm(self.laurel(normed))) * 2**-0.5
        added = self.mlp(self.pre_ffw_norm(x))
        if self.spec.experts is not None:
            added = self.experts(x, added)
        if self.use_post_ffw_norm:
            added = self.post_ffw_norm(added)
        x = x + added
        if not _is_classic(self.spec):
            x = self._after(x, predicted, None if inputs is None else inputs.per_layer)
        return (cache, x, *kv)

    def _after(self, x: Array, predicted: Array | None, per_layer: Array | None) -> Array:
        """What follows the block in Gemma 3n and 4: the other streams, the per-layer input, the layer's scale."""
        active = x
        if predicted is not None:
            x = self.altup.correct(predicted, x)
            active = self.altup.scale(x[self.spec.altup.active_idx])
        if self.spec.per_layer_input is not None:
            if per_layer is None:
                raise ShapeError("this layer has a per-layer input: pass inputs.per_layer, as the Transformer does")
            added = self.per_layer_mapping(active, per_layer)
            x = x + added if predicted is None else x.at[1:].add(added[None])
        return x * _layers.along_last(self.skip_scale, x) if self.spec.layer_scale else x

    def remember(self, source: Float[Array, "B S Z"]) -> tuple[Array, Array]:
        """What this layer of a decoder looks at of an encoded input: keys and values [B, S, K, H]."""
        return (self.attn if self.cross_features is None else self.cross_attn).remember(source)


def _is_classic(spec: LayerSpec) -> bool:
    """Whether a layer ends with its MLP, as in Gemma 1 to 3."""
    return spec.altup is None and spec.per_layer_input is None and not spec.layer_scale
