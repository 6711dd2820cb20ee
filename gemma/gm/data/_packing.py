# SPDX-License-Identifier: Apache-2.0
"""Which examples share a batch and a row: shuffling, packing, buckets of lengths. Works on lengths alone, with no ids.

A plan is a pure function of the lengths, the settings and the number of the epoch, so a run that was stopped finds its
place again by counting: what was in the packing buffer follows. `_loader.py` makes arrays of it.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from gemma.errors import DataError

MAX_BUCKETS = 4  # of the lengths that are chosen here: each is one more compilation
_STEP = 16  # they are multiples of it


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One batch to be: its width T in tokens, and per row the items in it. Rows are full from the first one on."""

    width: int
    rows: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How items become batches.

    Attributes:
      batch_size: rows.
      width: of packed rows, in tokens.
      packing: None, "best" (each item into the fullest row that still takes it) or "first" (into the oldest).
      buffer: rows that packing keeps open.
      buckets: widths that batches are padded to, ascending; the last holds any item.
      shuffle: another order in each epoch; else the order of the examples, always.
      group: with no packing, put items of one bucket together.
      drop_last: leave out the rows at an epoch's end that fill no batch.
    """

    batch_size: int
    width: int
    packing: str | None
    buffer: int
    buckets: tuple[int, ...]
    shuffle: bool
    group: bool
    drop_last: bool
    seed: int

    def batches(self, lengths: np.ndarray, epoch: int) -> Iterator[PlannedBatch]:
        """The batches of an epoch, in which every item is in one row exactly (unless `drop_last`)."""
        n = len(lengths)
        items = order(n, self.seed, epoch) if self.shuffle else np.arange(n)
        if self.packing is not None:
            rows = pack(items, lengths[items], self.width, self.buffer, best=self.packing == "best")
            yield from self._batched(rows, lambda _: self.width)
        elif self.group:
            yield from self._grouped(items, lengths)
        else:
            rows = ((int(item),) for item in items)
            yield from self._batched(rows, lambda batch: self._bucket(max(lengths[row[0]] for row in batch)))

    def _bucket(self, length: int) -> int:
        return self.buckets[bisect.bisect_left(self.buckets, length)]

    def _batched(self, rows, width) -> Iterator[PlannedBatch]:
        batch: list[tuple[int, ...]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == self.batch_size:
                yield PlannedBatch(width(batch), tuple(batch))
                batch = []
        if batch and not self.drop_last:
            yield PlannedBatch(width(batch), tuple(batch))

    def _grouped(self, items: np.ndarray, lengths: np.ndarray) -> Iterator[PlannedBatch]:
        """A batch goes out when its bucket is full; at the end, what is left of a bucket joins the next larger one."""
        waiting: dict[int, list[tuple[int, ...]]] = {width: [] for width in self.buckets}
        chosen = np.searchsorted(np.array(self.buckets), lengths[items])
        for item, bucket in zip(items.tolist(), chosen.tolist()):
            width = self.buckets[bucket]
            rows = waiting[width]
            rows.append((item,))
            if len(rows) == self.batch_size:
                yield PlannedBatch(width, tuple(rows))
                waiting[width] = []
        left: list[tuple[int, ...]] = []
        for width in self.buckets:
            left += waiting[width]
            while len(left) >= self.batch_size:
                yield PlannedBatch(width, tuple(left[: self.batch_size]))
                left = left[self.batch_size :]
        if left and not self.drop_last:
            yield PlannedBatch(self._bucket(max(lengths[row[0]] for row in left)), tuple(left))


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..n-1, int64 [n], that depends on nothing but the arguments, on any machine and version.

    The indices are sorted by a hash of (seed, epoch, index): splitmix64's finalizer.
    """
    with np.errstate(over="ignore"):
        start = np.uint64(seed % 2**64) * np.uint64(0xD1342543DE82EF95) + np.uint64(epoch)
        keys = _mix(np.arange(n, dtype=np.uint64) + _mix(_mix(start)))
    return np.argsort(keys, kind="stable")


