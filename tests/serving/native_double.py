# SPDX-License-Identifier: Apache-2.0
"""A decoder in a few lines of numpy with the calls of `kernels._model.NativeModel`, for tests of what stands above it.

The logits after a history are a hash of it, with some of the ids much likelier than the others, so that guesses are
sometimes right. A slot forgets like a ring: once it has held more than `ring` tokens, what a shorter history needs is
gone.
"""

from __future__ import annotations

import hashlib

import numpy as np

from gemma.errors import SamplingError
from gemma.testing import tiny_config


class DoubleModel:
    """`NativeModel` without weights."""

    def __init__(self, *, window=5, vocab_size=320, spread=3.0, period: int | None = None, few: int = 10**9):
        """`period`: the logits depend on that many last ids only, and on them modulo `few`: texts repeat themselves."""
        self.config = tiny_config("gemma3", vocab_size=vocab_size, sliding_window=window)
        self._window, self._spread, self._period, self._few = window, spread, period, few
        self.poison: set[int] = set()  # ids after which the logits are NaN
        self.calls: list[str] = []

    def open(self, slots, max_len, cache_type="float32", chunk=512):
        self._ids = [[] for _ in range(slots)]
        self._rows = [None] * slots
        self._most = [0] * slots  # the longest history since the slot was empty
        self.max_len, self.chunk = max_len, chunk
        self._guessed = (-1, 0)  # slot and length before the newest guess, which can be taken back

    cache_bytes = 0

    def length(self, slot):
        return len(self._ids[slot])

    def _row(self, ids):
        seen = ids if self._period is None else ids[-self._period :]
        seen = [i % self._few for i in seen]
        digest = hashlib.blake2b(np.array(seen, np.int64).tobytes(), digest_size=8).digest()
        row = np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(self.config.vocab_size)
        row = (row * self._spread).astype(np.float32)
        return np.full_like(row, np.nan) if ids[-1] in self.poison else row

    def _feed(self, slot, ids):
        self._guessed = (-1, 0)
        assert len(self._ids[slot]) + len(ids) <= self.max_len
        self._ids[slot] += [int(i) for i in ids]
        self._most[slot] = max(self._most[slot], len(self._ids[slot]))
        self._rows[slot] = self._row(self._ids[slot])

    def prefill(self, slot, ids):
        self.calls.append(f"prefill {slot} {len(ids)}")
        self._feed(slot, ids)

    def step(self, slots, tokens):
        assert len(set(slots)) == len(slots)
        self.calls.append(f"step {len(slots)}")
        for slot, token in zip(slots, tokens, strict=True):
            self._feed(slot, [token])

    def score(self, slot, ids):
        assert len(ids) <= self.chunk
        self.calls.append(f"score {len(ids)}")
        before = list(self._ids[slot])
        self._feed(slot, ids)
        self._guessed = (slot, len(before))
        return np.stack([self._row([*before, *ids[: n + 1]]) for n in range(len(ids))])

    def logits(self, slot):
        return self._rows[slot]

    def truncate(self, slot, n):
        if slot == self._guessed[0] and n >= self._guessed[1]:
            self._most[slot] = n
        self._guessed = (-1, 0)
        if n and self._most[slot] - n > 1 and self._most[slot] > self._window:
            return False
        if n < len(self._ids[slot]):
            self._ids[slot], self._rows[slot] = self._ids[slot][:n], None
        if not n:
            self._most[slot] = 0
        return True

    def copy(self, src, dst, n):
        if n < len(self._ids[src]) and self._most[src] - n > 1 and self._most[src] > self._window:
            return False
        self._ids[dst], self._rows[dst], self._most[dst] = self._ids[src][:n], None, n
        return True

    @staticmethod
    def top_k(logits, k):
        if np.isnan(logits).any() or not np.isfinite(logits.max()):
            raise SamplingError("the logits are not finite")
        order = np.argsort(-logits, kind="stable")[:k]
        order = order[np.isfinite(logits[order])].astype(np.int32)
        most = float(logits.max())
        return order, logits[order], most + float(np.log(np.exp(logits.astype(np.float64) - most).sum()))
