# SPDX-License-Identifier: Apache-2.0
"""The loss of teacher forcing: the decoder reads the right text and is asked for the next token everywhere at once.

Decoder inputs and labels are made by `make_targets`, shifted against each other once and with an eos at the end. What is
done with gradients is the trainer's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemma.errors import PromptError
from gemma.gm.typing import Array, Float, Int, Params
from gemma.research.t5gemma import _inputs
from gemma.research.t5gemma.t5gemma import T5Gemma


def loss(
    model: T5Gemma,
    params: Params,
    input_tokens: Int[Array, "B S"],
    target_tokens: Int[Array, "B T"] | None,
    labels: Int[Array, "B T"],
    *,
    bos: int = 2,
    images: Array | None = None,
) -> Float[Array, ""]:
    """Mean cross-entropy, in nats, over the labels that are not -100; float32.

    Args:
      model: the network.
      params: its parameters.
      input_tokens: what the encoder reads; 0 is padding.
      target_tokens: what the decoder reads; None: the labels, shifted to the right once.
      labels: what the decoder should say after each of them; -100 where nothing is to be learnt. They are not shifted
        again.
      bos: what the decoder starts with, where `target_tokens` follow from the labels.
      images: of a T5Gemma 2.

    Raises:
      ShapeError, PromptError: (ValueErrors) labels that do not belong to `target_tokens`, or that ask for nothing.
        Under jit only shapes are looked at.
    """
    if target_tokens is None:
        labels = jnp.asarray(labels)
        start = jnp.full((labels.shape[0], 1), bos, labels.dtype)
        target_tokens = jnp.concatenate([start, labels[:, :-1]], axis=1)
        target_tokens = jnp.where(target_tokens == _inputs.IGNORED, 0, target_tokens)
    _inputs.check_aligned(target_tokens, labels)
    counted = jnp.asarray(labels) != _inputs.IGNORED
    if _inputs.known(counted) and not bool(counted.any()):
        raise PromptError("labels: every one is -100, so that there is nothing to learn")
    logits = model.apply({"params": params}, target_tokens, input_tokens, images=images).logits.astype(jnp.float32)
    wanted = jnp.where(counted, labels, 0)[..., None]
    said = jnp.take_along_axis(logits, wanted, axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return -jnp.sum(jnp.where(counted, said, 0.0)) / jnp.maximum(jnp.sum(counted), 1).astype(jnp.float32)
