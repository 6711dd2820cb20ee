# SPDX-License-Identifier: Apache-2.0
"""What a sampler gives back: the state after sampling, from which a later call goes on, and the output around it.

The loop itself is `_loop.py` on the device and `_engine.py` on the host; `SamplerLoop`, the official one for caches of the
full layout, is `_full_loop.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma.gm.text._engine import Engine
from gemma.gm.text._full_loop import SamplerLoop
from gemma.gm.text._full_loop import (
    mask_full_attention_mask_prefix_for_next_turn as _mask_full_attention_mask_prefix_for_next_turn,
)
from gemma.gm.typing import Array, Int

__all__ = ["SamplerLoop", "SamplerOutput", "SamplingState", "_mask_full_attention_mask_prefix_for_next_turn"]


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingState:
    """A batch after sampling. Pass it as `last_state` to go on; it can be used more than once.

    Attributes:
      predicted_tokens: int32 [B, L], what was generated in this call; 0 after a row's end token.
      predicted_logprobs: float32 [B, L], natural log-probabilities of these tokens under the network itself, before
        penalties, temperature and cuts; 0 after a row's end token.
      done: bool [B], rows that ended with an end or stop token.
      rng: the JAX key for going on.
      dropped: int32 [B], tokens at the beginning of the transcript that this call gave up to make room; always 0
        unless the sampler's `context_policy` is "slide".
    """

    predicted_tokens: np.ndarray
    predicted_logprobs: np.ndarray
    done: np.ndarray
    rng: jax.Array
    dropped: np.ndarray
    _engine: Engine = dataclasses.field(repr=False)
    _ids: tuple[tuple[int, ...], ...] = dataclasses.field(repr=False)
    _soft: tuple[tuple[Array, ...], ...] = dataclasses.field(repr=False)
    _serial: int = dataclasses.field(repr=False)

    @classmethod
    def of(cls, engine: Engine, tokens: np.ndarray, logprobs: np.ndarray, dropped: np.ndarray) -> SamplingState:
        """The state of an engine as it stands."""
        ids, soft = tuple(map(tuple, engine.ids)), tuple(map(tuple, engine.soft))
        return cls(tokens, logprobs, engine.done, engine.key, dropped, engine, ids, soft, engine.serial)

    def engine(self, *, keep: bool = True) -> Engine:
        """An engine that goes on from here.

        Args:
          keep: this state will be used again. Otherwise its cache is handed over, not copied; should it be used again
            after all, the whole transcript is read anew.
        """
        if self._engine.serial == self._serial:
            return self._engine.fork() if keep else self._engine
        again = self._engine.blank()
        again.replace(self._ids, self._soft)
        return again

    @property
    def transcripts(self) -> list[list[int]]:
        """By row, all ids from the first turn on; an image is one marker."""
        images = self._engine.image_tokens
        return [list(row) if images is None else images.collapse(row) for row in self._ids]

    @property
    def step(self) -> int:
        """Tokens generated in this call, in the longest row."""
        return self.predicted_tokens.shape[1]

    @property
    def last_token(self) -> np.ndarray:
        """int32 [B], the last token of each row; it is not in the cache yet."""
        return np.array([row[-1] for row in self._ids], np.int32)

    @property
    def last_token_pos(self) -> np.ndarray:
        """int32 [B], its position, 0-based; the soft tokens of images count."""
        return np.array([len(row) - 1 for row in self._ids], np.int32)

    @property
    def used_cache_length(self) -> np.ndarray:
        """int32 [B], tokens that the cache holds."""
        return self.last_token_pos

    @property
    def init_cache_length(self) -> np.ndarray:
        """int32 [B], tokens before those of this call."""
        return self.last_token_pos + 1 - (self.predicted_tokens != 0).sum(axis=1, dtype=np.int32)

    @property
    def cache(self) -> Any:
        """The key/value cache, windowed layout. It is that of the newest call where this state was handed over."""
        return self._engine.cache


@dataclasses.dataclass(frozen=True, eq=False)
class SamplerOutput:
    """Text and state.

    Attributes:
      text: a `str` for one prompt, a list for several; with `num_samples` above 1, a list of samples in place of each.
      state: of all rows; the samples of a prompt are neighbours.
    """

    text: str | list[str] | list[list[str]]
    state: SamplingState

    @property
    def tokens(self) -> np.ndarray:
        """What was generated, int32, with the axes of `text` and the tokens: [L], [B, L] or [B, samples, L]."""
        return self._arranged(self.state.predicted_tokens)

    @property
    def logprobs(self) -> np.ndarray:
        """float32, the log-probability of each token of `tokens`."""
        return self._arranged(self.state.predicted_logprobs)

    def _arranged(self, array: np.ndarray) -> np.ndarray:
        if isinstance(self.text, str):
            return array[0]
        if isinstance(self.text[0], str):
            return array
        return array.reshape(len(self.text), -1, array.shape[1])


def _mask_tokens_after_end_tokens(tokens: Int[Array, "B L"], *, end_tokens: tuple[int, ...]) -> Int[Array, "B L"]:
    """Tokens with 0 in place of everything after the first end token of each row."""
    tokens = jnp.asarray(tokens)
    ends = jnp.isin(tokens, jnp.asarray(end_tokens, tokens.dtype)).astype(jnp.int32)
    return jnp.where(jnp.cumsum(ends, axis=-1) - ends == 0, tokens, 0)
