# SPDX-License-Identifier: Apache-2.0
"""Grouped-query attention of one layer, with or without a cache.

What depends on the kind of layer and not on its weights (RoPE table, mask, cache write) comes in a `LayerPlan` from
`_plan.py`; scores and softmax are `_attend.py`; the block around it is in `_modules.py`, whose axis letters these are.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import linen as nn

from gemma.config import LayerSpec
from gemma.errors import ConfigError, ShapeError
from gemma.gm.math._positional_embeddings import rotate
from gemma.gm.nn import _cache, _cross, _layers, _per_layer, _plan
from gemma.gm.nn._attend import attention_weights, weighted_values
from gemma.gm.nn._config import AttentionType
from gemma.gm.typing import Array, Bool, DType, Float, Int

if TYPE_CHECKING:
    from gemma.gm.nn._modules import Block


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
      traits: the layer's spec, for what the fields above have no word for; they win where they do.
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
    traits: LayerSpec | None = None

    @classmethod
    def of(cls, spec: LayerSpec, *, features: int, norm_eps: float, dtype: DType | None = None) -> Attention:
        """The attention of one layer of a configuration."""
        return cls(**attention_fields(spec), features=features, norm_eps=norm_eps, dtype=dtype, traits=spec)

    @classmethod
    def init_cache(
        cls, cache_size: int, num_heads: int, head_dim: int, batch_size: int, dtype: DType = jnp.bfloat16
    ) -> _cache.LayerCache:
        """One layer's empty cache in the full layout; `num_heads` is K."""
        return _cache.init_layer(batch_size, cache_size, num_heads, head_dim, dtype, 0)

    def setup(self):
        N, K, D, H = self.num_heads, self.num_kv_heads, self.features, self.head_dim
        spec = self.spec = spec_of(self)
        self.attention_weights = AttentionWeights()
        self.attn_vec_einsum = _layers.Einsum(shape=(N, H, D), dtype=self.dtype)
        if spec.fused_qkv:
            self.qkv_einsum = _layers.Einsum(shape=(3, N, D, H), dtype=self.dtype)
        else:
            self.q_einsum = _layers.Einsum(shape=(N, D, H), dtype=self.dtype)
        if spec.keys_as_values and not spec.shares_kv:
            self.k_einsum = _layers.Einsum(shape=(K, D, H), dtype=self.dtype)
        elif not spec.fused_qkv and not spec.shares_kv:
            self.kv_einsum = _layers.Einsum(shape=(2, K, D, H), dtype=self.dtype)
        norm, prefix = norm_fields(self), "_" if spec.norm_plus_one else ""  # the published trees differ in this letter
        if self.use_qk_norm:
            self._query_norm = _layers.RMSNorm(**norm, name=f"{prefix}query_norm")
        if self.use_qk_norm and not spec.shares_kv:
            self._key_norm = _layers.RMSNorm(**norm, name=f"{prefix}key_norm")
        if spec.value_norm and not spec.shares_kv:
            self._value_norm = _layers.RMSNorm(**norm, with_scale=False)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        segment_pos: Int[Array, "B T"],
        cache: _cache.LayerCache | None,
        attn_mask: Bool[Array, "B T S"],
        plan: _plan.LayerPlan | None = None,
        memory: _cross.Memory | None = None,
        inputs: _per_layer.LayerInputs | None = None,
    ) -> tuple[_cache.LayerCache | None, Float[Array, "B T D"]]:
        """Attends.

        Args:
          x: activations.
          segment_pos: positions of the queries, in tokens.
          cache: this layer's cache in the full layout, or None.
          attn_mask: who may look at whom, before the sliding window; columns are the cache's slots, or the chunk's
            tokens without a cache. Numbers count as true where they are not zero.
          plan: the layer's plan where one was made for the whole network; it replaces `segment_pos` and `attn_mask`.
          memory: further keys and values, which every query may look at (the encoder's, in a T5Gemma 2).
          inputs: the keys and values of the layer that this one shares them with.

        Returns:
          The new cache (None without one) and the activations; where `inputs` came, also the keys and values that were
          looked at, for the layers that share them.
        """
        if plan is None:
            positions = jnp.asarray(segment_pos).astype(jnp.int32)
            valid = jnp.ones(positions.shape, bool)
            base = jnp.asarray(attn_mask).astype(bool)
            plan = _plan.plan_layer(self.spec, positions=positions, valid=valid, cache=cache, mask=base)
        queries, keys, values = self._project(x)
        queries = rotate(queries, plan.sin, plan.cos) * self.query_pre_attn_scalar
        new_cache = None
        if self.spec.shares_kv:
            keys, values = _given(inputs)
        else:
            keys = rotate(keys, plan.sin, plan.cos)
        if cache is not None and not self.spec.shares_kv:
            keys, values, new_cache = plan.write.store(cache, keys, values)
            keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
        kv, mask = (keys, values), plan.mask
        if memory is not None:
            keys, values, mask = memory.after(keys, values, mask)
        weights = attention_weights(queries, keys, mask, softcap=self.attn_logits_soft_cap)
        weights = self.attention_weights(weights.astype(queries.dtype))
        out = self.attn_vec_einsum("BTNH,NHD->BTD", weighted_values(weights, values))
        return (new_cache, out) if inputs is None else (new_cache, out, kv)

    def remember(self, source: Float[Array, "B S D"]) -> tuple[Array, Array]:
        """Keys and values of another sequence, for a `Memory`: projected and normed as the layer's own, not turned."""
        return self._project(source)[1:]

    def _project(self, x: Array) -> tuple[Array, Array | None, Array | None]:
        """Queries, keys and values, normed and not turned; of a layer that shares them, the queries alone."""
        spec, keys, values = self.spec, None, None
        if spec.fused_qkv:
            queries, keys, values = self.qkv_einsum("BTD,CNDH->CBTNH", x)
        else:
            queries = self.q_einsum("BTD,NDH->BTNH", x)
        if self.use_qk_norm:
            queries = self._query_norm(queries)
        if spec.shares_kv:
            return queries, None, None
        if spec.keys_as_values:
            keys = values = self.k_einsum("BTD,KDH->BTKH", x)
        elif not spec.fused_qkv:
            keys, values = self.kv_einsum("BTD,CKDH->CBTKH", x)
        keys = self._key_norm(keys) if self.use_qk_norm else keys
        return queries, keys, self._value_norm(values) if spec.value_norm else values


