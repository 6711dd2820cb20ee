# SPDX-License-Identifier: Apache-2.0
"""Planned rows as the arrays of a batch, padded to its width. Which rows is `_packing.py`; pictures are read here.

tokens        2 105 9731 107 ...    0 0      the ids; 0 is padding
targets     105 9731 107 ...    0   0 0      the next id, where it is a label
loss_mask     F  F   T  ...     F   F F      True where `targets` counts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gemma.errors import DataError, GemmaError
from gemma.gm.data._encode import EncodedExample

Batch = dict[str, np.ndarray]
Get = Callable[[int], EncodedExample]


def make_batch(
    rows: Sequence[Sequence[int]],
    get: Get,
    *,
    kind: str,
    width: int,
    packing: bool,
    images: tuple[int, int] | None = None,
    where: Callable[[int], str] = str,
) -> Batch:
    """The arrays of a batch; see `Loader` for them.

    Args:
      rows: items of each row; an empty one becomes padding.
      get: an item's ids.
      images: (pictures per row, side in pixels), or None for text.
      where: an item's file and line, for errors.
    """
    if kind == "preference":
        batch = _pairs(rows, get, width)
    else:
        batch = _rows(rows, get, width, packing)
    only = [get(row[0]) if row else None for row in rows]
    if kind == "kto":
        batch["good"] = np.array([item is not None and bool(item.good) for item in only])
    if kind == "classification":
        batch["label"] = np.array([-1 if item is None else item.label for item in only], np.int32)
    if images is not None:
        batch["images"] = _pictures(rows, only, *images, where)
    return batch


def _rows(rows: Sequence[Sequence[int]], get: Get, width: int, packing: bool) -> Batch:
    batch = _empty((len(rows), width))
    segments = np.zeros((len(rows), width), np.int32)
    for n, row in enumerate(rows):
        at = 0
        for segment, item in enumerate(row, 1):
            encoded = get(item)
            here = (n, slice(at, at + len(encoded.ids)))
            _put(batch, here, encoded)
            segments[here] = segment
            at += len(encoded.ids)
    return batch | {"segment_ids": segments} if packing else batch


def _pairs(rows: Sequence[Sequence[int]], get: Get, width: int) -> Batch:
    batch = _empty((len(rows), 2, width))
    for n, row in enumerate(rows):
        for item in row:
            chosen = get(item)
            for which, encoded in enumerate((chosen, chosen.rejected)):
                _put(batch, (n, which, slice(0, len(encoded.ids))), encoded)
    return batch


def _empty(shape: tuple[int, ...]) -> Batch:
    ints = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions")}
    return {**ints, "loss_mask": np.zeros(shape, bool)}


def _put(batch: Batch, here: tuple, encoded: EncodedExample) -> None:
    """One example at its place: a target stands where its id is to be predicted, one position earlier."""
    ids, learnt = encoded.ids, encoded.loss_mask
    batch["tokens"][here] = ids
    batch["positions"][here] = np.arange(len(ids))
    before = (*here[:-1], slice(here[-1].start, here[-1].stop - 1))
    batch["targets"][before] = np.where(learnt[1:], ids[1:], 0)
    batch["loss_mask"][before] = learnt[1:]


def _pictures(rows, items: Sequence[EncodedExample | None], count: int, side: int, where) -> np.ndarray:
    from gemma import image  # PIL is slow to import, and most data is text

    pixels = np.zeros((len(rows), count, side, side, 3), np.uint8)
    for n, (row, item) in enumerate(zip(rows, items)):
        for i, source in enumerate(item.images if item is not None else ()):
            try:
                pixels[n, i] = image.resize(image.read_image(source, name=f"images[{i}]"), side, side)
            except GemmaError as error:
                raise DataError(f"{where(row[0])}: {error}") from None
    return pixels
