# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy and log-probabilities of sequences, from activations in chunks, or from logits that exist already.

How the logits of all positions are avoided is `_chunked.py`; losses that compare log-probabilities are
`_preference.py`. The PyTorch side's cross-entropy is `gemma/_torch/loss.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gemma.errors import ConfigError, ShapeError
from gemma.gm.losses import _chunked
from gemma.gm.losses._head import Head, head
from gemma.gm.typing import Array, Bool, Float, Int, Params


def token_nll(
    model: nn.Module | Head,
    params: Params | None,
    hidden: Float[Array, "*B T D"],
    targets: Int[Array, "*B T"],
    mask: Bool[Array, "*B T"] | Float[Array, "*B T"],
    *,
    chunk: int | None = None,
    shards: int = 1,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of -ln p(target) over the positions that count, and their number; no more logits than of a chunk exist.

    Divide the sums of all micro-batches and devices, not their means: rows with few labels would count too much.

    Args:
      model: as in `head`; or a `Head`, with params None.
      params: its whole tree. Only leaves that a gradient is taken of cost one; a frozen head costs no product.
      hidden: of `hidden_states`.
      targets: the next token at each position; 0..V-1 where it counts, anything elsewhere.
      mask: True where a target counts; or constant weights, by which both results are weighted.
      chunk: positions whose logits exist at the same time; None: `_chunked.CHUNK_CPU`, or `CHUNK` elsewhere.
      shards: over how many devices the first axis of the batch is spread. Positions are then sorted inside of each
        share and nothing but sums travels. It must divide that axis; the result is the same for every number.

    Returns:
      Two float32 scalars, the first in nats; NaN where a target that counts is no id.

    Raises:
      ShapeError: shapes or dtypes that do not fit; a target outside of the vocabulary where it is known (not in jit).
    """
    head_ = _checked_head(model, params)
    targets, weights = _checked(head_, hidden, targets, mask)
    grouped = _grouped(hidden, targets, weights, shards)
    total = _chunked.nll_sum(head_, *grouped, _positions(chunk))
    return total, jnp.sum(weights)


def token_logps(
    model: nn.Module | Head,
    params: Params | None,
    hidden: Float[Array, "*B T D"],
    targets: Int[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    chunk: int | None = None,
    shards: int = 1,
) -> Float[Array, "*B T"]:
    """ln p of the target at each position that counts, 0 elsewhere; no more logits than of a chunk exist.

    What policy losses are computed from (`grpo`). Gradients may weigh every position differently.

    Args:
      model, params, hidden, targets, chunk, shards: as in `token_nll`.
      mask: True where a target counts.

    Returns:
      float32, nats.

    Raises:
      ShapeError: as `token_nll`.
    """
    head_ = _checked_head(model, params)
    targets, weights = _checked(head_, hidden, targets, mask)
    weights = (weights != 0).astype(jnp.float32)
    grouped = _grouped(hidden, targets, weights, shards)
    return -_chunked.nll_each(head_, *grouped, _positions(chunk)).reshape(targets.shape)


def sequence_logps(
    model: nn.Module | Head,
    params: Params | None,
    hidden: Float[Array, "*B T D"],
    targets: Int[Array, "*B T"],
    mask: Bool[Array, "*B T"],
    *,
    average: bool = False,
    chunk: int | None = None,
    shards: int = 1,
) -> Float[Array, "*B"]:
    """ln p of the targets that count in each row, summed; what preference losses are computed from.

    Args:
      model, params, hidden, targets, chunk, shards: as in `token_nll`.
      mask: True where a target counts.
      average: divide by the number of targets that count; a row without any has 0.

    Returns:
      float32, nats.

    Raises:
      ShapeError: as `token_nll`.
    """
    log_p = token_logps(model, params, hidden, targets, mask, chunk=chunk, shards=shards)
    total = jnp.sum(log_p, axis=-1)
    return total / jnp.maximum(jnp.sum(jnp.asarray(mask) != 0, axis=-1), 1) if average else total


def cross_entropy(
    logits: Float[Array, "*B T V"], targets: Int[Array, "*B T"], mask: Bool[Array, "*B T"] | Float[Array, "*B T"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """As `token_nll`, of logits that exist: (sum, count). For small models, and to compare with."""
    targets, weights = _checked_targets(logits, targets, mask, logits.shape[-1])
    log_p = logits_logps(logits, targets)
    return jnp.sum(jnp.where(weights != 0, -log_p * weights, 0)), jnp.sum(weights)


def logits_logps(logits: Float[Array, "*B T V"], targets: Int[Array, "*B T"]) -> Float[Array, "*B T"]:
    """ln p of the target at each position, float32, of logits that exist; `token_logps` does without them."""
    wide = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(wide, axis=-1)


def _checked_head(model: Any, params: Any) -> Head:
    return model if isinstance(model, Head) else head(model, params)


def _positions(chunk: int | None) -> int:
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ConfigError(f"chunk: expected a whole number of at least 1, or None, got {chunk!r}")
    return _chunked.default_chunk() if chunk is None else chunk


def _checked(head_: Head, hidden: Array, targets: Any, mask: Any) -> tuple[Array, Array]:
    """int32 targets, 0 where they do not count, and float32 weights."""
    vocab, width = head_.table.shape
    if hidden.ndim < 2 or hidden.shape[-1] != width:
        raise ShapeError(f"hidden: expected [..., T, {width}] as of hidden_states, got {tuple(hidden.shape)}")
    return _checked_targets(hidden, targets, mask, vocab)


def _checked_targets(rows: Array, targets: Any, mask: Any, vocab: int) -> tuple[Array, Array]:
    targets, mask = jnp.asarray(targets), jnp.asarray(mask)
    expected = tuple(rows.shape[:-1])
    if tuple(targets.shape) != expected or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ShapeError(f"targets: expected integers {expected}, got {targets.dtype} {tuple(targets.shape)}")
    if tuple(mask.shape) != expected:
        raise ShapeError(f"mask: expected {expected}, got the shape {tuple(mask.shape)}")
    weights = jax.lax.stop_gradient(mask.astype(jnp.float32))
    targets = jnp.where(weights != 0, targets, 0).astype(jnp.int32)
    if not isinstance(targets, jax.core.Tracer):
        known = np.asarray(targets)
        if known.size and not 0 <= known.min() <= known.max() < vocab:
            raise ShapeError(
                f"targets: expected ids in 0..{vocab - 1} where mask is True, got {_outside(known, vocab)}"
            )
    return targets, weights


def _outside(ids: np.ndarray, vocab: int) -> int:
    return int(ids[(ids < 0) | (ids >= vocab)][0])


def _grouped(hidden: Array, targets: Array, weights: Array, shards: int) -> tuple[Array, Array, Array]:
    """The three as [A, P, ...], A = shards."""
    if isinstance(shards, bool) or not isinstance(shards, int) or shards < 1:
        raise ConfigError(f"shards: expected a whole number of at least 1, got {shards!r}")
    if shards > 1 and (targets.ndim < 2 or targets.shape[0] % shards):
        raise ShapeError(f"shards: {shards} devices cannot share the first axis of targets {tuple(targets.shape)}")
    return hidden.reshape(shards, -1, hidden.shape[-1]), targets.reshape(shards, -1), weights.reshape(shards, -1)
