# SPDX-License-Identifier: Apache-2.0
"""Key/value caches: their two layouts, how they are made, and how a step writes into them.

Full layout (a plain dictionary): every layer holds `cache_length` slots, and all rows of a batch are written at the
same slot. Padding takes a slot, whose position is -1; slots that were not written yet show 0.

Windowed layout (`WindowedCache`): a local layer holds a ring of its window, a global layer `cache_length` slots. Rows
may stand at different places, padding is not stored, and the masks follow from the cache itself:

    window 4, after the tokens a b c d e f     slot       0 1 2 3
                                               token      e f c d
                                               positions  4 5 2 3      (-1: nothing stored)
                                               end_index  6            (tokens stored so far, by row)

Per layer, `layer_{i}`: k and v [B, S, K, H], positions int32 [B, S], end_index int32 [B]. K is stored after its norm
and RoPE. Layers that share the keys and values of another one have no entry. Which keys a query may see is in `_plan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp

from gemma.config import LayerSpec
from gemma.errors import ConfigError
from gemma.gm.typing import Array, Bool, DType, Int, Sharding

LayerCache = dict[str, Array]
Cache = dict[str, LayerCache]

EMPTY = -1  # position of a slot that holds nothing


@jax.tree_util.register_pytree_with_keys_class
class WindowedCache(dict):
    """A cache in the windowed layout; JAX treats it as a dictionary and keeps its type.

    Attributes:
      cache_length: tokens that fit; beyond them the oldest are overwritten.
      empty: the promise of a caller that no row holds anything, known while tracing: a chunk then looks at itself and
        not at slots that hold nothing. What a network returns is never marked so.
    """

    def __init__(self, layers: Any = (), *, cache_length: int, empty: bool = False):
        super().__init__(layers)
        self.cache_length, self.empty = cache_length, empty

    def tree_flatten_with_keys(self):
        names = tuple(sorted(self))
        layers = tuple((jax.tree_util.DictKey(name), self[name]) for name in names)
        return layers, (names, self.cache_length, self.empty)

    @classmethod
    def tree_unflatten(cls, static, layers):
        names, cache_length, empty = static
        return cls(zip(names, layers), cache_length=cache_length, empty=empty)


def init_layer(batch_size: int, length: int, num_kv_heads: int, head_dim: int, dtype: DType, empty: int) -> LayerCache:
    """One layer's empty cache; `empty` is the position that unwritten slots show."""
    shape = (batch_size, length, num_kv_heads, head_dim)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "end_index": jnp.zeros((batch_size,), jnp.int32),
        "positions": jnp.full((batch_size, length), empty, jnp.int32),
    }


def init_cache(
    layers: Sequence[LayerSpec],
    batch_size: int,
    dtype: DType,
    cache_length: int,
    *,
    windowed: bool = False,
    sharding: Sharding | None = None,
) -> Cache:
    """An empty cache of either layout for `cache_length` tokens.

    In the windowed layout, k and v of one row take exactly `GemmaConfig.cache_bytes(cache_length, bytes_per_value)`.
    """
    for name, value in (("batch_size", batch_size), ("cache_length", cache_length)):
        if value < 1:
            raise ConfigError(f"init_cache: {name} must be at least 1, got {value}")

    def make() -> Cache:
        cache = {
            f"layer_{spec.index}": init_layer(
                batch_size,
                spec.cache_length(cache_length) if windowed else cache_length,
                spec.num_kv_heads,
                spec.head_dim,
                dtype,
                EMPTY if windowed else 0,
            )
            for spec in layers
            if not spec.shares_kv
        }
        return WindowedCache(cache, cache_length=cache_length) if windowed else cache

    return make() if sharding is None else jax.jit(make, out_shardings=sharding)()


# How a step writes. Each kind of write is made once per step for all layers of a kind (`_plan.py`), and its `store`
# returns what the queries of one layer look at and the layer's new cache.


@flax.struct.dataclass
class BlockWrite:
    """Full layout, several tokens: the chunk goes to slots start .. start + T - 1 of every row."""

    start: Int[Array, ""]
    end_index: Int[Array, " B"]  # after the write
    positions: Int[Array, "B S"]  # after the write

    def store(self, cache: LayerCache, k: Array, v: Array) -> tuple[Array, Array, LayerCache]:
        k, v = (_write_block(cache[name], new, self.start) for name, new in (("k", k), ("v", v)))
        return k, v, {"k": k, "v": v, "end_index": self.end_index, "positions": self.positions}


@flax.struct.dataclass
class TokenWrite:
    """Either layout, one token: each row writes one slot, in place if the cache is donated."""

    slot: Int[Array, " B"]  # S for a row that writes nothing
    end_index: Int[Array, " B"]
    positions: Int[Array, "B S"]

    def store(self, cache: LayerCache, k: Array, v: Array) -> tuple[Array, Array, LayerCache]:
        k, v = (_write_token(cache[name], new, self.slot) for name, new in (("k", k), ("v", v)))
        return k, v, {"k": k, "v": v, "end_index": self.end_index, "positions": self.positions}


