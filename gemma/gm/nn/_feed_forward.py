# SPDX-License-Identifier: Apache-2.0
"""What a block does to each token alone: the gated MLP, and the parts that Gemma 3n and 4 put beside it.

Attention and the block that joins everything are in `_modules.py`; the streams of Gemma 3n in `_streams.py`; experts in
`_experts.py`. Axis letters as in `_modules.py`; p is the width of a layer's per-layer input, r the rank of Laurel.
"""

from __future__ import annotations

import statistics

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemma.gm.nn import _layers
from gemma.gm.typing import Array, DType, Float


class FeedForward(nn.Module):
    """The gated MLP, `gelu(x @ gate) * (x @ up)` and down; GELU in its tanh form.

    Attributes:
      features: D.
      hidden_dim: F.
      transpose_gating_einsum: the kernel of gate and up is [2, F, D] and not [2, D, F].
      dtype: in which parameters are created; None: float32.
      sparsity: share of the gate's values of a token that are cut off, as if they were normally distributed: of what
        is left, the cut is subtracted. 0: none.
    """

    features: int
    hidden_dim: int
    transpose_gating_einsum: bool
    dtype: DType | None = None
    sparsity: float = 0.0

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
        gate = both[..., 0, :]
        if self.sparsity:
            gate = cut_off(gate, self.sparsity)
        return linear("...F,FD->...D", nn.gelu(gate, approximate=True) * both[..., 1, :])


def cut_off(gate: Float[Array, "*B F"], share: float) -> Float[Array, "*B F"]:
    """`relu(gate - cut)`: the cut is the quantile `share` of a normal distribution with each token's mean and
    (population) standard deviation; both are computed in float32."""
    wide = gate.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True))
    return jax.nn.relu(wide - (mean + deviation * statistics.NormalDist().inv_cdf(share))).astype(gate.dtype)


class Laurel(nn.Module):
    """The linear branch beside attention in Gemma 3n: D to the rank r and back.

    Attributes:
      features: D.
      rank: r.
      dtype: in which parameters are created; None: float32.
    """

    features: int
    rank: int
    dtype: DType | None = None

    def setup(self):
        self.linear_left = _layers.Einsum(shape=(self.features, self.rank), dtype=self.dtype)
        self.linear_right = _layers.Einsum(shape=(self.rank, self.features), dtype=self.dtype)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.linear_right("...r,rD->...D", self.linear_left("...D,Dr->...r", x))


class PerLayerMapping(nn.Module):
    """How a layer takes up its per-layer input: gated by the activations, projected to D, normed.

    Attributes:
      features: D.
      width: p.
      norm: fields of the `RMSNorm`.
      dtype: in which parameters are created; None: float32.
    """

    features: int
    width: int
    norm: dict
    dtype: DType | None = None

    def setup(self):
        self.per_layer_input_gate = _layers.Einsum(shape=(self.features, self.width), dtype=self.dtype)
        self.per_layer_projection = _layers.Einsum(shape=(self.width, self.features), dtype=self.dtype)
        self.post_per_layer_input_norm = _layers.RMSNorm(**self.norm)

    def __call__(self, x: Float[Array, "*B D"], given: Float[Array, "*B p"]) -> Float[Array, "*B D"]:
        """What is added to the activations, from them and the layer's input."""
        gated = nn.gelu(self.per_layer_input_gate("...D,Dp->...p", x), approximate=True) * given
        return self.post_per_layer_input_norm(self.per_layer_projection("...p,pD->...D", gated))
