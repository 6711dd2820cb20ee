# SPDX-License-Identifier: Apache-2.0
"""What a decoder looks at of an encoded input: `Memory`, and the attention that has only that to look at.

A T5Gemma's layers have a `CrossAttention` after their own attention; in a T5Gemma 2 the layer's own attention projects
the encoded input too, and looks at both at once (`Attention.remember`, `Memory.after`). Keys of a memory are never
turned: the input has no place on the decoder's line. Axis letters as in `_modules.py`, and Z the encoder's width.
"""

from __future__ import annotations

import flax
import jax.numpy as jnp
from flax import linen as nn

from gemma.config import LayerSpec
from gemma.errors import ShapeError
from gemma.gm.nn import _layers
from gemma.gm.nn._attend import attention_weights, weighted_values
from gemma.gm.typing import Array, Bool, DType, Float


@flax.struct.dataclass
class Memory:
    """One layer's keys and values of the encoded input; the same in every step."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    valid: Bool[Array, "B S"]  # False on padding

    def mask(self, queries: int) -> Bool[Array, "B T S"]:
        """Every one of T queries may look at all that is no padding."""
        return jnp.broadcast_to(self.valid[:, None, :], (self.valid.shape[0], queries, self.valid.shape[1]))

    def after(self, k: Array, v: Array, mask: Bool[Array, "B T S"]) -> tuple[Array, Array, Array]:
        """A layer's own keys, values and mask, followed by these."""
        k, v = (jnp.concatenate([own, new.astype(own.dtype)], axis=1) for own, new in ((k, self.k), (v, self.v)))
        return k, v, jnp.concatenate([mask, self.mask(mask.shape[1])], axis=2)


class CrossAttention(nn.Module):
    """Grouped-query attention over a `Memory`: no RoPE, no window, and its kernels are never fused.

    Attributes:
      num_heads: N.
      num_kv_heads: K.
      features: D, width of the decoder.
      source_features: Z, width of the encoder.
      head_dim: H.
      query_pre_attn_scalar: queries are multiplied by it.
      attn_logits_soft_cap: as in `Attention`.
      dtype: in which parameters are created; None: float32.
    """

    num_heads: int
    num_kv_heads: int
    features: int
    source_features: int
    head_dim: int
    query_pre_attn_scalar: float
    attn_logits_soft_cap: float | None = None
    dtype: DType | None = None

    @classmethod
    def of(cls, spec: LayerSpec, features: int, source_features: int, dtype: DType | None = None) -> CrossAttention:
        """The cross-attention of one decoder layer: heads, scale and cap are those of its own attention."""
        return cls(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            features=features,
            source_features=source_features,
            head_dim=spec.head_dim,
            query_pre_attn_scalar=spec.query_scale,
            attn_logits_soft_cap=spec.attn_softcap,
            dtype=dtype,
        )

    def setup(self):
        N, K, D, Z, H = self.num_heads, self.num_kv_heads, self.features, self.source_features, self.head_dim
        self.q_einsum = _layers.Einsum(shape=(N, D, H), dtype=self.dtype)
        self.kv_einsum = _layers.Einsum(shape=(2, K, Z, H), dtype=self.dtype)
        self.attn_vec_einsum = _layers.Einsum(shape=(N, H, D), dtype=self.dtype)

    def remember(self, source: Float[Array, "B S Z"]) -> tuple[Array, Array]:
        """Keys and values [B, S, K, H] of the encoded input, for a `Memory`."""
        keys, values = self.kv_einsum("BSZ,CKZH->CBSKH", source)
        return keys, values

    def __call__(self, x: Float[Array, "B T D"], memory: Memory | None) -> Float[Array, "B T D"]:
        """What each query makes of the encoded input."""
        if memory is None:
            raise ShapeError("a layer with cross-attention needs a memory of the encoded input: see Block.remember")
        queries = self.q_einsum("BTD,NDH->BTNH", x) * self.query_pre_attn_scalar
        keys, values = memory.k.astype(queries.dtype), memory.v.astype(queries.dtype)
        weights = attention_weights(queries, keys, memory.mask(x.shape[1]), softcap=self.attn_logits_soft_cap)
        mixed = weighted_values(weights.astype(queries.dtype), values)
        return self.attn_vec_einsum("BTNH,NHD->BTD", mixed)
