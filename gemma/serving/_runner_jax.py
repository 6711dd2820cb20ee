# SPDX-License-Identifier: Apache-2.0
"""The runner contract on JAX: slots of one windowed cache, read in chunks, decoded together wherever they stand.

The contract is `runner.py`; what runs on the device is `gm/text/_loop.py` (the network) and `gm/text/_cuts.py` (the
pick). Every call does its rows only: they are taken out of the cache, advanced and put back, in a batch of 1, 2, 4, ...
rows, so few programs are compiled and a neighbour costs nothing.

Ids are expanded: an image is given as all the ids that stand for it, with -2 for each soft token, and the pictures
(prepared pixels, `gm.vision.load_images`) come with the chunk that holds them (`gm/vision/_prompt.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import ContextFull, GemmaError, PromptError, SamplingError
from gemma.fit import PREFILL_BUCKETS
from gemma.gm import _compile_cache
from gemma.gm.nn import WindowedCache
from gemma.gm.text import _cuts, _loop
from gemma.gm.text._check import check_params
from gemma.gm.typing import Array, Bool, Float, Int, Params
from gemma.gm.vision import ImageTokens, _token_utils, plan_chunks
from gemma.sampling import SamplingParams, uniform
from gemma.serving.runner import RunnerInfo, StepIn, StepOut

PAD = 0  # padding in every Gemma vocabulary; the networks skip it
SOFT = _token_utils.SOFT_TOKEN_PLACEHOLDER
_GREEDY = SamplingParams(temperature=0)
_EMPTY = -1  # the position of a slot of the cache that holds nothing


class JaxRunner:
    """Runs a network of `gm.nn` for a number of sequences.

    runner = JaxRunner(loaded.model, loaded.params)
    runner.open(slots=8, max_len=4096, cache_dtype="float32")
    """

    def __init__(
        self,
        model: Any,
        params: Params,
        *,
        slots: int = 1,
        max_len: int | None = None,
        top: int = 5,
        buckets: Sequence[int] = PREFILL_BUCKETS,
    ):
        """Creates the runner with its slots open.

        Args:
          model: the network.
          params: its parameters.
          slots, max_len: as in `open`; None: the model's own context, up to 4,096 tokens.
          top: how many (id, log-probability) pairs a `StepOut` carries.
          buckets: prompts are padded to these lengths; each is compiled once.
        """
        _compile_cache.enable()
        self.model = model.clone(return_last_only=None) if model.return_last_only is False else model
        check_params(self.model.config, params)
        self._params, self._top, self._buckets = params, top, tuple(sorted(buckets))
        self._config = self.model.config.source
        self._images = None if self.model.config.vision_encoder is None else ImageTokens.of(self.model.config)
        table = params["embedder"]["input_embedding"]
        self._dtype = str(jnp.dtype(table.dtype))
        self._device = str(next(iter(table.devices()))) if isinstance(table, jax.Array) else jax.default_backend()
        blocked = np.zeros(self.model.config.num_embed, bool)
        blocked[PAD] = blocked[self._config.vocab_size :] = True
        self._choice = _loop.Choice(None, blocked, np.full(1, -1, np.int32))
        self.open(slots, min(self._config.max_position_embeddings, 4096) if max_len is None else max_len, self._dtype)

    @property
    def info(self) -> RunnerInfo:
        return RunnerInfo(self._config, self._max_len, len(self._held), self._dtype, self._device)

    def open(self, slots: int, max_len: int, cache_dtype: str) -> None:
        """As the contract says; `max_len` may not exceed the model's own context."""
        limit = self._config.max_position_embeddings
        if slots < 1 or max_len < 1:
            raise GemmaError(f"open: expected at least 1 slot and 1 token, got {slots} slots of {max_len} tokens")
        if max_len > limit:
            raise ContextFull(max_len, limit, "the slots")
        dtype = jnp.dtype(cache_dtype)
        self._max_len = max_len
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._soft: list[list[Array]] = [[] for _ in range(slots)]
        self._fresh = [True] * slots  # a slot whose row of the cache must be emptied before it is read into
        self._current = [False] * slots  # whether the row of `_logits` is that of the slot's last token
        self._cache = self._logits = None  # the old ones are given up before the new ones are made
        self._cache = self.model.init_cache(batch_size=slots, dtype=dtype, cache_length=max_len, windowed=True)
        self._logits = jnp.zeros((slots, self.model.config.num_embed), jnp.float32)

    def prefill(self, slot: int, ids: Sequence[int], start: int, images: Any = None) -> None:
        """As the contract says.

        Args:
          slot: where to.
          ids: expanded; no part of an image without its other parts.
          start: tokens that the slot holds.
          images: float32 [I, S, S, 3] in -1..1, the pictures whose soft tokens are in `ids`; or uint8 of any size.
        """
        held, ids = self._slot(slot), [int(token) for token in ids]
        if not ids:
            raise PromptError(f"prefill of slot {slot}: expected at least one id, got none")
        if start != len(held):
            raise GemmaError(f"prefill of slot {slot}: start must be the {len(held)} tokens that it holds, got {start}")
        self._check(slot, ids, len(held))
        soft = self._encoded(slot, ids, images)
        if not self._current[slot] and held:
            self._catch_up(slot)
        self._read(slot, ids, soft)

    def step(self, batch: list[StepIn]) -> list[StepOut]:
        slots = [s.slot for s in batch]
        if len(set(slots)) != len(slots):
            raise GemmaError(f"step: expected each slot once in a batch, got {slots}")
        for s in batch:
            if not self._slot(s.slot):
                raise GemmaError(f"step: slot {s.slot} is empty; prefill it first")
            self._check(s.slot, [s.token], len(self._held[s.slot]))
        if not batch:
            return []
        for slot in slots:
            if not self._current[slot]:
                self._catch_up(slot)
        net, width = _loop.network(self.model), _width(len(batch), len(self._held))
        rows, tokens = _rows(slots, width, len(self._held)), np.zeros(width, np.int32)
        tokens[: len(batch)] = [s.token for s in batch]
        params = [s.params or _GREEDY for s in batch] + [_GREEDY] * (width - len(batch))
        cuts, knobs = _cuts.from_params(params, self.model.config.num_embed)
        seen = np.zeros((width, self.model.config.num_embed if cuts.penalty else 0), bool)
        if cuts.penalty:
            for row, s in zip(seen, batch):
                row[[token for token in s.history if token > PAD]] = True
        u = np.zeros(width, np.float32)
        u[: len(batch)] = [min(uniform(s.rng), 1 - 2.0**-24) for s in batch]
        with self._taken() as (cache, logits):
            self._cache, self._logits = _advance(net, self._params, rows, tokens, cache, logits)
        choice = self._choice._replace(knobs=knobs)
        picked, logprobs, top, top_logprobs, bad = jax.device_get(
            _pick(cuts, self._top, choice, rows, self._logits, seen, u)
        )
        for s in batch:
            self._held[s.slot].append(int(s.token))
        if bad[: len(batch)].any():
            worst = slots[int(bad.argmax())]
            raise SamplingError(
                f"slot {worst}: the logits are not finite: either the weights hold NaN or the dtype is too small for "
                f"them (try float32), or every token is forbidden"
            )
        return [
            StepOut(int(picked[b]), float(logprobs[b]), tuple(zip(top[b].tolist(), top_logprobs[b].tolist())))
            for b in range(len(batch))
        ]

    def logits(self, slot: int) -> np.ndarray:
        """As the contract says; -inf for the padding, which cannot be fed back."""
        if not self._slot(slot):
            raise GemmaError(f"logits: slot {slot} is empty; prefill it first")
        if not self._current[slot]:
            self._catch_up(slot)
        values = np.array(_row(self._logits, np.int32(slot)))[: self._config.vocab_size]
        values[PAD] = -np.inf
        return values

    def copy_prefix(self, src: int, dst: int, n: int) -> None:
        held = list(self._slot(src))
        self._slot(dst)
        if not 0 <= n <= len(held):
            raise GemmaError(f"copy_prefix: expected n in 0..{len(held)}, what slot {src} holds, got {n}")
        soft = list(self._soft[src])
        images = held[:n].count(SOFT) // self._images.soft if self._images else 0
        if self._images and self._images.soft * images != held[:n].count(SOFT):
            raise GemmaError(f"copy_prefix: {n} tokens of slot {src} end inside an image")
        whole = n == len(held) and self._current[src]
        # The newest token can always be taken back; of more, a ring that has gone round has lost what they replaced.
        keep = n if whole else max(n - 1, 0)
        smallest = min(spec.cache_length(self._max_len) for spec in self.model.config.layers)
        if n and (len(held) - keep <= 1 or len(held) <= smallest) and not self._fresh[src]:
            with self._taken() as (cache, logits):
                self._cache, self._logits = _copy(cache, logits, np.int32(src), np.int32(dst), np.int32(keep))
            self._held[dst], self._soft[dst] = held[:n], soft[:images]
            self._fresh[dst], self._current[dst] = keep == 0, whole
            return
        self.free(dst)
        if n:
            self._read(dst, held[:n], soft[:images])

    def free(self, slot: int) -> None:
        self._slot(slot)
        self._held[slot], self._soft[slot] = [], []
        self._fresh[slot], self._current[slot] = True, False

    def _read(self, slot: int, ids: list[int], soft: list[Array]) -> None:
        """Reads ids after what the slot's row of the cache holds, chunk by chunk."""
        net, shown = _loop.network(self.model), 0
        for part in plan_chunks(ids, limit=self._buckets[-1]):
            chunk = ids[part]
            count = chunk.count(SOFT) // self._images.soft if self._images else 0
            vectors = jnp.stack(soft[shown : shown + count])[None].astype(jnp.float32) if count else None
            shown += count
            tokens = np.zeros((1, next(size for size in self._buckets if size >= len(chunk))), np.int32)
            tokens[0, : len(chunk)] = chunk
            fresh = self._fresh[slot]
            with self._taken() as (cache, logits):
                self._cache, self._logits = _prefill(
                    net, self._params, np.int32(slot), fresh, tokens, cache, logits, vectors
                )
            self._held[slot].extend(chunk)
            self._soft[slot].extend(soft[shown - count : shown])
            self._fresh[slot], self._current[slot] = False, True

    def _catch_up(self, slot: int) -> None:
        """Reads the last token of a slot again: a shortened slot holds it, but its row of the cache does not."""
        last = self._held[slot].pop()
        self._read(slot, [last], [])

    def _taken(self) -> _Taken:
        return _Taken(self)

    def _slot(self, slot: int) -> list[int]:
        if not 0 <= slot < len(self._held):
            raise GemmaError(f"slot: expected 0..{len(self._held) - 1}, got {slot}")
        return self._held[slot]

    def _check(self, slot: int, ids: Sequence[int], used: int) -> None:
        size = self._config.vocab_size
        outside = [i for i in ids if not 0 <= i < size and not (i == SOFT and self._images)]
        if outside:
            raise PromptError(f"slot {slot}: expected ids in 0..{size - 1}, got {outside[0]}")
        if PAD in ids:
            raise PromptError(f"slot {slot}: id {PAD} is padding and cannot be part of a prompt")
        if used + len(ids) > self._max_len:
            raise ContextFull(used + len(ids), self._max_len, f"slot {slot}")

    def _encoded(self, slot: int, ids: list[int], images: Any) -> list[Array]:
        """The vectors of the pictures of a chunk, counted."""
        count = 0 if images is None else len(images)
        if count and self._images is None:
            raise PromptError(f"slot {slot}: {count} images came, but the model has no vision encoder")
        wanted = count * self._images.soft if self._images else 0
        if ids.count(SOFT) != wanted:
            raise PromptError(f"slot {slot}: {count} images are {wanted} soft tokens (-2), got {ids.count(SOFT)}")
        if not count:
            return []
        from gemma.gm.vision import _preprocess

        shape, net = tuple(self.model.config.vision_encoder.image_shape), _loop.network(self.model)
        pictures = [np.asarray(_preprocess.prepare(image, shape)) for image in images]
        return [_loop.encode(net, self._params, picture[None, None])[0, 0] for picture in pictures]


