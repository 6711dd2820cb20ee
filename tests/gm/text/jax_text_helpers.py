# SPDX-License-Identifier: Apache-2.0
"""What several tests of this folder import: a prompt, and generation without any cache to compare with."""

from __future__ import annotations

import functools

import jax
import jax.experimental
import numpy as np

from gemma.gm.text import LoadedModel, SamplingMethod

PROMPT = [2, *range(40, 53)]  # longer than the window of 5


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, params, tokens):
    return model.apply({"params": params}, tokens).logits


def raw_logits(model, params, ids: list[int]) -> np.ndarray:
    """float32 [V] after `ids`, by one whole forward pass."""
    # Few shapes, so that little is compiled: causality keeps the padding on the right out of sight.
    tokens = np.zeros((1, max(128, 1 << (len(ids) - 1).bit_length())), np.int32)
    tokens[0, : len(ids)] = ids
    return np.array(_forward(model, params, tokens)[0, len(ids) - 1], np.float32)


def logits_after(loaded: LoadedModel, ids: list[int], *, model=None) -> np.ndarray:
    """As `raw_logits`; -inf where the samplers never pick. `model` replaces the loaded one."""
    logits = raw_logits(loaded.model if model is None else model, loaded.params, ids)
    logits[0] = -np.inf  # the padding
    logits[loaded.tokenizer.vocab_size :] = -np.inf  # rows that no token has
    return logits


def naive(loaded: LoadedModel, ids: list[int], count: int, ends=(), *, model=None) -> list[int]:
    """Greedy continuation by whole forward passes: no cache, no padding that matters, no batch."""
    made: list[int] = []
    while len(made) < count and not (made and made[-1] in ends):
        made.append(int(logits_after(loaded, [*ids, *made], model=model).argmax()))
    return made


class Scripted(SamplingMethod):
    """Says what it is told, whatever the model thinks, and <eos> when it has said all; one object, one compilation."""

    def __init__(self, tokenizer):
        self._tokenizer, self._left = tokenizer, []

    def say(self, text: str, *, end: bool = True) -> Scripted:
        self._left = [*self._tokenizer.encode(text, parse_special=False)]
        self._left += [self._tokenizer.special.end_of_turn] if end else []
        return self

    def get_next_tokens(self, logits, rng):
        shape = jax.ShapeDtypeStruct(logits.shape[:-1], np.int32)
        return jax.experimental.io_callback(lambda: np.full(shape.shape, self._next(), np.int32), shape, ordered=True)

    def _next(self) -> int:
        return self._left.pop(0) if self._left else self._tokenizer.special.eos
