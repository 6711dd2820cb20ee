# SPDX-License-Identifier: Apache-2.0
"""The parts of a decoder: embedding, attention, MLP, and the block that joins them. One file serves Gemma 1, 2 and 3.

What depends on the kind of layer and not on its weights (RoPE table, mask, cache write) comes in a `LayerPlan` from
`_plan.py`; parameters live in the layers of `_layers.py`. Axis letters: B batch, T queries, S keys, N query heads,
K key/value heads, G = N/K, H head size, D model width, F MLP width, V vocabulary.

    x ── norm ── attention ─┬─ (norm) ── + ── norm ── MLP ── (norm) ── + ──      the norms in brackets: Gemma 2 and 3
    └───────────────────────┼────────────┘└───────────────────────────┘
                            └ qk norm (Gemma 3), RoPE, scale, soft-cap (Gemma 2), mask, softmax
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemma.config import LayerSpec
from gemma.errors import ConfigError
from gemma.gm.math._positional_embeddings import rotate
from gemma.gm.nn import _cache, _layers, _plan
from gemma.gm.nn._config import AttentionType, TransformerConfig
from gemma.gm.typing import Array, Bool, DType, Float, Int

MASKED = -2.3819763e38  # finite, so that a row without keys gives numbers and not NaN


class Embedder(nn.Module):
    """The embedding table, which is also the output head.

    Attributes:
      vocab_size: V, rows of the table.
      embed_dim: D.
      vision_proj_dim: E, width of the image features that are projected to D; None for a text model.
      dtype: in which the table is created; None: float32. What belongs to images is float32.
      vision_norm_eps: of the norm of image features.
    """

    vocab_size: int
    embed_dim: int
    vision_proj_dim: int | None = None
    dtype: DType | None = None
    vision_norm_eps: float = 1e-6

    def setup(self):
        shape = (self.vocab_size, self.embed_dim)
        dtype = self.dtype or jnp.float32
        self.input_embedding_table = self.param("input_embedding", nn.initializers.normal(), shape, dtype)
        if self.vision_proj_dim:
            self.mm_soft_embedding_norm = _layers.RMSNorm(eps=self.vision_norm_eps)
            self.mm_input_projection = _layers.Einsum(shape=(self.vision_proj_dim, self.embed_dim))

    def encode(self, x: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Token ids to embeddings, scaled by sqrt(D) rounded to the dtype of the table (in bfloat16, 25.25 for 640)."""
        rows = self.input_embedding_table[x]
        return rows * jnp.sqrt(jnp.float32(self.embed_dim)).astype(rows.dtype)

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


class AttentionWeights(nn.Module):
    """Returns its input: the place where `capture_intermediates` or an interceptor sees the attention weights."""

    def __call__(self, weights: Float[Array, "B T N S"]) -> Float[Array, "B T N S"]:
        return weights


