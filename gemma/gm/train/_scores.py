# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy and accuracy of labels without a gradient, for evaluation: a few rows of logits exist at a time.

Training uses `gm.losses.token_nll`, whose gradient is made the same way. Axis letters: B rows, T tokens, D, V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gemma.gm.typing import Array, Bool, Float, Int

_CHUNK = 256  # labels whose logits exist at the same time


def label_scores(
    head: Callable[[Any], Any],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    chunk: int = _CHUNK,
) -> tuple[Array, Array, Array]:
    """Scores of the labels.

    Args:
      head: hidden states [..., D] to logits [..., V].
      hidden: after the final norm.
      targets: the next tokens.
      mask: True where a target counts.
      chunk: how many labels share one product with the head.

    Returns:
      float32 scalars: the sum of -ln p(target), the number of labels, and how many were the likeliest id.
    """
    width = hidden.shape[-1]
    size = mask.size
    chunk = min(chunk, size)
    # Labels first, in their order; as many chunks as they fill, so that masked positions never meet the head.
    order = jnp.argsort(~mask.reshape(-1), stable=True)
    order = jnp.pad(order, (0, -size % chunk))
    flat, wanted = hidden.reshape(-1, width), targets.reshape(-1)
    labels = jnp.sum(mask, dtype=jnp.int32)

    def add(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        at = jax.lax.dynamic_slice(order, (i * chunk,), (chunk,))
        counts = jnp.arange(chunk, dtype=jnp.int32) + i * chunk < labels
        logits = head(jnp.take(flat, at, axis=0)).astype(jnp.float32)
        target = jnp.take(wanted, at)
        nll = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        right = counts & (jnp.argmax(logits, axis=-1).astype(target.dtype) == target)
        return sums[0] + jnp.sum(jnp.where(counts, nll, 0.0)), sums[1] + jnp.sum(right, dtype=jnp.float32)

    zero = jnp.zeros((), jnp.float32)
    total, right = jax.lax.fori_loop(0, (labels + chunk - 1) // chunk, add, (zero, zero))
    return total, labels.astype(jnp.float32), right
