# SPDX-License-Identifier: Apache-2.0
"""A wrapper for slicing caches of the full layout, for samplers of the official package's kind.

The caches themselves are in `gm/nn/_cache.py`; the samplers of gm.text use their windowed layout, which is not sliced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import jax.numpy as jnp

from gemma.errors import ShapeError
from gemma.gm.typing import Array, Bool, Int

_PARTS = ("k", "v", "positions")  # what has a row and a slot axis


@flax.struct.dataclass
class Cache:
    """A cache that can be sliced by row and slot: `cache[:, :16]`, `cache.at[:, :16].set_kv(other)`."""

    cache: Mapping[str, Mapping[str, Array]]

    @property
    def total_cache_length(self) -> int:
        """Slots."""
        return next(iter(self.cache.values()))["k"].shape[1]

    @property
    def end_index(self) -> Int[Array, ""]:
        """Slots that were written, the same in every row."""
        return next(iter(self.cache.values()))["end_index"][0]

    @property
    def is_full(self) -> Bool[Array, ""]:
        """Whether no token fits any more, one slot being kept in reserve."""
        return self.end_index >= self.total_cache_length - 1

    def __getitem__(self, key: Any) -> Cache:
        key = _checked(key)
        return Cache({name: _cut(layer, key) for name, layer in self.cache.items()})

    @property
    def at(self) -> _At:
        """`cache.at[rows, slots].set_kv(other)`."""
        return _At(self)

    def set_end_index(self, value: int) -> Cache:
        """The same cache with `value` slots counted as written."""
        return Cache(
            {
                name: dict(layer) | {"end_index": jnp.full_like(layer["end_index"], value)}
                for name, layer in self.cache.items()
            }
        )


@dataclasses.dataclass(frozen=True)
class _At:
    cache: Cache

    def __getitem__(self, key: Any) -> _Place:
        return _Place(self.cache, _checked(key))


@dataclasses.dataclass(frozen=True)
class _Place:
    cache: Cache
    key: tuple[Any, Any]

    def set_kv(self, new_cache: Cache) -> Cache:
        """Writes keys, values and positions, and leaves `end_index` as it was."""
        if set(new_cache.cache) != set(self.cache.cache):
            differ = sorted(set(new_cache.cache) ^ set(self.cache.cache))
            raise ShapeError(f"set_kv: the caches have different layers: {differ}")
        return Cache(
            {
                name: dict(layer)
                | {
                    part: layer[part].at[self.key].set(new_cache.cache[name][part].astype(layer[part].dtype))
                    for part in _PARTS
                    if part in layer and part in new_cache.cache[name]
                }
                for name, layer in self.cache.cache.items()
            }
        )


def _cut(layer: Mapping[str, Array], key: tuple[Any, Any]) -> dict[str, Array]:
    return {name: array[key] if name in _PARTS else array for name, array in layer.items()}


def _checked(key: Any) -> tuple[Any, Any]:
    if not isinstance(key, tuple) or len(key) != 2:
        raise ShapeError(f"Unsupported slicing: {key!r}. Should be `(batch, seq_length)`.")
    return key
