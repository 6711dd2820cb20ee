# SPDX-License-Identifier: Apache-2.0
"""The experts of Gemma 4 26B-A4B: a branch beside each layer's dense MLP, in which every token uses a few of many MLPs.

The dense MLP is `_feed_forward.py`; the block that has both is in `_modules.py`. Every expert computes every token here
and the router's weights, most of which are 0, add them up: exact and simple, and as slow as that sounds. Letters: e
experts, f the width of one; the others as in `_modules.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemma.config import ExpertsConfig
from gemma.gm.nn import _layers
from gemma.gm.typing import Array, DType, Float


class Experts(nn.Module):
    """Adds the experts' branch to the result of the dense MLP.

    Attributes:
      config: how many experts, how many a token uses, how wide they are.
      features: D.
      norm: fields of every `RMSNorm`.
      dtype: in which parameters are created; None: float32.
    """

    config: ExpertsConfig
    features: int
    norm: dict
    dtype: DType | None = None

    def setup(self):
        count, width, D, dtype = self.config.num_experts, self.config.intermediate_size, self.features, self.dtype
        ones = nn.initializers.ones_init()
        self.router_norm = _layers.RMSNorm(**self.norm, with_scale=False)
        self.router_logits = _layers.Einsum(shape=(D, count), dtype=dtype)
        self.router_scale = self.param("router_scale", ones, (D,), dtype or jnp.float32)
        self.per_expert_scale = self.param("per_expert_scale", ones, (count,), dtype or jnp.float32)
        self.gating_einsum = _layers.Einsum(shape=(count, 2, width, D), dtype=dtype)
        self.linear = _layers.Einsum(shape=(count, width, D), dtype=dtype)
        self.post_ffw1_norm = _layers.RMSNorm(**self.norm)
        self.pre_ffw2_norm = _layers.RMSNorm(**self.norm)
        self.post_ffw2_norm = _layers.RMSNorm(**self.norm)

    def __call__(self, x: Float[Array, "B T D"], dense: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """From the activations before the MLP's norm, and what the MLP made of them."""
        both = self.gating_einsum("BTD,eCfD->BTeCf", self.pre_ffw2_norm(x))
        active = nn.gelu(both[..., 0, :], approximate=True) * both[..., 1, :] * self._shares(x)[..., None]
        return self.post_ffw1_norm(dense) + self.post_ffw2_norm(self.linear("BTef,efD->BTD", active))

    def _shares(self, x: Float[Array, "B T D"]) -> Float[Array, "B T e"]:
        """How much each expert says to each token: the likeliest ones' probabilities, made to sum to 1, times the
        experts' own scales; 0 for the others."""
        routed = self.router_norm(x) * _layers.along_last(self.router_scale, x) * self.features**-0.5
        scores = self.router_logits("BTD,De->BTe", routed)
        probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
        top, chosen = jax.lax.top_k(probabilities, self.config.top_k)
        top = top / jnp.sum(top, axis=-1, keepdims=True)
        hot = jax.nn.one_hot(chosen, self.config.num_experts, dtype=jnp.float32)
        shares = jnp.einsum("BTk,BTke->BTe", top, hot)
        shares = shares * _layers.along_last(self.per_expert_scale, shares)
        return shares.astype(x.dtype)
