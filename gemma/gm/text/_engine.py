# SPDX-License-Identifier: Apache-2.0
"""The host's side of generation: what each row of a batch holds, padded chunks, growing caches, the model's limit.

`Engine` is private; `Sampler`, `ChatSampler` and `Session` are its faces. What it runs on the device is `_loop.py`.

Its invariant makes every later turn equal to one pass over the whole transcript: `ids[b]` is the transcript of row b,
the cache holds its first `stored[b]` ids and nothing else, and a call reads exactly `ids[b][stored[b]:]`.

A transcript is expanded: an image stands in it with all its ids, -2 for each soft token (`gm/vision/_prompt.py`), so
every id takes one slot of the cache. Images are encoded once, when they come; what is kept of them is their vectors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import ContextFull, PromptError, SamplingError
from gemma.fit import PREFILL_BUCKETS, cache_bucket
from gemma.gm import _compile_cache
from gemma.gm.nn import WindowedCache
from gemma.gm.text import _loop, _placement
from gemma.gm.text._check import check_params
from gemma.gm.typing import Array, Float, Params
from gemma.gm.vision import ImageTokens, _token_utils, plan_chunks

PAD = 0  # padding in every Gemma vocabulary; the networks skip it
BUCKETS = PREFILL_BUCKETS
SOFT = _token_utils.SOFT_TOKEN_PLACEHOLDER


class Picked(NamedTuple):
    """Tokens that one call made."""

    tokens: np.ndarray  # int32 [B, n]; 0 in rows that had ended
    logprobs: np.ndarray  # float32 [B, n], natural, under the network itself


class Engine:
    """A batch of sequences in front of one model.

    Attributes:
      ids: by row, everything that was read or generated, an end token included; -2 for a soft token.
      soft: by row, the vectors [Q, D] of each image in `ids`.
      stored: by row, how many of the ids the cache holds.
      limit: ids a row may have, the model's own number of positions.
      serial: counts the calls that changed the rows.
    """

    def __init__(
        self,
        model: Any,
        params: Params,
        rows: int,
        *,
        cache_length: int,
        buckets: Sequence[int] = BUCKETS,
        sharding: Any = None,
    ):
        _compile_cache.enable()
        # A module that says `return_last_only=False` must not be told otherwise at the call.
        self.model = model.clone(return_last_only=None) if model.return_last_only is False else model
        check_params(self.model.config, params)
        self._rows = _placement.by_rows(sharding)
        self.params = params if self._rows is None else _placement.place_params(params, self._rows)
        source = self.model.config.source
        self.limit: int = source.max_position_embeddings
        self.buckets = tuple(sorted(buckets))
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.soft: list[list[Array]] = [[] for _ in range(rows)]
        self.stored = [0] * rows
        self.serial = 0
        self.capacity = min(max(cache_length, 1), self.limit)
        self.image_tokens = None if self.model.config.vision_encoder is None else ImageTokens.of(self.model.config)
        self._cache: Any = None
        self._state: _loop.State | None = None
        self._done = np.zeros(rows, bool)

    @property
    def vocab_rows(self) -> int:
        """V, the number of logits."""
        return self.model.config.num_embed

    @property
    def cache(self) -> WindowedCache:
        """The cache; a call of `start`, `step` or `run` consumes it and leaves a new one."""
        if self._cache is not None:
            return self._cache
        dtype = self.params["embedder"]["input_embedding"].dtype
        if self._rows is not None:
            _placement.check_rows(self._rows, len(self.ids))
        cache = self.model.init_cache(
            batch_size=len(self.ids), dtype=dtype, cache_length=self.capacity, windowed=True, sharding=self._rows
        )
        return WindowedCache(cache, cache_length=cache.cache_length, empty=True)

    @property
    def key(self) -> jax.Array:
        """The JAX key after the last pick."""
        assert self._state is not None, "nothing was generated yet"
        return self._state.key

    @property
    def done(self) -> np.ndarray:
        """bool [B], rows that have met an end token."""
        return self._done

    def fork(self) -> Engine:
        """An engine that goes on from here, while this one can still be continued as well."""
        twin = copy.copy(self)
        twin.ids, twin.soft = [list(row) for row in self.ids], [list(row) for row in self.soft]
        twin.stored = list(self.stored)
        twin._cache = jax.tree.map(jnp.copy, self._cache)
        return twin

    def moved(self, sharding: Any) -> Engine:
        """This engine with its rows spread over devices; only this one is used from then on."""
        self._rows = _placement.by_rows(sharding)
        self.params = _placement.place_params(self.params, self._rows)
        if self._cache is not None:
            _placement.check_rows(self._rows, len(self.ids))
            self._cache = jax.device_put(self._cache, self._rows)
        return self

    def blank(self) -> Engine:
        """An engine of the same model and settings that holds nothing; `replace` gives it rows."""
        twin = copy.copy(self)
        twin._cache, twin._state, twin._done = None, None, np.zeros(len(self.ids), bool)
        return twin

    def replace(self, ids: Sequence[Sequence[int]], soft: Sequence[Sequence[Array]]) -> None:
        """Forgets what the rows hold and gives them other transcripts, to be read by the next `start`."""
        self.ids, self.soft = [list(row) for row in ids], [list(row) for row in soft]
        self.stored, self._cache, self._state = [0] * len(self.ids), None, None
        self.serial += 1

    def expand(self, b: int, ids: Sequence[int], images: int) -> list[int]:
        """The ids of row b's prompt with those of its images, counted.

        Raises:
          PromptError: images and markers differ in number, or the model takes none.
        """
        if self.image_tokens is not None:
            return self.image_tokens.expand(ids, images, name=f"prompt {b}")
        if images:
            raise PromptError(
                f"The model '{type(self.model).__name__}' does not have vision encoder, yet images are provided."
            )
        return list(ids)

    def encode(self, images: Sequence[Float[np.ndarray, "H W C"]]) -> list[Array]:
        """The vectors [Q, D] of prepared pictures, all of the tower's size."""
        net = _loop.network(self.model, self._rows)
        return [_loop.encode(net, self.params, image[None, None])[0, 0] for image in images]

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
        soft: Sequence[Sequence[Array]] | None = None,
        copies: int = 1,
    ) -> Picked:
        """Appends to every row, reads what is not stored yet, and picks the first new token.

        Args:
          new: expanded ids by row; 0, the padding, is not allowed.
          how: how tokens are picked.
          choice: what may be picked; its arrays by row are for the rows after copying.
          reserve: tokens to be generated, the first one included.
          key: for the official sampling methods.
          u: float32 [B], the uniform numbers of the first pick.
          penalty: whether `how` looks at what was seen.
          soft: by row, the vectors of the images in `new`, from `encode`.
          copies: after reading, every row becomes so many rows, one after the other.

        Raises:
          PromptError: nothing to read, or an id outside of the vocabulary.
          ContextFull: the model's limit; nothing was changed.
        """
        rows = [self._appended(b, part) for b, part in enumerate(new)]
        longest = max(map(len, rows))
        self._reserve(longest + reserve - 1, longest + reserve)
        self.ids = rows
        self.soft = [[*held, *more] for held, more in zip(self.soft, soft or [()] * len(rows))]
        chunks = self._chunks()
        net, cache, logits = _loop.network(self.model, self._rows), self._give_cache(), None
        for tokens, vectors in chunks:
            logits, cache = _loop.read(net, self.params, self._placed(tokens), cache, logits, self._placed(vectors))
        if copies > 1:
            logits, cache = _loop.spread((logits, cache), copies)
            self.ids, self.soft = (
                [list(row) for row in by_row for _ in range(copies)] for by_row in (self.ids, self.soft)
            )
        seen = np.zeros((len(self.ids), self.vocab_rows if penalty else 0), bool)
        if penalty:
            for b, row in enumerate(self.ids):
                seen[b, [token for token in row if token > PAD]] = True
        state = _loop.pick(how, choice, logits, seen, key, u)
        return self._took(cache, state, state.pending[:, None], state.logprob[:, None])

    def step(self, how: _loop.How, choice: _loop.Choice, u: np.ndarray) -> Picked:
        """One more token for each row that is not done."""
        state, net = self._last_state(), _loop.network(self.model, self._rows)
        cache, state = _loop.step(net, how, self.params, choice, self._give_cache(), state, u)
        return self._took(cache, state, state.pending[:, None], state.logprob[:, None])

    def run(self, how: _loop.How, choice: _loop.Choice, count: int, u: np.ndarray) -> Picked:
        """Up to `count` more tokens on the device, at most u.shape[1]; ends early where every row is done."""
        state, net = self._last_state(), _loop.network(self.model, self._rows)
        cache = self._give_cache()
        cache, state, tokens, logprobs, made = _loop.steps(
            net, how, self.params, choice, cache, state, np.int32(count), u
        )
        made = int(made)
        return self._took(cache, state, tokens, logprobs, made)

    def _last_state(self) -> _loop.State:
        assert self._state is not None, "start() comes first"
        return self._state

    def _give_cache(self) -> WindowedCache:
        """The cache, to be consumed. Until `_took`, nothing counts as stored: after an error all is read again."""
        cache = self.cache
        self._cache, self._state, self.stored = None, None, [0] * len(self.ids)
        self.serial += 1
        return cache

    def _took(self, cache: WindowedCache, state: _loop.State, tokens: Any, logprobs: Any, made: int = 1) -> Picked:
        """Adds tokens [B, n] to the transcripts; a 0 is no token. The last one of each row is never stored yet."""
        tokens, logprobs, bad, done = jax.device_get((tokens, logprobs, state.bad, state.done))
        if bad:
            raise SamplingError(
                "the logits are not finite: either the weights hold NaN or the dtype is too small for them (try "
                "float32), or every token is forbidden"
            )
        tokens, logprobs = tokens[:, :made], logprobs[:, :made]
        for row, new in zip(self.ids, tokens):
            row.extend(int(token) for token in new if token != PAD)
        self._cache, self._state, self._done = cache, state, done
        self.stored = [len(row) - 1 for row in self.ids]
        return Picked(tokens, logprobs)

    def _placed(self, array: Any) -> Any:
        return array if array is None or self._rows is None else jax.device_put(array, self._rows)

    def _appended(self, b: int, new: Sequence[int]) -> list[int]:
        row = [*self.ids[b], *(int(token) for token in new)]
        outside = [token for token in new if not 0 <= token < self.vocab_rows and token != SOFT]
        if outside:
            raise PromptError(f"prompt {b}: expected ids in 0..{self.vocab_rows - 1}, got {outside[0]}")
        if PAD in new:
            raise PromptError(f"prompt {b}: id {PAD} is padding and cannot be part of a prompt")
        if len(row) == self.stored[b]:
            raise PromptError(f"prompt {b} is empty: give at least one token")
        return row

    def _chunks(self) -> list[tuple[np.ndarray, Array | None]]:
        """What is not stored yet, in chunks: int32 [B, T], padded on the right to a bucket, and vectors [B, I, Q, D].

        No chunk cuts an image. The vectors are None for a chunk without images, and zero where a row has fewer.
        """
        new = [row[n:] for row, n in zip(self.ids, self.stored)]
        shown = [
            row[:n].count(SOFT) // self.image_tokens.soft if self.image_tokens else 0
            for row, n in zip(self.ids, self.stored)
        ]
        plans = [plan_chunks(row, limit=self.buckets[-1]) for row in new]
        chunks = []
        for index in range(max(map(len, plans))):
            parts = [row[plan[index]] if index < len(plan) else [] for row, plan in zip(new, plans)]
            bucket = next(size for size in self.buckets if size >= max(map(len, parts)))
            tokens = np.full((len(parts), bucket), PAD, np.int32)
            for b, part in enumerate(parts):
                tokens[b, : len(part)] = part
            chunks.append((tokens, self._vectors(parts, shown)))
        return chunks

    def _vectors(self, parts: Sequence[Sequence[int]], shown: list[int]) -> Array | None:
        """The image vectors of one chunk, [B, I, Q, D]; moves `shown`, the images of each row so far, past them."""
        if self.image_tokens is None:
            return None
        counts = [part.count(SOFT) // self.image_tokens.soft for part in parts]
        most = max(counts)
        if not most:
            return None
        rows = []
        for b, count in enumerate(counts):
            vectors = self.soft[b][shown[b] : shown[b] + count]
            shown[b] += count
            blank = jnp.zeros((most - count, *next(v for row in self.soft for v in row).shape), jnp.float32)
            rows.append(jnp.concatenate([jnp.stack(vectors).astype(jnp.float32), blank]) if vectors else blank)
        return jnp.stack(rows)

    def _reserve(self, slots: int, total: int) -> None:
        """Makes the cache large enough for `slots` tokens; the transcript will have `total`."""
        if total > self.limit:
            raise ContextFull(total, self.limit)
        if slots <= self.capacity:
            return
        length = cache_bucket(slots, self.limit)
        if self._cache is not None:
            self._cache = grow_cache(self._cache, self.model.config.layers, length)
        self.capacity = length


def grow_cache(cache: WindowedCache, layers: Sequence[Any], length: int) -> WindowedCache:
    """The same content with room for `length` tokens.

    A slot holds token number `slot` as long as a layer has not gone round, and a layer that has is a full ring of its
    window, whose length does not change. So longer arrays with empty slots at the end are all it takes.
    """
    grown = {}
    for spec in layers:
        if spec.shares_kv:
            continue
        layer = cache[f"layer_{spec.index}"]
        more = spec.cache_length(length) - layer["positions"].shape[1]
        pad = ((0, 0), (0, more), (0, 0), (0, 0))
        grown[f"layer_{spec.index}"] = layer | {
            "k": jnp.pad(layer["k"], pad),
            "v": jnp.pad(layer["v"], pad),
            "positions": jnp.pad(layer["positions"], pad[:2], constant_values=-1),
        }
    return WindowedCache(grown, cache_length=length)
