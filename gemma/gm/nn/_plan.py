# SPDX-License-Identifier: Apache-2.0
"""What all layers of one kind share in one step: RoPE table, mask, and the write into the cache.

A step of a Gemma has at most two kinds of layer, local and global, so this is done twice per step and not once per
layer. Attention is in `_modules.py`, cache layouts are in `_cache.py`, base masks in `gm/utils/_attention_mask.py`.

A query at position q sees the key at position p iff the base mask allows it and, on a local layer with window W,
`p > q - W`; in a bidirectional model (EmbeddingGemma) `|q - p| < W // 2 + 1`. Positions decide, not indices.
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
) -> tuple[LayerPlan, ...]:
    """One plan per layer; layers of a kind share the object, hence the arrays.

    Args:
      specs: the layers.
      positions: of the queries, in tokens.
      valid: False on padding.
      cache: of either layout, or None.
      mask: the base mask (causality, padding, images), or None to derive it. Its columns are the chunk's tokens
        without a cache, the slots of the full layout, or a row's token numbers in the windowed layout.
    """
    plans: dict[tuple, LayerPlan] = {}
    result = []
    for spec in specs:
        kind = (spec.window, spec.bidirectional, spec.head_dim, spec.rope_base, spec.rope_scale, spec.rope_fraction)
        if kind not in plans:
            layer = None if cache is None else cache[f"layer_{spec.index}"]
            ring = isinstance(cache, _cache.WindowedCache)
            plans[kind] = plan_layer(spec, positions=positions, valid=valid, cache=layer, mask=mask, ring=ring)
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
) -> LayerPlan:
    """The plan of one kind of layer; `ring` says that `cache` is a layer of the windowed layout."""
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
            mask = _uncached_mask(valid, bidirectional=spec.bidirectional)
    elif ring:
        write = _cache.plan_ring_write(cache, positions, valid, window=spec.window)
        mask, key_positions = _ring_mask(cache, write, positions, valid, mask)
    else:
        write = _cache.plan_block_write(cache, positions)
        key_positions = write.positions
        if mask is None:
            mask = _block_mask(cache["end_index"][0] % key_positions.shape[1], valid, key_positions.shape[1])
    if spec.window is not None:
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


def _uncached_mask(valid: Bool[Array, "B T"], *, bidirectional: bool) -> Bool[Array, "B T T"]:
    if bidirectional:
        return jnp.broadcast_to(valid[:, None, :], (*valid.shape, valid.shape[1]))
    return _attention_mask.make_causal_mask(valid)


def _block_mask(start: Int[Array, ""], valid: Bool[Array, "B T"], slots: int) -> Bool[Array, "B T S"]:
    """Full layout: what earlier calls stored, and the chunk's own tokens up to the query."""
    length = valid.shape[1]
    index = jnp.arange(slots, dtype=jnp.int32) - start  # of each slot within the chunk; negative: stored earlier
    own = jnp.take_along_axis(valid, jnp.clip(index, 0, length - 1)[None, :], axis=1)
    seen = own | (index < 0)[None, :]
    causal = index[None, :] <= jnp.arange(length, dtype=jnp.int32)[:, None]
    return causal[None] & seen[:, None, :]


def _ring_mask(
    cache: _cache.LayerCache,
    write: _cache.TokenWrite | _cache.ChunkWrite,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    mask: Bool[Array, "B T S"] | None,
) -> tuple[Bool[Array, "B T S'"], Int[Array, "B S'"]]:
    """Windowed layout: the base mask over the keys that `write.store` returns, and the positions of those keys."""
    slots = cache["positions"].shape[1]
    if isinstance(write, _cache.ChunkWrite) and write.read_first:
        chunk = jnp.where(valid, positions, _cache.EMPTY)
        keys = jnp.concatenate([cache["positions"], chunk], axis=1)
        counted = cache["end_index"][:, None] + jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1
        number = jnp.concatenate([_cache.newest_number(cache["end_index"], slots), counted], axis=1)
    else:
        keys, number = write.positions, _cache.newest_number(write.end_index, slots)
    stored = (keys >= 0)[:, None, :]
    if mask is None:
        return stored & (keys[:, None, :] <= positions[:, :, None]), keys
    columns = jnp.clip(number, 0, mask.shape[2] - 1)[:, None, :]
    return stored & jnp.take_along_axis(mask, columns, axis=2), keys
