# SPDX-License-Identifier: Apache-2.0
"""What some layers get besides the activations (Gemma 3n and 4): per-layer inputs, and another layer's keys and values.

`LayerInputs` is handed to a block; whoever hands it over gets the block's own keys and values back as a third result,
for the layers after it that share them. Nothing is kept elsewhere: the same code runs with a cache, without one and
under gradient checkpointing. How a layer takes up its input is `PerLayerMapping` in `_feed_forward.py`.
"""

from __future__ import annotations

import flax
import jax.numpy as jnp
from flax import linen as nn

from gemma.gm.nn import _layers
from gemma.gm.typing import Array, DType, Float, Int

KeysValues = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]


@flax.struct.dataclass
class LayerInputs:
    """What one layer gets.

    Attributes:
      kv: keys, normed and turned, and values of the layer that this one shares them with; None for a layer of its own.
      per_layer: this layer's part of the per-layer inputs, or None.
    """

    kv: KeysValues | None = None
    per_layer: Float[Array, "B T p"] | None = None


class PerLayerInputs(nn.Module):
    """The per-layer inputs of all layers: a row of a table for each token, and a projection of its embedding.

    Attributes:
      vocab_size: v, rows of the table; a token beyond them counts as the padding, 0.
      num_layers: L.
      width: p.
      features: D.
      norm: fields of the `RMSNorm`.
      dtype: in which parameters are created; None: float32.
    """

    vocab_size: int
    num_layers: int
    width: int
    features: int
    norm: dict
    dtype: DType | None = None

    def setup(self):
        small, dtype = nn.initializers.normal(), self.dtype or jnp.float32
        shape = (self.vocab_size, self.num_layers, self.width)
        self.table = self.param("per_layer_input_embedding", small, shape, dtype)
        self.per_layer_input_projection = _layers.Einsum(
            shape=(self.features, self.num_layers, self.width), dtype=self.dtype
        )
        self.per_layer_projection_norm = _layers.RMSNorm(**self.norm)

    def __call__(self, tokens: Int[Array, "B T"], x: Float[Array, "B T D"]) -> Float[Array, "B T L p"]:
        """From the tokens and their scaled embeddings."""
        rows = self.table[jnp.where((tokens >= 0) & (tokens < self.vocab_size), tokens, 0)]
        rows = rows * jnp.sqrt(jnp.float32(self.width)).astype(rows.dtype)
        projected = self.per_layer_input_projection("BTD,DLp->BTLp", x) * self.features**-0.5
        return (self.per_layer_projection_norm(projected) + rows) * 2**-0.5
