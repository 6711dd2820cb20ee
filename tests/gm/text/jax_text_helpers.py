# SPDX-License-Identifier: Apache-2.0
"""What several tests of this folder import: a prompt, and generation without any cache to compare with."""

from __future__ import annotations

import functools

import jax
import numpy as np

from gemma.gm.text import LoadedModel

PROMPT = [2, *range(40, 53)]  # longer than the window of 5


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens):
    return model.apply({"params": params}, tokens).logits


def logits_after(loaded: LoadedModel, ids: list[int]) -> np.ndarray:
    """float32 [V] after `ids`, by one whole forward pass; -inf where the samplers never pick."""
    # Few shapes, so that little is compiled: causality keeps the padding on the right out of sight.
    tokens = np.zeros((1, max(128, 1 << (len(ids) - 1).bit_length())), np.int32)
    tokens[0, : len(ids)] = ids
    logits = np.array(_forward(loaded.model, loaded.params, tokens)[0, len(ids) - 1], np.float32)
    logits[0] = -np.inf  # the padding
    logits[loaded.tokenizer.vocab_size :] = -np.inf  # rows that no token has
    return logits


def naive(loaded: LoadedModel, ids: list[int], count: int, ends=()) -> list[int]:
    """Greedy continuation by whole forward passes: no cache, no padding that matters, no batch."""
    made: list[int] = []
    while len(made) < count and not (made and made[-1] in ends):
        made.append(int(logits_after(loaded, [*ids, *made]).argmax()))
    return made
