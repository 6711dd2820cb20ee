# SPDX-License-Identifier: Apache-2.0
"""The host's side of generation: what each row of a batch holds, padded chunks, growing caches, the model's limit.

`Engine` is private; `Sampler` and `Session` are its faces. What it runs on the device is in `_loop.py`.

Its invariant makes every later turn equal to one pass over the whole transcript: `ids[b]` is the transcript of row b,
the cache holds its first `stored[b]` ids and nothing else, and a call reads exactly `ids[b][stored[b]:]`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import ContextFull, PromptError, SamplingError, ShapeError
from gemma.fit import PREFILL_BUCKETS, cache_bucket
from gemma.gm import _compile_cache
from gemma.gm.nn import WindowedCache
from gemma.gm.text import _loop
from gemma.gm.typing import Params

PAD = 0  # padding in every Gemma vocabulary; the networks skip it
BUCKETS = PREFILL_BUCKETS


class Engine:
    """A batch of sequences in front of one model.

    Attributes:
      ids: by row, everything that was read or generated, an end token included.
      stored: by row, how many of them the cache holds.
      limit: tokens a row may hold, the model's own.
    """

    def __init__(self, model: Any, params: Params, rows: int, *, cache_length: int, buckets: Sequence[int] = BUCKETS):
        _compile_cache.enable()
        # A module that already says `return_last_only` must not be told so again at the call.
        self.model = model.clone(return_last_only=None) if model.return_last_only is not None else model
        self.params = params
        check_params(self.model.config, params)
        self.limit: int = model.config.source.max_position_embeddings
        self.buckets = tuple(sorted(buckets))
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.stored = [0] * rows
        self.capacity = min(max(cache_length, 1), self.limit)
        self._cache: Any = None
        self._state: _loop.State | None = None

    @property
    def vocab_rows(self) -> int:
        """V, the number of logits."""
        return self.model.config.num_embed

    @property
    def cache(self) -> WindowedCache:
        """The cache; a call of `start`, `step` or `run` consumes it and leaves a new one."""
        if self._cache is not None:
            return self._cache
        if self._state is not None:
            return self._state.cache
        dtype = self.params["embedder"]["input_embedding"].dtype
        return self.model.init_cache(batch_size=len(self.ids), dtype=dtype, cache_length=self.capacity, windowed=True)

    @property
    def key(self) -> jax.Array:
        """The JAX key after the last pick."""
        assert self._state is not None, "nothing was generated yet"
        return self._state.key

    def fork(self) -> Engine:
        """An engine that goes on from here, while this one can still be continued as well."""
        twin = copy.copy(self)
        twin.ids, twin.stored = [list(row) for row in self.ids], list(self.stored)
        twin._cache, twin._state = jax.tree.map(jnp.copy, (self._cache, self._state))
        return twin

    def room(self, new: int = 0) -> int:
        """Tokens that can still be generated after `new` more of prompt, in the fullest row."""
        return self.limit - max(map(len, self.ids)) - new

    def start(
        self,
        new: Sequence[Sequence[int]],
        how: _loop.How,
        choice: _loop.Choice,
        *,
        reserve: int,
        key: jax.Array,
        u: np.ndarray,
        penalty: bool = False,
    ) -> np.ndarray:
        """Appends to every row, reads what is not stored yet, and picks the first new token.

        Args:
          new: ids by row; 0, the padding, is not allowed.
          how: how tokens are picked.
          choice: what may be picked.
          reserve: tokens to be generated, the first one included.
          key: for the official sampling methods.
          u: float32 [B], the uniform numbers of the first pick.
          penalty: whether `how` looks at what was seen.

        Returns:
          int32 [B], the first tokens.

        Raises:
          PromptError: nothing to read, or an id outside of the vocabulary.
          ContextFull: the model's limit; nothing was changed.
        """
        rows = [self._appended(b, part) for b, part in enumerate(new)]
        self._reserve(max(len(row) for row in rows) + reserve - 1, max(len(row) for row in rows) + reserve)
        self.ids = rows
        chunks = self._chunks([row[n:] for row, n in zip(rows, self.stored)])
        seen = np.zeros((len(rows), self.vocab_rows if penalty else 0), bool)
        if penalty:
            for b, row in enumerate(rows):
                seen[b, row] = True
        cache, carried = self._give_cache(), None
        for tokens in chunks[:-1]:
            carried, cache = _loop.read(self.model, self.params, tokens, cache, carried)
        state = _loop.read_and_pick(self.model, how, self.params, choice, chunks[-1], cache, carried, seen, key, u)
        return self._took(state, np.asarray(state.pending)[:, None])[:, 0]

    def step(self, how: _loop.How, choice: _loop.Choice, u: np.ndarray) -> np.ndarray:
        """One more token for each row that is not done: int32 [B], 0 in rows that are."""
        state = _loop.step(self.model, how, self.params, choice, self._give_state(), u)
        return self._took(state, np.asarray(state.pending)[:, None])[:, 0]

    def run(self, how: _loop.How, choice: _loop.Choice, count: int, u: np.ndarray) -> np.ndarray:
        """Up to `count` more tokens on the device, at most u.shape[1]: int32 [B, n], n the number of steps made."""
        state = self._give_state()
        state, tokens, made = _loop.steps(self.model, how, self.params, choice, state, np.int32(count), u)
        return self._took(state, np.asarray(tokens)[:, : int(made)])

    @property
    def done(self) -> bool:
        """Whether every row has met an end token."""
        return self._state is not None and bool(np.asarray(self._state.done).all())

    def _give_cache(self) -> WindowedCache:
        """The cache, to be consumed. Until `_took`, nothing counts as stored: after an error all is read again."""
        cache = self.cache
        self._cache, self._state, self.stored = None, None, [0] * len(self.ids)
        return cache

    def _give_state(self) -> _loop.State:
        state = self._state
        assert state is not None, "start() comes first"
        self._give_cache()
        return state

    def _took(self, state: _loop.State, tokens: np.ndarray) -> np.ndarray:
        """Adds tokens [B, n] to the transcripts; a 0 is no token. The last one of each row is never stored yet."""
        if bool(state.bad):
            raise SamplingError(
                "the logits are not finite: either the weights hold NaN or the dtype is too small for them (try "
                "float32), or every token is forbidden"
            )
        for row, new in zip(self.ids, tokens):
            row.extend(int(token) for token in new if token != PAD)
        self._state, self.stored = state, [len(row) - 1 for row in self.ids]
        return tokens

    def _appended(self, b: int, new: Sequence[int]) -> list[int]:
        row = [*self.ids[b], *(int(token) for token in new)]
        outside = [token for token in new if not 0 <= token < self.vocab_rows]
        if outside:
            raise PromptError(f"prompt {b}: expected ids in 0..{self.vocab_rows - 1}, got {outside[0]}")
        if PAD in new:
            raise PromptError(f"prompt {b}: id {PAD} is padding and cannot be part of a prompt")
        if len(row) == self.stored[b]:
            raise PromptError(f"prompt {b} is empty: give at least one token")
        return row

    def _chunks(self, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Rows of different lengths as chunks int32 [B, T], padded on the right to a bucket."""
        longest, chunks, start = max(map(len, rows)), [], 0
        while start < longest:
            width = min(longest - start, self.buckets[-1])
            bucket = next(size for size in self.buckets if size >= width)
            tokens = np.full((len(rows), bucket), PAD, np.int32)
            for b, row in enumerate(rows):
                part = row[start : start + width]
                tokens[b, : len(part)] = part
            chunks.append(tokens)
            start += width
        return chunks

    def _reserve(self, slots: int, total: int) -> None:
        """Makes the cache large enough for `slots` tokens; the transcript will have `total`."""
        if total > self.limit:
            raise ContextFull(total, self.limit)
        if slots <= self.capacity:
            return
        length = cache_bucket(slots, self.limit)
        if self._cache is not None or self._state is not None:
            grown = grow_cache(self.cache, self.model.config.layers, length)
            self._cache, self._state = grown, None
        self.capacity = length


