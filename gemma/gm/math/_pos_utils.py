# SPDX-License-Identifier: Apache-2.0
"""Positions from padding masks. What is done with positions is in `_positional_embeddings.py` and `gm/nn/_masks.py`."""

import jax.numpy as jnp

from gemma.gm.typing import Array, Bool, Int


def build_positions_from_mask(mask: Bool[Array, "*B T"]) -> Int[Array, "*B T"]:
    """The 0-based position of each token among the real tokens of its row.

    Padding before the first token stands at 0, padding after a token repeats that token's position:

        mask       0 0 1 1 1 0
        positions  0 0 0 1 2 2

    Args:
      mask: True where there is a token, on either side of which there may be padding.

    Returns:
      int32 positions.
    """
    counted = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
    return jnp.maximum(counted - 1, 0)