class Attention(nn.Module):
    """Grouped-query attention over the chunk and, with a cache, what was stored before.

    The fields are the public constructor; the networks build it with `of`, from a `LayerSpec`.

    Attributes:
      num_heads: N.
      num_kv_heads: K; N is a multiple.
      features: D.
      head_dim: H.
      attn_type: global, or local with `sliding_window_size`.
      query_pre_attn_scalar: queries are multiplied by it after RoPE.
      rope_base_frequency: base of the RoPE wavelengths.
      rope_scale_factor: positions are divided by it.
      attn_logits_soft_cap: c in `c * tanh(scores / c)`, before the mask.
      sliding_window_size: keys that a local query sees, itself included.
      use_qk_norm: RMSNorm over H of queries and keys, before RoPE.
      rope_proportion: share of the pairs that RoPE turns.
      bidirectional: queries see the future too.
      norm_eps: of the query and key norms.
      dtype: in which parameters are created; None: float32.
    """

    num_heads: int
    num_kv_heads: int
    features: int
    head_dim: int
    attn_type: AttentionType
    query_pre_attn_scalar: float
    rope_base_frequency: float = 10_000
    rope_scale_factor: float = 1.0
    attn_logits_soft_cap: float | None = None
    sliding_window_size: int | None = None
    use_qk_norm: bool = False
    rope_proportion: float = 1.0
    bidirectional: bool = False
    norm_eps: float = 1e-6
    dtype: DType | None = None

    @classmethod
    def of(cls, spec: LayerSpec, *, features: int, norm_eps: float, dtype: DType | None = None) -> Attention:
        """The attention of one layer of a configuration."""
        return cls(**_attention_fields(spec), features=features, norm_eps=norm_eps, dtype=dtype)

    @classmethod
    def init_cache(
        cls, cache_size: int, num_heads: int, head_dim: int, batch_size: int, dtype: DType = jnp.bfloat16
    ) -> _cache.LayerCache:
        """One layer's empty cache in the full layout; `num_heads` is K."""
        return _cache.init_layer(batch_size, cache_size, num_heads, head_dim, dtype, 0)

    def setup(self):
        N, K, D, H = self.num_heads, self.num_kv_heads, self.features, self.head_dim
        self.spec = _spec(self)
        self.attention_weights = AttentionWeights()
        self.attn_vec_einsum = _layers.Einsum(shape=(N, H, D), dtype=self.dtype)
        if N == K:
            self.qkv_einsum = _layers.Einsum(shape=(3, N, D, H), dtype=self.dtype)
        else:
            self.q_einsum = _layers.Einsum(shape=(N, D, H), dtype=self.dtype)
            self.kv_einsum = _layers.Einsum(shape=(2, K, D, H), dtype=self.dtype)
        if self.use_qk_norm:
            self._query_norm = _layers.RMSNorm(eps=self.norm_eps, dtype=self.dtype)
            self._key_norm = _layers.RMSNorm(eps=self.norm_eps, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_pos: Int[Array, "B T"],
        cache: _cache.LayerCache | None,
        attn_mask: Bool[Array, "B T S"],
        plan: _plan.LayerPlan | None = None,
    ) -> tuple[_cache.LayerCache | None, Float[Array, "B T D"]]:
        """Attends.

        Args:
          x: activations.
          segment_pos: positions of the queries, in tokens.
          cache: this layer's cache in the full layout, or None.
          attn_mask: who may look at whom, before the sliding window; columns are the cache's slots, or the chunk's
            tokens without a cache. Numbers count as true where they are not zero.
          plan: the layer's plan where one was made for the whole network; it replaces `segment_pos` and `attn_mask`.

        Returns:
          The new cache (None without one) and the activations.
        """
        if plan is None:
            positions = jnp.asarray(segment_pos).astype(jnp.int32)
            valid = jnp.ones(positions.shape, bool)
            base = jnp.asarray(attn_mask).astype(bool)
            plan = _plan.plan_layer(self.spec, positions=positions, valid=valid, cache=cache, mask=base)
        queries, keys, values = self._project(x)
        queries = rotate(queries, plan.sin, plan.cos) * self.query_pre_attn_scalar
        keys = rotate(keys, plan.sin, plan.cos)
        new_cache = None
        if cache is not None:
            keys, values, new_cache = plan.write.store(cache, keys, values)
            keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
        weights = attention_weights(queries, keys, plan.mask, softcap=self.attn_logits_soft_cap)
        weights = self.attention_weights(weights.astype(queries.dtype))
        return new_cache, self.attn_vec_einsum("BTNH,NHD->BTD", weighted_values(weights, values))

    def _project(self, x: Array) -> tuple[Array, Array, Array]:
        if self.num_heads == self.num_kv_heads:
            queries, keys, values = self.qkv_einsum("BTD,CNDH->CBTNH", x)
        else:
            queries = self.q_einsum("BTD,NDH->BTNH", x)
            keys, values = self.kv_einsum("BTD,CKDH->CBTKH", x)
        if self.use_qk_norm:
            queries, keys = self._query_norm(queries), self._key_norm(keys)
        return queries, keys, values