class _Taken:
    """The runner's arrays while a call consumes them; a call that fails leaves every slot empty, never half written."""

    def __init__(self, runner: JaxRunner):
        self._runner = runner

    def __enter__(self) -> tuple[Any, Array]:
        return self._runner._cache, self._runner._logits

    def __exit__(self, kind: Any, *_: Any) -> None:
        cache = self._runner._cache
        if kind is not None and any(leaf.is_deleted() for leaf in jax.tree.leaves(cache)):
            dtype = cache["layer_0"]["k"].dtype
            self._runner.open(len(self._runner._held), self._runner._max_len, str(dtype))


def _width(rows: int, slots: int) -> int:
    """Rows of the program that serves so many: a power of two, at most the number of slots."""
    return min(1 << (rows - 1).bit_length(), slots)


def _rows(slots: Sequence[int], width: int, total: int) -> np.ndarray:
    """int32 [width]: the slots, then ones that do not exist in the places left over."""
    return np.array([*slots, *range(total, total + width - len(slots))], np.int32)


def _taken_rows(cache: Any, rows: Int[Array, " W"]) -> Any:
    """Rows of a cache; the last one for a slot that does not exist."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), cache)


def _put_rows(cache: Any, rows: Int[Array, " W"], new: Any) -> Any:
    """A cache with rows replaced; those of a slot that does not exist are dropped."""
    return jax.tree.map(lambda old, part: old.at[rows].set(part, mode="drop", unique_indices=True), cache, new)


@functools.partial(jax.jit, static_argnames=("net", "fresh"), donate_argnames=("cache", "logits"))
def _prefill(
    net: _loop.Network,
    params: Params,
    slot: Int[Array, ""],
    fresh: bool,
    tokens: Int[Array, "1 T"],
    cache: Any,
    logits: Float[Array, "S V"],
    soft: Float[Array, "1 I Q D"] | None,
) -> tuple[Any, Float[Array, "S V"]]:
    """Reads one chunk into one slot, which is emptied first if `fresh`."""
    row = _taken_rows(cache, slot[None])
    if fresh:
        row = WindowedCache(_kept(row, jnp.int32(0)), cache_length=row.cache_length, empty=True)
    last, row = _loop.forward(net, params, tokens, row, soft)
    return _put_rows(cache, slot[None], row), logits.at[slot].set(last[0])


@functools.partial(jax.jit, static_argnames=("net",), donate_argnames=("cache", "logits"))
def _advance(
    net: _loop.Network,
    params: Params,
    rows: Int[Array, " W"],
    tokens: Int[Array, " W"],
    cache: Any,
    logits: Float[Array, "S V"],
) -> tuple[Any, Float[Array, "S V"]]:
    """Stores one token in each of some slots; a slot that does not exist gets padding, which is stored nowhere."""
    last, new = _loop.forward(net, params, tokens[:, None], _taken_rows(cache, rows))
    return _put_rows(cache, rows, new), logits.at[rows].set(last, mode="drop", unique_indices=True)


@functools.partial(jax.jit, static_argnames=("cuts", "top"))
def _pick(
    cuts: _cuts.Cuts,
    top: int,
    choice: _loop.Choice,
    rows: Int[Array, " W"],
    logits: Float[Array, "S V"],
    seen: Bool[Array, "W V"],
    u: Float[Array, " W"],
) -> tuple[Array, Array, Array, Array, Array]:
    """Tokens [W], their log-probabilities, the likeliest ids and theirs [W, top], and whether a row is unusable."""
    logits = jnp.where(choice.blocked[None], -jnp.inf, jnp.take(logits, rows, axis=0, mode="clip"))
    bad = ~jnp.isfinite(logits.max(axis=-1))
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    tokens = _cuts.pick(cuts, choice.knobs, logits, seen, u)
    values, ids = jax.lax.top_k(logits, top)
    logprobs = jnp.take_along_axis(logits, tokens[:, None], axis=1) - total
    return tokens, logprobs[:, 0], ids, values - total, bad


@functools.partial(jax.jit, donate_argnames=("cache", "logits"))
def _copy(
    cache: Any, logits: Float[Array, "S V"], src: Int[Array, ""], dst: Int[Array, ""], n: Int[Array, ""]
) -> tuple[Any, Float[Array, "S V"]]:
    """The first `n` tokens of one slot in another."""
    row = _kept(_taken_rows(cache, src[None]), n)
    return _put_rows(cache, dst[None], row), logits.at[dst].set(logits[src])


@jax.jit
def _row(logits: Float[Array, "S V"], slot: Int[Array, ""]) -> Float[Array, " V"]:
    return logits[slot]


def _kept(row: Any, n: Int[Array, ""]) -> Any:
    """Rows of a windowed cache without the tokens at position `n` and beyond."""

    def cut(layer: dict[str, Array]) -> dict[str, Array]:
        kept = layer["positions"] < n
        return layer | {
            "positions": jnp.where(kept, layer["positions"], _EMPTY),
            "end_index": jnp.minimum(layer["end_index"], n),
        }

    new = {name: cut(layer) for name, layer in row.items()}
    return type(row)(new, cache_length=row.cache_length)
