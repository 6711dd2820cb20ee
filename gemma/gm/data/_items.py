# SPDX-License-Identifier: Apache-2.0
"""The first pass over examples: each is encoded once, its length and labels noted, a digest of all ids taken.

What is noted is 32 bytes per item (an item is what goes into one row: an example, or a piece of a long text). Encoded
items are kept as long as they fit the budget; the others are read and encoded again when their batch comes.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gemma.errors import DataError, GemmaError
from gemma.gm.data._encode import Dropped, EncodedExample, Encoder, too_long
from gemma.gm.data._examples import Examples

_OVERHEAD = 400  # bytes of an EncodedExample besides its arrays' contents


@dataclasses.dataclass
class Counts:
    """What became of the examples: numbers of examples, and of tokens."""

    kept: int = 0
    cut: int = 0
    split: int = 0
    dropped_long: int = 0
    no_labels: int = 0
    tokens: int = 0
    label_tokens: int = 0
    tokens_lost: int = 0


class Items:
    """Examples as items that go into rows.

    Attributes:
      lengths: int32 [n] positions that each item needs in a row.
      tokens: int32 [n] tokens of each item; of a preference, those of both answers.
      counts: see `Counts`.
      digest: of all ids, masks, classes and names of images: the same data under the same settings, and no other.
      max_images: pictures of the item that has the most.
    """

    def __init__(
        self,
        examples: Examples,
        encoder: Encoder,
        *,
        cache_bytes: int,
        progress: Callable[[int, int], None] | None = None,
    ):
        # All rows that are too long are refused at once, after the pass: one by one they would cost a run each.
        self._refuses = encoder.truncate == "error"
        self._long: list[tuple[int, int]] = []  # (example, positions)
        encoder = dataclasses.replace(encoder, truncate="drop") if self._refuses else encoder
        self._examples, self._encoder, self._budget = examples, encoder, cache_bytes
        self._cache: dict[int, EncodedExample] = {}
        self._of, self._piece, lengths, tokens = array("q"), array("l"), array("l"), array("l")
        self.counts, self.max_images = Counts(), 0
        digest = hashlib.blake2b(digest_size=16)
        for index in range(len(examples)):
            for n, item in enumerate(self._encode(index)):
                digest.update(_bytes(item))
                self._keep(len(lengths), item)
                self._of.append(index)
                self._piece.append(n)
                lengths.append(len(item))
                tokens.append(item.tokens)
                self.max_images = max(self.max_images, len(item.images))
            if progress is not None and ((index + 1) % 1000 == 0 or index + 1 == len(examples)):
                progress(index + 1, len(examples))
        if self._long:
            self._refuse()
        self.digest = digest.hexdigest()
        self.lengths, self.tokens = np.array(lengths, np.int32), np.array(tokens, np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, item: int) -> EncodedExample:
        held = self._cache.get(item)
        if held is not None:
            return held
        found = self._encoded(self._of[item])
        if isinstance(found, Dropped) or len(found[self._piece[item]]) != self.lengths[item]:
            raise DataError(f"{self.where(item)}: the example is another than before: the file has changed")
        return found[self._piece[item]]

    def _refuse(self) -> None:
        (first, positions), longest = self._long[0], max(positions for _, positions in self._long)
        rows = f"{len(self._long)} of {len(self._examples)} rows"
        others = f" ({rows} are too long, the longest has {longest})" if len(self._long) > 1 else ""
        raise DataError(f"{self._examples.where(first)}: {too_long(positions, self._encoder.max_length, others)}")

    def where(self, item: int) -> str:
        return self._examples.where(self._of[item])

    def _encoded(self, index: int) -> list[EncodedExample] | Dropped:
        example = self._examples[index]
        try:
            return self._encoder(example)
        except GemmaError as error:
            raise DataError(f"{self._examples.where(index)}: {error}") from None

    def _encode(self, index: int) -> list[EncodedExample]:
        """The items of an example, counted."""
        found, counts = self._encoded(index), self.counts
        if isinstance(found, Dropped):
            counts.dropped_long += found.why == "long"
            if self._refuses and found.why == "long":
                self._long.append((index, found.positions))
            counts.no_labels += found.why == "no labels"
            counts.tokens_lost += found.tokens
            return []
        counts.kept += 1
        counts.cut += any(item.cut for item in found)
        counts.split += len(found) > 1
        counts.tokens += sum(item.tokens for item in found)
        counts.label_tokens += sum(item.label_tokens for item in found)
        counts.tokens_lost += sum(item.cut for item in found)
        return found

    def _keep(self, item: int, encoded: EncodedExample) -> None:
        size = 5 * encoded.tokens + _OVERHEAD + sum(len(i) for i in encoded.images if isinstance(i, bytes))
        if size <= self._budget:
            self._budget -= size
            self._cache[item] = encoded


def _bytes(item: EncodedExample) -> bytes:
    """What tells an item from others; of an image its name, since folders move."""
    images = [i if isinstance(i, bytes) else Path(i).name.encode("utf-8", "surrogateescape") for i in item.images]
    parts = [item.ids.tobytes(), np.packbits(item.loss_mask).tobytes(), *images, f"{item.label} {item.good}".encode()]
    if item.rejected is not None:
        parts.append(_bytes(item.rejected))
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)