def attention_weights(
    queries: Float[Array, "B T N H"],
    keys: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    *,
    softcap: float | None = None,
) -> Float[Array, "B T N S"]:
    """Softmax of the scores, in float32. Query head n looks at key head n // (N/K); K and V are never repeated."""
    B, T, N, H = queries.shape
    K = keys.shape[2]
    if K == 1 and T == 1:  # a decoding step: with the keys first, XLA reads the cache as it lies and copies nothing
        scores = jnp.einsum("BSH,BNH->BSN", keys[:, :, 0], queries[:, 0], preferred_element_type=jnp.float32)
        scores = jnp.swapaxes(scores, 1, 2)[:, None]
    else:
        grouped = queries.reshape(B, T, K, N // K, H)
        scores = jnp.einsum("BTKGH,BSKH->BTKGS", grouped, keys, preferred_element_type=jnp.float32)
        scores = scores.reshape(B, T, N, -1)
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    return jax.nn.softmax(jnp.where(mask[:, :, None, :], scores, MASKED), axis=-1)


def weighted_values(weights: Float[Array, "B T N S"], values: Float[Array, "B S K H"]) -> Float[Array, "B T N H"]:
    """The mean of the values under the weights; summed in float32."""
    B, T, N, S = weights.shape
    K, H = values.shape[2:]
    if K == 1:
        mixed = jnp.einsum("BTNS,BSH->BTNH", weights, values[:, :, 0], preferred_element_type=jnp.float32)
    else:
        grouped = weights.reshape(B, T, K, N // K, S)
        mixed = jnp.einsum("BTKGS,BSKH->BTKGH", grouped, values, preferred_element_type=jnp.float32)
    return mixed.reshape(B, T, N, H).astype(weights.dtype)


class FeedForward(nn.Module):
    """The gated MLP, `gelu(x @ gate) * (x @ up)` and down; GELU in its tanh form.

    Attributes:
      features: D.
      hidden_dim: F.
      transpose_gating_einsum: the kernel of gate and up is [2, F, D] and not [2, D, F].
      dtype: in which parameters are created; None: float32.
    """

    features: int
    hidden_dim: int
    transpose_gating_einsum: bool
    dtype: DType | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        D, F = self.features, self.hidden_dim
        shape, eqn = ((2, F, D), "...D,CFD->...CF") if self.transpose_gating_einsum else ((2, D, F), "...D,CDF->...CF")
        gating = _layers.Einsum(shape=shape, weight_name="gating_einsum", dtype=self.dtype)
        linear = _layers.Einsum(shape=(F, D), weight_name="linear", dtype=self.dtype)
        # Both weights are leaves of this module's own scope, as in the published trees.
        nn.share_scope(self, gating)
        nn.share_scope(self, linear)
        both = gating(eqn, x)
        return linear("...F,FD->...D", nn.gelu(both[..., 0, :], approximate=True) * both[..., 1, :])


class Block(nn.Module):
    """One layer of the decoder. The fields are the public constructor; the networks build it with `of`.

    Attributes: those of `Attention`, and
      embed_dim: D.
      hidden_dim: F.
      use_post_attn_norm: a norm on what attention adds.
      use_post_ffw_norm: a norm on what the MLP adds.
      transpose_gating_einsum: see `FeedForward`.
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

    @classmethod
    def of(cls, spec: LayerSpec, config: TransformerConfig, *, dtype: DType | None = None, name: str | None = None):
        """One layer of a configuration."""
        return cls(
            **_attention_fields(spec),
            embed_dim=config.embed_dim,
            hidden_dim=spec.mlp_size,
            use_post_attn_norm=config.use_post_attn_norm,
            use_post_ffw_norm=config.use_post_ffw_norm,
            transpose_gating_einsum=config.transpose_gating_einsum,
            norm_eps=config.source.rms_norm_eps,
            dtype=dtype,
            name=name,
        )

    def setup(self):
        norm = dict(eps=self.norm_eps, dtype=self.dtype)
        self.pre_attention_norm = _layers.RMSNorm(**norm)
        self.attn = Attention.of(_spec(self), features=self.embed_dim, norm_eps=self.norm_eps, dtype=self.dtype)
        if self.use_post_attn_norm:
            self.post_attention_norm = _layers.RMSNorm(**norm)
        self.pre_ffw_norm = _layers.RMSNorm(**norm)
        self.mlp = FeedForward(self.embed_dim, self.hidden_dim, self.transpose_gating_einsum, dtype=self.dtype)
        if self.use_post_ffw_norm:
            self.post_ffw_norm = _layers.RMSNorm(**norm)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_pos: Int[Array, "B T"],
        cache: _cache.LayerCache | None,
        attn_mask: Bool[Array, "B T S"],
        plan: _plan.LayerPlan | None = None,
    ) -> tuple[_cache.LayerCache | None, Float[Array, "B T D"]]:
        """Arguments and results as in `Attention`."""
        cache, added = self.attn(self.pre_attention_norm(x), segment_pos, cache, attn_mask, plan)
        if self.use_post_attn_norm:
            added = self.post_attention_norm(added)
        x = x + added
        added = self.mlp(self.pre_ffw_norm(x))
        if self.use_post_ffw_norm:
            added = self.post_ffw_norm(added)
        return cache, x + added


def _attention_fields(spec: LayerSpec) -> dict[str, Any]:
    """The constructor fields of `Attention` and `Block` that say what `spec` says; `_spec` is the inverse."""
    return dict(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        attn_type=AttentionType.GLOBAL if spec.window is None else AttentionType.LOCAL_SLIDING,
        query_pre_attn_scalar=spec.query_scale,
        rope_base_frequency=spec.rope_base,
        rope_scale_factor=spec.rope_scale,
        attn_logits_soft_cap=spec.attn_softcap,
        sliding_window_size=spec.window,
        use_qk_norm=spec.qk_norm,
        rope_proportion=spec.rope_fraction,
        bidirectional=spec.bidirectional,
    )


def _spec(module: Attention | Block) -> LayerSpec:
    local = module.attn_type is AttentionType.LOCAL_SLIDING
    if local and module.sliding_window_size is None:
        raise ConfigError("Sliding_window_size must be set if Local Sliding attention type")
    return LayerSpec(
        index=0,  # a module does not know its place in the network
        attention="local" if local else "global",
        window=module.sliding_window_size if local else None,
        bidirectional=module.bidirectional,
        num_heads=module.num_heads,
        num_kv_heads=module.num_kv_heads,
        head_dim=module.head_dim,
        mlp_size=getattr(module, "hidden_dim", 0),
        rope_base=module.rope_base_frequency,
        rope_scale=module.rope_scale_factor,
        rope_fraction=module.rope_proportion,
        query_scale=module.query_pre_attn_scalar,
        attn_softcap=module.attn_logits_soft_cap,
        qk_norm=module.use_qk_norm,
        kv_source=0,
    )