def _write_block(old: Array, new: Array, start: Int[Array, ""]) -> Array:
    """Writes [B, T, ...] into [B, S, ...] at slot `start`."""
    zero = jnp.zeros_like(start)
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (zero, start) + (zero,) * (old.ndim - 2))


def _write_token(old: Array, new: Array, slot: Int[Array, " B"]) -> Array:
    """Writes [B, 1, ...] into [B, S, ...], each row at its own slot; a slot of S is dropped.

    One write more than there are rows, and dropped: XLA turns a scatter of a single row into an operation that it then
    fuses into every reader, each of which would copy the cache.
    """
    batch, slots = old.shape[:2]
    rows = jnp.arange(batch + 1, dtype=jnp.int32)
    slot = jnp.pad(slot, (0, 1), constant_values=slots)
    new = jnp.pad(new[:, 0].astype(old.dtype), [(0, 1)] + [(0, 0)] * (old.ndim - 2))
    return old.at[rows, slot].set(new, mode="drop", unique_indices=True)


@flax.struct.dataclass
class ChunkWrite:
    """Windowed layout, several tokens: each slot says which token of the chunk lands in it.

    A ring is read before it is written, because its oldest slots are still inside the window of the chunk's first
    queries: they look at the ring as it was, followed by the chunk. In an empty cache they look at the chunk alone.
    """

    source: Int[Array, "B S"]  # index into the chunk, or -1: the slot keeps what it holds
    end_index: Int[Array, " B"]
    positions: Int[Array, "B S"]
    read_first: bool = flax.struct.field(pytree_node=False)
    alone: bool = flax.struct.field(pytree_node=False, default=False)

    def store(self, cache: LayerCache, k: Array, v: Array) -> tuple[Array, Array, LayerCache]:
        k, v = k.astype(cache["k"].dtype), v.astype(cache["v"].dtype)
        new_k, new_v = (self._scatter(old, new) for old, new in ((cache["k"], k), (cache["v"], v)))
        new = {"k": new_k, "v": new_v, "end_index": self.end_index, "positions": self.positions}
        if self.alone:
            return k, v, new
        if self.read_first:
            return jnp.concatenate([cache["k"], k], axis=1), jnp.concatenate([cache["v"], v], axis=1), new
        return new_k, new_v, new

    def _scatter(self, old: Array, new: Array) -> Array:
        source = self.source[:, :, None, None]
        return jnp.where(source >= 0, jnp.take_along_axis(new, jnp.maximum(source, 0), axis=1), old)


def plan_block_write(
    cache: LayerCache, positions: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> BlockWrite | TokenWrite:
    """The write of a chunk into one layer of the full layout: all rows at the place of the first one."""
    batch, slots = cache["positions"].shape
    positions = jnp.where(valid, positions, EMPTY)
    start = cache["end_index"][0] % slots
    after = cache["end_index"] + positions.shape[1]
    if positions.shape[1] == 1:
        slot = jnp.broadcast_to(start, (batch,))
        return TokenWrite(slot, after, _write_token(cache["positions"], positions, slot))
    return BlockWrite(start, after, _write_block(cache["positions"], positions, start))


def plan_ring_write(
    cache: LayerCache,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    window: int | None,
    empty: bool = False,
) -> TokenWrite | ChunkWrite:
    """The write of a chunk into one layer of the windowed layout; tokens that are not `valid` are not stored."""
    slots, length = cache["positions"].shape[1], positions.shape[1]
    before = cache["end_index"]
    after = before + jnp.sum(valid, axis=1, dtype=jnp.int32)
    if length == 1:
        slot = jnp.where(valid[:, 0], before % slots, slots)
        return TokenWrite(slot, after, _write_token(cache["positions"], positions, slot))
    # The token stored last in slot s has, among its row's tokens, the greatest number below `after` that is s mod S.
    number = newest_number(after, slots)  # [B, S]
    rank = number - before[:, None]  # among the valid tokens of the chunk
    order = jnp.argsort(~valid, axis=1, stable=True).astype(jnp.int32)  # the valid tokens' indices first, in order
    source = jnp.where(rank >= 0, jnp.take_along_axis(order, jnp.clip(rank, 0, length - 1), axis=1), -1)
    stored = jnp.take_along_axis(positions, jnp.maximum(source, 0), axis=1)
    stored = jnp.where(source >= 0, stored, cache["positions"])
    return ChunkWrite(source, after, stored, read_first=window is not None and slots >= window, alone=empty)


def next_position(cache: Cache) -> Int[Array, " B"]:
    """The position of the next token of each row: one past the greatest stored, or the count of a windowed row."""
    layer = cache["layer_0"]
    if isinstance(cache, WindowedCache):
        return layer["end_index"]
    written = jnp.arange(layer["positions"].shape[1], dtype=jnp.int32)[None] < layer["end_index"][:, None]
    return jnp.max(jnp.where(written, layer["positions"], EMPTY), axis=1) + 1


def newest_number(count: Int[Array, " B"], slots: int) -> Int[Array, "B S"]:
    """The number, among a row's `count` stored tokens, of the one that each slot holds; negative: none."""
    slot = jnp.arange(slots, dtype=jnp.int32)[None, :]
    last = count[:, None] - 1
    return last - (last - slot) % slots
