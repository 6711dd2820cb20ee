# SPDX-License-Identifier: Apache-2.0
"""Base attention masks: who may look at whom before any sliding window. The window is added in `gm/nn/_plan.py`."""

import jax.numpy as jnp

from gemma.gm.typing import Array, Bool, Int


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
    groups = run_numbers(bidirectional_mask)
    return mask | same_group(groups, groups)


def run_numbers(marked: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """The number of the contiguous run that each marked token is in, counted from 1 in each row; 0 if not marked."""
    before = jnp.pad(marked, ((0, 0), (1, 0)))[:, :-1]
    return jnp.where(marked, jnp.cumsum(marked & ~before, axis=-1, dtype=jnp.int32), 0)


def same_group(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """Where a query and a key have the same group; 0 is no group."""
    return (queries[:, :, None] == keys[:, None, :]) & (keys > 0)[:, None, :]
