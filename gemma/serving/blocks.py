# SPDX-License-Identifier: Apache-2.0
"""Who holds which part of the cache, and what of it can be used again. Bookkeeping on ids: it never sees a tensor.

A block of this cache is a whole slot: the runners keep a sequence in one piece. A slot that was given back keeps its
tokens until somebody needs the room, so that the next sequence that begins in the same way need not read them again;
the slot of a running sequence can be copied from as well. Every slot has at most one owner at any time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

from gemma.errors import GemmaError

LEAST = 8  # tokens in common from which a copy beats reading; fewer cost less to compute than to bookkeep


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a sequence goes: `slot` takes over the first `reuse` tokens of slot `source` (None: of nobody)."""

    slot: int
    source: int | None = None
    reuse: int = 0


@dataclasses.dataclass
class _Slot:
    ids: list[int] = dataclasses.field(default_factory=list)
    owner: Hashable | None = None
    used: int = 0  # when it was last given back, in turns


class Slots:
    """The slots of one runner.

    slots = Slots(4)
    place = slots.take(ids, owner="a")       # None: all are busy
    slots.extend(place.slot, ids[place.reuse:])
    slots.give_back(place.slot)              # its tokens stay for whoever begins alike
    """

    def __init__(self, count: int, able: Callable[[int, int], bool] | None = None):
        """`able(slot, n)`: whether the runner can hand on the first n tokens of a slot without reading them again."""
        self._slots = [_Slot() for _ in range(count)]
        self._able = able or (lambda slot, n: True)
        self._turn = 0

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def free(self) -> int:
        """How many have no owner."""
        return sum(slot.owner is None for slot in self._slots)

    def owner(self, slot: int) -> Hashable | None:
        return self._slots[slot].owner

    def ids(self, slot: int) -> Sequence[int]:
        """What a slot holds."""
        return self._slots[slot].ids

    def take(self, ids: Sequence[int], owner: Hashable) -> Placement | None:
        """Gives a slot to an owner, with what it can take over of `ids`; None where every slot has an owner.

        Of the slots that begin like `ids`, the one with the longest common beginning is the source. It is the target
        too if nobody owns it and it would not lose more than it keeps, or if no other is free; else the target is the
        free slot that was given back longest ago, empty ones first.
        """
        free = [n for n, slot in enumerate(self._slots) if slot.owner is None]
        if not free:
            return None
        source, reuse = self._source(list(ids))
        oldest = min(free, key=lambda n: (bool(self._slots[n].ids), self._slots[n].used, n))
        target = oldest
        if source in free and (2 * reuse >= len(self._slots[source].ids) or len(free) == 1):
            target = source
        elif oldest == source:
            target = min((n for n in free if n != source), key=lambda n: (self._slots[n].used, n))
        self._slots[target].owner = owner
        self._slots[target].ids = list(ids[:reuse])
        return Placement(target, source, reuse)

    def extend(self, slot: int, ids: Sequence[int]) -> None:
        """The owner's sequence has been cached further."""
        self._owned(slot).ids.extend(ids)

    def give_back(self, slot: int, *, keep: bool = True) -> None:
        """Ends the ownership. Without `keep` nothing of it is used again."""
        held = self._owned(slot)
        self._turn += 1
        held.owner, held.used = None, self._turn
        if not keep:
            held.ids = []

    def clear(self, slot: int) -> None:
        """The owner's sequence is begun anew."""
        self._owned(slot).ids = []

    def _owned(self, slot: int) -> _Slot:
        held = self._slots[slot]
        if held.owner is None:
            raise GemmaError(f"slot {slot} belongs to nobody; take it first")
        return held

    def _source(self, ids: list[int]) -> tuple[int | None, int]:
        best, reuse = None, min(LEAST, len(ids)) - 1
        for number, slot in enumerate(self._slots):
            common = common_prefix(slot.ids, ids)
            if common > reuse and self._able(number, common):
                best, reuse = number, common
        return (None, 0) if best is None else (best, reuse)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two sequences begin with alike."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] == b[:low], a[:high] != b[:high]; slices are compared by C
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