def check_params(config: Any, params: Any) -> None:
    """Refuses parameters of another model by one look at their table and layers, before anything is compiled.

    Raises:
      ShapeError: not the tree of `model.init(...)["params"]`, or of other sizes; the message names the leaf.
    """
    keys = sorted(params) if isinstance(params, Mapping) else []
    table = params["embedder"].get("input_embedding") if "embedder" in keys else None
    if table is None:
        inner = ' (is it params["params"] that is meant?)' if "params" in keys else ""
        got = ", ".join(keys[:4]) or type(params).__name__
        raise ShapeError(f"params: expected a tree with embedder/input_embedding, got {got}{inner}")
    expected = (config.num_embed, config.embed_dim)
    if hasattr(table, "shape") and tuple(table.shape) != expected:
        raise ShapeError(
            f"params: embedder/input_embedding: the model expects the shape {expected}, got {tuple(table.shape)}: "
            f"these are the parameters of another size"
        )
    layers = sum(key.startswith("layer_") for key in keys)
    if layers != config.num_layers:
        raise ShapeError(f"params: the model has {config.num_layers} layers, the parameters {layers}")


def grow_cache(cache: WindowedCache, layers: Sequence[Any], length: int) -> WindowedCache:
    """The same content with room for `length` tokens.

    A slot holds token number `slot` as long as a layer has not gone round, and a layer that has is a full ring of its
    window, whose length does not change. So longer arrays with empty slots at the end are all it takes.
    """
    grown = {}
    for spec in layers:
        layer = cache[f"layer_{spec.index}"]
        more = spec.cache_length(length) - layer["positions"].shape[1]
        pad = ((0, 0), (0, more), (0, 0), (0, 0))
        grown[f"layer_{spec.index}"] = layer | {
            "k": jnp.pad(layer["k"], pad),
            "v": jnp.pad(layer["v"], pad),
            "positions": jnp.pad(layer["positions"], pad[:2], constant_values=-1),
        }
    return WindowedCache(grown, cache_length=length)
