# SPDX-License-Identifier: Apache-2.0
"""What all layers of one kind share in one step: RoPE table, mask, and the write into the cache.

A step of a Gemma has at most two kinds of layer, local and global, so this is done twice per step and not once per
layer. Attention is in `_modules.py`, cache layouts are in `_cache.py`, base masks in `gm/utils/_attention_mask.py`.

A query at position q sees the key at position p iff the base mask allows it and, on a local layer with window W,
`p > q - W`; in a bidirectional model (EmbeddingGemma) `|q - p| < W // 2 + 1`, or what `LayerSpec.reach` says (the
encoders of T5Gemma). Positions decide, not indices.

The base mask is causal, and the tokens of one image (a group) see each other in both directions. A chunk holds whole
images, so groups concern the keys of the chunk only; a cache remembers none of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax
import jax.numpy as jnp

from gemma.config import LayerSpec
from gemma.errors import ConfigError
from gemma.gm.math import _positional_embeddings
from gemma.gm.nn import _cache
from gemma.gm.typing import Array, Bool, Float, Int
from gemma.gm.utils import _attention_mask


@flax.struct.dataclass
class LayerPlan:
    """One kind of layer in one step; S' is the number of keys that a query could look at."""

    sin: Float[Array, "B T H/2"]
    cos: Float[Array, "B T H/2"]
    mask: Bool[Array, "B T S'"]
    write: _cache.BlockWrite | _cache.TokenWrite | _cache.ChunkWrite | None


def plan_layers(
    specs: Sequence[LayerSpec],
    *,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    cache: _cache.Cache | None,
    mask: Bool[Array, "B T S"] | None,
    groups: Int[Array, "B T"] | None = None,
) -> tuple[LayerPlan, ...]:
    """One plan per layer; layers of a kind share the object, hence the arrays.

    Args:
      specs: the layers.
      positions: of the queries, in tokens.
      valid: False on padding.
      cache: of either layout, or None.
      mask: the base mask (causality, padding, images), or None to derive it. Its columns are the chunk's tokens
        without a cache, the slots of the full layout, or a row's token numbers in the windowed layout.
      groups: tokens of a row with the same positive number see each other in both directions; 0 is no group. Unused
        where `mask` is given.
    """
    plans: dict[tuple, LayerPlan] = {}
    result = []
    for spec in specs:
        kind = (spec.window, spec.bidirectional, spec.head_dim, spec.rope_base, spec.rope_scale, spec.rope_fraction)
        kind += (spec.reach,)
        if kind not in plans:
            layer = None if cache is None else cache[f"layer_{spec.kv_source}"]  # a layer that shares has none
            ring = isinstance(cache, _cache.WindowedCache)
            plans[kind] = plan_layer(
                spec,
                positions=positions,
                valid=valid,
                cache=layer,
                mask=mask,
                ring=ring,
                empty=ring and cache.empty,
                groups=groups,
            )
        result.append(plans[kind])
    return tuple(result)


def plan_layer(
    spec: LayerSpec,
    *,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    cache: _cache.LayerCache | None,
    mask: Bool[Array, "B T S"] | None,
    ring: bool = False,
    empty: bool = False,
    groups: Int[Array, "B T"] | None = None,
) -> LayerPlan:
    """The plan of one kind of layer; `ring` says that `cache` is a layer of the windowed layout, `empty` of an empty one."""
    sin, cos = _positional_embeddings.rope_table(
        positions,
        head_dim=spec.head_dim,
        base_frequency=spec.rope_base,
        scale_factor=spec.rope_scale,
        rope_proportion=spec.rope_fraction,
    )
    if cache is not None and spec.bidirectional:
        raise ConfigError("a bidirectional model sees the future and cannot use a cache: call it with cache=None")
    write = None
    if cache is None:
        key_positions = positions
        if mask is None:
            mask = _uncached_mask(valid, groups, bidirectional=spec.bidirectional)
    elif ring:
        write = _cache.plan_ring_write(cache, positions, valid, window=spec.window, empty=empty)
        mask, key_positions = _ring_mask(cache, write, positions, valid, mask, groups)
    else:
        write = _cache.plan_block_write(cache, positions, valid)
        key_positions = write.positions
        if mask is None:
            mask = _block_mask(
                cache["end_index"][0] % key_positions.shape[1], key_positions, positions.shape[1], groups
            )
    if spec.reach is not None:
        mask = mask & reach_mask(positions, key_positions, spec.reach)
    elif spec.window is not None:
        mask = mask & window_mask(positions, key_positions, spec.window, bidirectional=spec.bidirectional)
    return LayerPlan(sin, cos, mask, write)