def _given(inputs: _per_layer.LayerInputs | None) -> _per_layer.KeysValues:
    if inputs is None or inputs.kv is None:
        raise ShapeError("this layer has no keys and values of its own: pass those of the layer it shares as inputs.kv")
    return inputs.kv


def norm_fields(module: Attention | Block) -> dict[str, Any]:
    """Fields of every norm of a layer."""
    plus_one = True if module.traits is None else module.traits.norm_plus_one
    return dict(eps=module.norm_eps, dtype=module.dtype, plus_one=plus_one)


def attention_fields(spec: LayerSpec) -> dict[str, Any]:
    """The constructor fields of `Attention` and `Block` that say what `spec` says; `spec_of` is the inverse."""
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


def spec_of(module: Attention | Block) -> LayerSpec:
    local = module.attn_type is AttentionType.LOCAL_SLIDING
    if local and module.sliding_window_size is None:
        raise ConfigError("Sliding_window_size must be set if Local Sliding attention type")
    said = dict(
        attention="local" if local else "global",
        window=module.sliding_window_size if local else None,
        bidirectional=module.bidirectional,
        num_heads=module.num_heads,
        num_kv_heads=module.num_kv_heads,
        head_dim=module.head_dim,
        mlp_size=getattr(module, "hidden_dim", 0 if module.traits is None else module.traits.mlp_size),
        rope_base=module.rope_base_frequency,
        rope_scale=module.rope_scale_factor,
        rope_fraction=module.rope_proportion,
        query_scale=module.query_pre_attn_scalar,
        attn_softcap=module.attn_logits_soft_cap,
        qk_norm=module.use_qk_norm,
    )
    if module.traits is not None:
        return dataclasses.replace(module.traits, **said)
    return LayerSpec(index=0, kv_source=0, **said)  # a module does not know its place in the network
