# SPDX-License-Identifier: Apache-2.0
"""Scores to weights, weights to values: the two halves of attention, without parameters.

Who is projected and turned is `_modules.py` and `_cross.py`, who may look at whom `_plan.py`. Axis letters as there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemma.gm.typing import Array, Bool, Float

MASKED = -2.3819763e38  # finite, so that a row without keys gives numbers and not NaN


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
