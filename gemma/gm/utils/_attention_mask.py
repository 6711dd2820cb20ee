# SPDX-License-Identifier: Apache-2.0
"""Base attention masks: who may look at whom before any sliding window. The window is added in `gm/nn/_masks.py`."""

import jax.numpy as jnp

from gemma.gm.typing import Array, Bool


def make_causal_mask(valid: Bool[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Each query (rows) sees the real tokens (columns) up to itself.

    valid  1 1 1 0        1 . . .
                          1 1 . .
                          1 1 1 .
                          1 1 1 .     a padding query sees what precedes it, so that no row is empty
    """
    index = jnp.arange(valid.shape[-1])
    return (index[None, :] <= index[:, None])[None] & valid[:, None, :]


def make_causal_bidirectional_attention_mask(
    causal_mask: Bool[Array, "B T"], *, bidirectional_mask: Bool[Array, "B T"] | None = None
) -> Bool[Array, "B T T"]:
    """The causal mask, and full sight inside each contiguous run of `bidirectional_mask` (the tokens of one image).

        causal         1 1 1 1 1        1 . . . .
        bidirectional  . 1 1 . .        1 1 1 . .
                                        1 1 1 . .
                                        1 1 1 1 .
                                        1 1 1 1 1

    Args:
      causal_mask: True where there is a token, False on padding.
      bidirectional_mask: True on the tokens of images; None: causal everywhere.
    """
    mask = make_causal_mask(causal_mask)
    if bidirectional_mask is None:
        return mask
    before = jnp.pad(bidirectional_mask, ((0, 0), (1, 0)))[:, :-1]
    run = jnp.cumsum(bidirectional_mask & ~before, axis=-1, dtype=jnp.int32)  # number of the run, counted from 1
    same_run = run[:, :, None] == run[:, None, :]
    return mask | (same_run & bidirectional_mask[:, :, None] & bidirectional_mask[:, None, :])
