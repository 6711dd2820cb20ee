# SPDX-License-Identifier: Apache-2.0
"""Batches on their way to a step: joined where gradients are accumulated, filled up, placed, scored by the reference.

Making batches out of rows is `gm.data.Loader`. Axis letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gemma.errors import DataError
from gemma.gm.train._distributed import Placement
from gemma.gm.train._objectives import Objective, base_of
from gemma.gm.train._processes import process
from gemma.gm.train._state import merge_trainable

HostBatch = Mapping[str, np.ndarray]


def join(batches: Sequence[HostBatch], rows: int = 1) -> dict[str, np.ndarray]:
    """One batch with the rows of several, in their order. Zeros, which no loss counts, make up what is short.

    Args:
      batches: with the same fields; some may lack `images`. Lengths T and numbers of rows may differ.
      rows: the result has a multiple of so many rows.

    Raises:
      DataError: (a ValueError) the batches have different fields.
    """
    names = dict.fromkeys(name for batch in batches for name in batch)
    joined = {}
    for name in names:
        lacking = [batch for batch in batches if name not in batch]
        if lacking and name != "images":
            raise DataError(f"{name}: some batches of a step have it and some do not; expected the same fields in all")
        arrays = [np.asarray(batch[name]) for batch in batches if name in batch]
        inner = tuple(max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays)))
        counts = [len(np.asarray(batch["tokens"])) for batch in batches]
        total = sum(counts)
        out = np.zeros((-(-total // rows) * rows, *inner), arrays[0].dtype)
        start = 0
        for batch, count in zip(batches, counts):
            if name in batch:
                array = np.asarray(batch[name])
                out[(slice(start, start + len(array)), *(slice(size) for size in array.shape[1:]))] = array
            start += count
        joined[name] = out
    return joined


def take(batches: Iterator[HostBatch], count: int) -> list[HostBatch]:
    """The next batches of a step; fewer where the data end, none after that."""
    taken = []
    for _ in range(count):
        batch = next(batches, None)
        if batch is None:
            break
        taken.append(batch)
    return taken


def count_tokens(batch: HostBatch) -> int:
    """Real tokens of a batch: padding is id 0."""
    return int(np.count_nonzero(batch["tokens"]))


class Feed:
    """Host batches to what the step is called with: arrays on the devices, scored by the reference where one is needed.

    Attributes:
      objective: of the run.
      placement: of the run; None: one device.
      accumulate: batches of a step.
    """

    def __init__(self, objective: Objective, start: Any, placement: Placement | None, accumulate: int):
        """`start`: the trained leaves before the first step; what the reference needs of them is copied."""
        self.objective, self.placement, self.accumulate = objective, placement, accumulate
        sizes = {} if placement is None else placement.mesh.shape
        self._copies = max(1, sizes.get("data", 1) * sizes.get("fsdp", 1) // process()[1])  # of the model, here
        self._kept: Any = None
        if objective.reference_fields:
            # With adapters the untrained model is the base, whose frozen leaves are there; else it is a second copy.
            _, kept = base_of(objective.model, start)
            self._kept = jax.tree.map(jax.numpy.array, kept)
            self._score = jax.jit(lambda frozen, kept, batch: objective.reference(merge_trainable(frozen, kept), batch))

    def host(self, batches: Sequence[HostBatch]) -> dict[str, np.ndarray]:
        """The rows of a step, as many as the devices and the accumulation divide."""
        return join(batches, self.accumulate * self._copies)

    def device(self, batch: HostBatch, frozen: Any) -> dict[str, Any]:
        """The arguments of the step."""
        if self.placement is None:
            placed = {name: jax.numpy.asarray(value) for name, value in batch.items()}
        else:
            placed = self.placement.batch(batch)
        if any(name not in placed for name in self.objective.reference_fields):
            placed |= self._score(frozen, self._kept, placed)
        return placed
