# SPDX-License-Identifier: Apache-2.0
"""The preallocated cache: local layers keep a ring of their window, nothing is copied per token.

It has the face of `KVCache` in `gemma/modeling_gemma.py`, which grows by concatenation. Token number n of a row lives
in slot n % slots of every layer; padding is not stored, so rows of any padding share the arrays. A chunk attends over
what the ring holds and the chunk itself, then writes; a single token writes first: its slot held what its window has
just left.

    window 4, tokens 0..5 held      slots        0 1 2 3
                                    numbers      4 5 2 3        the next token, number 6, goes to slot 2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gemma.config import LayerSpec
from gemma.errors import ConfigError, ContextFull, ShapeError


class _Write(NamedTuple):
    """Where the new tokens go in the layers of one number of slots; rows, cols and slots are index tensors [n]."""

    rows: Tensor | None  # None: every row, one token each
    cols: Tensor | None
    slots: Tensor
    filled: int  # slots looked at
    positions: Tensor  # [B, S] of the keys that `update` returns
    place: int | None = None  # the slot that the first token of every row goes to, the others after it; if known


class WindowedKVCache:
    """Keys and values of up to `max_len` tokens for each of `batch` rows.

      cache = WindowedKVCache(config.layers, batch=1, max_len=4096, dtype=torch.bfloat16)
      model(input_ids=prompt, kv_cache=cache)

    Attributes:
      keys, values: by layer, [B, K, slots, H]; `nbytes` of them are `GemmaConfig.cache_bytes` per row, exactly.
      static: single tokens look at all slots, used or not, and nothing is decided from counts: shapes never change,
        so that `torch.compile` compiles once. The caller then counts the tokens. False: only used slots are read.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        static: bool = False,
    ):
        if batch < 1 or max_len < 1:
            raise ShapeError(f"cache: expected at least 1 row and 1 token, got {batch} rows of {max_len} tokens")
        if any(spec.kv_source != spec.index or spec.bidirectional for spec in layers):
            raise ConfigError("cache: layers that share keys and values, or that see the future, cannot be cached here")
        self.max_len, self.static = max_len, static
        self._slots = [spec.cache_length(max_len) for spec in layers]
        shapes = [(batch, s.num_kv_heads, slots, s.head_dim) for s, slots in zip(layers, self._slots)]
        self.keys = [_zeros(shape, dtype, device) for shape in shapes]
        self.values = [_zeros(shape, dtype, device) for shape in shapes]
        self._positions = {n: torch.full((batch, n), -1, device=device) for n in dict.fromkeys(self._slots)}
        self._counts = torch.zeros(batch, dtype=torch.long, device=device)
        self._most = 0  # no row holds more tokens
        self._writes: dict[int, _Write] = {}

    @property
    def batch(self) -> int:
        return len(self._counts)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self.keys, *self.values))

    def num_items(self) -> int:
        """Tokens held, of the fullest row."""
        return int(self._counts.max())

    def token_counts(self) -> Tensor | None:
        """Tokens of each row [B]; None if there are none at all."""
        return self._counts.clone() if self._most or self.static else None

    def rows(self, start: int, stop: int) -> WindowedKVCache:
        """The rows start..stop-1 as a cache of their own that shares this one's memory: filling it fills these."""
        part = object.__new__(WindowedKVCache)
        part.max_len, part.static, part._slots, part._writes = self.max_len, self.static, self._slots, {}
        part.keys, part.values = [k[start:stop] for k in self.keys], [v[start:stop] for v in self.values]
        part._positions = {n: table[start:stop] for n, table in self._positions.items()}
        part._counts = self._counts[start:stop]
        part._most = int(part._counts.max())
        return part

    def clear(self) -> None:
        """Empties every row."""
        self._counts.zero_()
        for table in self._positions.values():
            table.fill_(-1)
        self._most = 0

    def copy_prefix(self, source: WindowedKVCache, count: int) -> bool:
        """Makes every row hold the first `count` tokens of the one row of `source`, where its rings still have them.

        Returns:
          False, and nothing is changed, if a local layer has overwritten some of them.
        """
        held = source.num_items()
        if any(held > count and held > slots for slots in self._slots):
            return False
        if count == 0:
            self.clear()
            return True
        for ours, theirs in zip((*self.keys, *self.values), (*source.keys, *source.values)):
            ours.copy_(theirs)
        for slots, table in self._positions.items():
            table.copy_(source._positions[slots])
            if held <= slots:
                table[:, count:] = -1
        self._counts.fill_(count)
        self._most = count
        return True

    def prepare(self, positions: Tensor, valid: Tensor | None) -> None:
        """As in `KVCache`. Raises ContextFull if a row would hold more than `max_len` tokens; nothing is changed then.

        While `static`, single tokens are not counted: the caller does.
        """
        B, T = positions.shape
        if self.batch != B:
            raise ShapeError(f"kv_cache: it holds {self.batch} rows, but {B} rows came")
        if T > 1 or not self.static:
            self._make_room(T, valid)
        self._writes = self._step(positions, valid) if T == 1 else self._chunk(positions, valid)

    def key_positions(self, layer_idx: int) -> Tensor:
        """Positions [B, S] of the keys that `update` will return, -1 where a key must not be looked at."""
        return self._writes[self._slots[layer_idx]].positions

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Stores keys and values [B, K, T, H] of one layer, announced by `prepare`.

        Returns:
          keys and values [B, K, S, H] to look at, in the order of `key_positions` and the dtype of the arguments.
        """
        write = self._writes[self._slots[layer_idx]]
        pairs = ((self.keys[layer_idx], key_states), (self.values[layer_idx], value_states))
        keys, values = (_store(old, new, write) for old, new in pairs)
        return keys, values

    def _make_room(self, T: int, valid: Tensor | None) -> None:
        most = self._most + T
        if most > self.max_len or (valid is not None and T > 1):  # the bound is not enough: count
            new = T if valid is None else valid.sum(1)
            most = int((self._counts + new).max())
            if most > self.max_len:
                raise ContextFull(most, self.max_len, "the cache's content and these tokens")
        self._before, self._most = self._most, most

    def _step(self, positions: Tensor, valid: Tensor | None) -> dict[int, _Write]:
        rows = None if valid is None else valid[:, 0].nonzero()[:, 0]
        counts = self._counts if rows is None else self._counts[rows]
        writes = {}
        for n, table in self._positions.items():
            slots = counts % n
            if rows is None:
                table.scatter_(1, slots[:, None], positions)
            else:
                table[rows, slots] = positions[rows, 0]
            filled = n if self.static else min(n, self._most)
            place = None
            if rows is None and not self.static and slots.device.type == "cpu":  # a GPU would have to be waited for
                places = set(slots.tolist())
                place = places.pop() if len(places) == 1 else None
            writes[n] = _Write(rows, None, slots, filled, table[:, :filled], place)
        self._counts += 1 if valid is None else valid[:, 0]
        return writes

    def _chunk(self, positions: Tensor, valid: Tensor | None) -> dict[int, _Write]:
        real = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
        numbers = self._counts[:, None] + real.cumsum(1) - 1  # [B, T], the token's number in its row
        end = self._counts + real.sum(1)
        shown = positions.masked_fill(~real, -1)
        starts = set(self._counts.tolist()) if valid is None else ()
        writes = {}
        for n, table in self._positions.items():
            rows, cols = (real & (numbers >= end[:, None] - n)).nonzero(as_tuple=True)
            slots = numbers[rows, cols] % n
            filled = min(n, self._before)
            place = min(starts) if len(starts) == 1 and min(starts) + positions.shape[1] <= n else None
            writes[n] = _Write(rows, cols, slots, filled, torch.cat([table[:, :filled], shown], 1), place)
            table[rows, slots] = positions[rows, cols]
        self._counts.copy_(end)
        return writes


def _store(old: Tensor, new: Tensor, write: _Write) -> Tensor:
    """Writes new [B, K, T, H] into old [B, K, slots, H]; returns what is to be looked at."""
    stored = new.detach().to(old.dtype)
    if write.cols is None:  # one token
        if write.place is not None:  # a plain copy is several times quicker than one by index
            old[:, :, write.place : write.place + 1] = stored
        elif write.rows is None and len(old) == 1:
            old.index_copy_(2, write.slots, stored)
        else:
            rows = torch.arange(len(old), device=old.device) if write.rows is None else write.rows
            old[rows, :, write.slots] = stored[rows, :, 0] if write.rows is not None else stored[:, :, 0]
        return old[:, :, : write.filled].to(new.dtype)
    new = new if old.dtype == new.dtype else stored.to(new.dtype)
    seen = torch.cat([old[:, :, : write.filled].to(new.dtype), new], 2) if write.filled else new
    if write.place is not None:
        old[:, :, write.place : write.place + stored.shape[2]] = stored
    else:
        old[write.rows, :, write.slots] = stored[write.rows, :, write.cols]
    return seen


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros, so that an unused slot is a finite number; on the CPU a page costs memory only when it is first used."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)
