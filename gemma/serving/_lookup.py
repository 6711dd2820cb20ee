# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: guesses the next tokens of a sequence from what followed the same words earlier in it. Ids only.

A guess is right where a text quotes itself: summaries, edits of code, tables, loops. A runner checks a whole guess in
one pass (`CpuRunner.verify`), so a wrong guess costs time and never changes a token. To keep that cost small the guesses
grow while they are right, and after wrong ones a longer match is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHORTEST, _FIRST, _LONGEST = 2, 3, 6  # ids that must agree before a guess: at least, at first, after wrong guesses
_PLACES = 8  # earlier places of the same two ids that are compared


class Lookup:
    """Guesses for one sequence.

    lookup = Lookup(most=8)
    lookup.extend(ids)
    guess = lookup.draft(room=100)        # [] where nothing like the end has come before
    lookup.learn(len(guess), accepted=3)
    """

    def __init__(self, most: int = 8):
        """`most`: tokens of a guess."""
        self.most = most
        self._size = min(2, most)
        self._need = _FIRST
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # two ids to the places after them, oldest first

    def extend(self, ids: Sequence[int]) -> None:
        """The sequence has grown."""
        for token in ids:
            end = len(self._ids)
            if end >= _SHORTEST:  # the place before this token is an earlier one from now on
                places = self._places.setdefault(tuple(self._ids[end - _SHORTEST : end]), [])
                places.append(end)
                if len(places) > _PLACES:
                    del places[0]
            self._ids.append(int(token))

    def draft(self, room: int) -> list[int]:
        """What may follow, at most `room` ids: what followed the longest match, the newest of equals."""
        size = min(self._size, room)
        if size < 1 or len(self._ids) < _SHORTEST:
            return []
        best, length = 0, self._need - 1
        for place in reversed(self._places.get(tuple(self._ids[-_SHORTEST:]), ())):
            match = self._match(place)
            if match > length:
                best, length = place, match
        return self._ids[best : best + size] if best else []

    def learn(self, drafted: int, accepted: int) -> None:
        """How a guess turned out."""
        if accepted == drafted:
            self._size = min(2 * self._size, self.most)
        else:
            self._size = max(1, min(self._size, accepted + 1))
        if not accepted:
            self._need = min(self._need + 1, _LONGEST)
        elif 2 * accepted >= drafted:
            self._need = max(self._need - 1, _SHORTEST)

    def _match(self, place: int) -> int:
        """How many ids before `place` equal those at the end, up to the longest that is ever asked for."""
        ids, most = self._ids, min(place, _LONGEST)
        count = _SHORTEST
        while count < most and ids[place - 1 - count] == ids[-1 - count]:
            count += 1
        return count