def window_mask(
    queries: Int[Array, "B T"], keys: Int[Array, "B S"], window: int, *, bidirectional: bool = False
) -> Bool[Array, "B T S"]:
    """Where a key is inside the window of a query, by their positions. The future is the base mask's business."""
    distance = queries[:, :, None] - keys[:, None, :]
    if bidirectional:
        return jnp.abs(distance) < window // 2 + 1
    return distance < window


def reach_mask(queries: Int[Array, "B T"], keys: Int[Array, "B S"], reach: tuple[int, int]) -> Bool[Array, "B T S"]:
    """Where a key is at most `reach` = (before, after) positions from a query."""
    distance = queries[:, :, None] - keys[:, None, :]
    return (distance <= reach[0]) & (distance >= -reach[1])


def _uncached_mask(
    valid: Bool[Array, "B T"], groups: Int[Array, "B T"] | None, *, bidirectional: bool
) -> Bool[Array, "B T T"]:
    if bidirectional:
        return jnp.broadcast_to(valid[:, None, :], (*valid.shape, valid.shape[1]))
    mask = _attention_mask.make_causal_mask(valid)
    return mask if groups is None else mask | _attention_mask.same_group(groups, groups)


def _block_mask(
    start: Int[Array, ""], stored: Int[Array, "B S"], length: int, groups: Int[Array, "B T"] | None
) -> Bool[Array, "B T S"]:
    """Full layout: what earlier calls stored, and the chunk's own tokens up to the query or in its image.

    Args:
      start: the chunk's first slot.
      stored: positions of the slots after the write, negative on padding.
      length: T.
      groups: of the chunk's tokens.
    """
    index = jnp.arange(stored.shape[1], dtype=jnp.int32) - start  # of each slot within the chunk; negative: earlier
    seen = (index[None, :] <= jnp.arange(length, dtype=jnp.int32)[:, None])[None]
    if groups is not None:
        inside = (index >= 0) & (index < length)
        own = jnp.take_along_axis(groups, jnp.clip(index, 0, length - 1)[None, :], axis=1)
        seen = seen | _attention_mask.same_group(groups, jnp.where(inside[None, :], own, 0))
    return seen & (stored >= 0)[:, None, :]


def _ring_mask(
    cache: _cache.LayerCache,
    write: _cache.TokenWrite | _cache.ChunkWrite,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    mask: Bool[Array, "B T S"] | None,
    groups: Int[Array, "B T"] | None,
) -> tuple[Bool[Array, "B T S'"], Int[Array, "B S'"]]:
    """Windowed layout: the base mask over the keys that `write.store` returns, and the positions of those keys."""
    slots = cache["positions"].shape[1]
    if isinstance(write, _cache.ChunkWrite) and write.alone:
        keys, number = jnp.where(valid, positions, _cache.EMPTY), jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
    elif isinstance(write, _cache.ChunkWrite) and write.read_first:
        chunk = jnp.where(valid, positions, _cache.EMPTY)
        keys = jnp.concatenate([cache["positions"], chunk], axis=1)
        counted = cache["end_index"][:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        number = jnp.concatenate([_cache.newest_number(cache["end_index"], slots), counted], axis=1)
    else:
        keys, number = write.positions, _cache.newest_number(write.end_index, slots)
    stored = (keys >= 0)[:, None, :]
    if mask is None:
        seen = keys[:, None, :] <= positions[:, :, None]
        if groups is not None and isinstance(write, _cache.ChunkWrite):
            seen = seen | _attention_mask.same_group(groups, _key_groups(groups, write))
        return stored & seen, keys
    columns = jnp.clip(number, 0, mask.shape[2] - 1)[:, None, :]
    return stored & jnp.take_along_axis(mask, columns, axis=2), keys


def _key_groups(groups: Int[Array, "B T"], write: _cache.ChunkWrite) -> Int[Array, "B S'"]:
    """The groups of the keys that `write.store` returns; what was stored earlier has none."""
    if write.alone:
        return groups
    if write.read_first:
        return jnp.pad(groups, ((0, 0), (write.source.shape[1], 0)))
    own = jnp.take_along_axis(groups, jnp.maximum(write.source, 0), axis=1)
    return jnp.where(write.source >= 0, own, 0)