def _mix(x):
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pack(
    items: Sequence[int], lengths: Sequence[int], width: int, buffer: int, *, best: bool
) -> Iterator[tuple[int, ...]]:
    """Rows of items whose lengths sum to at most `width`; no item is cut.

    At most `buffer` rows are open. One that nothing fits into any more goes out at once; when there are too many, the
    fullest does (best fit) or the oldest (first fit).

    Args:
      items, lengths: the items in their order, and their lengths, each at most `width`.
      best: best fit; otherwise first fit.
    """
    items, lengths = np.asarray(items).tolist(), np.asarray(lengths).tolist()
    smallest = min(lengths, default=1)
    choose = _BestFit() if best else _FirstFit()
    for item, length in zip(items, lengths):
        free, row = choose.take(length) or (width, [])
        row.append(item)
        free -= length
        if free < smallest:
            yield tuple(row)
            continue
        choose.put(free, row)
        if len(choose) > buffer:
            yield tuple(choose.close())
    while len(choose):
        yield tuple(choose.close())


class _BestFit:
    """Open rows by free space. Ties go to the older one."""

    def __init__(self):
        self._open: list[tuple[int, int, list[int]]] = []  # (free, serial number, row), ascending
        self._serial = 0

    def __len__(self) -> int:
        return len(self._open)

    def take(self, length: int) -> tuple[int, list[int]] | None:
        at = bisect.bisect_left(self._open, (length,))
        if at == len(self._open):
            return None
        free, _, row = self._open.pop(at)
        return free, row

    def put(self, free: int, row: list[int]) -> None:
        self._serial += 1
        bisect.insort(self._open, (free, self._serial, row))

    def close(self) -> list[int]:
        return self._open.pop(0)[2]


class _FirstFit:
    """Open rows by age."""

    def __init__(self):
        self._open: list[tuple[int, list[int]]] = []
        self._taken: int | None = None

    def __len__(self) -> int:
        return len(self._open)

    def take(self, length: int) -> tuple[int, list[int]] | None:
        at = next((n for n, (free, _) in enumerate(self._open) if free >= length), None)
        self._taken = at
        return None if at is None else self._open.pop(at)

    def put(self, free: int, row: list[int]) -> None:
        self._open.insert(len(self._open) if self._taken is None else self._taken, (free, row))

    def close(self) -> list[int]:
        return self._open.pop(0)[1]


def choose_buckets(lengths: np.ndarray, max_length: int, count: int = MAX_BUCKETS) -> tuple[int, ...]:
    """At most `count` widths with the least padding if each item were padded to the smallest one that holds it.

    Widths are multiples of 16 (of more above 2048 tokens), but for `max_length`, the largest possible.
    """
    step = _STEP
    while max_length > 128 * step:  # the search is quadratic in the number of widths
        step *= 2
    widths, counts = np.unique(np.minimum(-(-lengths // step) * step, max_length), return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    # best[k][j]: least sum of widths over the items of widths[:j], with k buckets, the last of which is widths[j - 1]
    best = np.full((count + 1, len(widths) + 1), np.inf)
    best[0, 0] = 0
    came = np.zeros((count + 1, len(widths) + 1), int)
    for k in range(1, count + 1):
        for j in range(1, len(widths) + 1):
            costs = best[k - 1, :j] + (before[j] - before[:j]) * float(widths[j - 1])
            came[k, j] = int(np.argmin(costs))
            best[k, j] = costs[came[k, j]]
    k, j, chosen = int(np.argmin(best[1:, -1])) + 1, len(widths), []
    while j:
        chosen.append(int(widths[j - 1]))
        k, j = k - 1, came[k, j]
    return tuple(reversed(chosen))


def checked_buckets(buckets: Sequence[int] | None, lengths: np.ndarray, max_length: int) -> tuple[int, ...]:
    """The widths of batches: the caller's, and `max_length` if an item is wider than all; or chosen by the lengths."""
    longest = int(lengths.max())
    if buckets is None:
        return choose_buckets(lengths, max_length)
    found = tuple(buckets) if isinstance(buckets, Sequence) and not isinstance(buckets, str) else ()
    if not found or not all(isinstance(b, int) and not isinstance(b, bool) and b > 1 for b in found):
        raise DataError(f"buckets: expected widths in tokens such as (128, 256), got {buckets!r:.80}")
    found = tuple(sorted({min(b, max_length) for b in found}))
    if found[-1] < longest:
        found = (*found, max_length)
    return found
