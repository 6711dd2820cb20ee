# SPDX-License-Identifier: Apache-2.0
"""`Loader`: examples to batches, the same on every run, machine and number of processes, and resumable at any batch.

Rows to examples is `_read.py`, ids `_encode.py`, which rows meet `_packing.py`, arrays `_arrays.py`. Nothing here knows
a framework; `Loader.to_grain` hands the same batches to grain.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma.chat import ChatFormat
from gemma.errors import DataError
from gemma.gm.data._arrays import Batch, make_batch
from gemma.gm.data._encode import Encoder, Truncate
from gemma.gm.data._examples import Example, Examples
from gemma.gm.data._items import Items
from gemma.gm.data._labels import found_labels, label_tokens
from gemma.gm.data._packing import Plan, PlannedBatch, checked_buckets
from gemma.gm.data._report import DataReport

STATE_VERSION = 1
_PACKING = {False: None, None: None, True: "best", "best": "best", "first": "first"}


class Loader:
    """Batches of examples, as numpy arrays of few shapes.

    A batch is a dict. B is `batch_size` over the number of shards, T one of `buckets` (packed: `max_length`):

        supervised      tokens, targets, positions int32 [B, T]; loss_mask bool [B, T]; packed rows also segment_ids int32
                        [B, T] (0 padding, 1, 2, ...); with images uint8 [B, I, H, W, C]
        preference      tokens, targets, positions int32 [B, 2, T]; loss_mask bool [B, 2, T]; 0 is the chosen answer
        KTO             as supervised, and good bool [B]
        classification  as supervised, one label token per row, and label int32 [B] (index into `labels`)

    `tokens` is 0 where there is padding; `targets[t]` is `tokens[t + 1]` where that is a label, else 0, and `loss_mask`
    is True there. `positions` restart at 0 in every packed example. The batch that ends an epoch is filled up with empty
    rows (tokens 0, loss_mask False, label -1, good False), so that shapes stay the same: weigh losses by tokens or by
    rows that have labels.

    The iterator is exact: `get_state()` is a small JSON-able dict, and an iterator that was given it goes on with the
    very next batch, in the middle of an epoch, shuffled and packed. Batches do not depend on the number of shards.

    Args:
      examples: from `read_examples`, or a list of examples of one kind.
      tokenizer: of the model.
      batch_size: rows per step, over all shards together.
      max_length: tokens that a row holds. An image is one token here, and 256 or more positions to the model.
      packing: put several examples into one row: True or "best" (best fit), or "first" (first fit). For supervised
        text only; no example is cut by it. The model must isolate the segments (`gm.losses.packing_mask`).
      shuffle: another order in each epoch; batches are then of examples of like length. False: the examples' order.
      seed: of the order.
      epochs: times that the examples are gone through; None: without end.
      buckets: widths T that batches are padded to. None: at most 4, chosen from the lengths for the least padding;
        `max_length` joins those that you pass if an example is wider.
        Pass the training loader's `buckets` to the one for evaluation, and no further shapes are compiled.
      truncate: what becomes of examples above `max_length`; see `encode`.
      shard: (index, number): this process' share of every batch, a run of its rows.
      drop_last: leave out the rows at an epoch's end that fill no batch.
      format, template, parse_special, last_turn_only: see `encode`.
      labels: of a classification, the text (or token id) that stands for each label; None: the labels that occur,
        sorted. Give the loader for evaluation the `labels` of the one for training.
      image_size: side in pixels that pictures are resized to; needed with images.
      packing_buffer: rows that packing keeps open.
      cache_bytes: memory for encoded examples; those that do not fit are encoded in each epoch.
      progress: called with (examples done, of how many) during the first pass.

    Raises:
      DataError: (a ValueError) an argument is out of range, or does not suit the kind of the examples.
    """

    def __init__(
        self,
        examples: Examples | Sequence[Example],
        tokenizer: Any,
        *,
        batch_size: int,
        max_length: int,
        packing: bool | str = False,
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        buckets: Sequence[int] | None = None,
        truncate: Truncate = "auto",
        shard: tuple[int, int] = (0, 1),
        drop_last: bool = False,
        format: ChatFormat | None = None,
        labels: Mapping[str, str | int] | Sequence[str] | None = None,
        template: str | None = None,
        parse_special: bool = False,
        last_turn_only: bool = False,
        image_size: int | None = None,
        packing_buffer: int = 256,
        cache_bytes: int = 256 << 20,
        progress: Callable[[int, int], None] | None = None,
    ):
        """Checks the arguments; the data is gone through at the first use of anything that needs it."""
        self.examples = Examples.of(examples)
        self.kind, self.tokenizer = self.examples.kind, tokenizer
        self.batch_size, self.max_length = _at_least(batch_size, 1, "batch_size"), max_length
        self.epochs = None if epochs is None else _at_least(epochs, 1, "epochs")
        self.shard = _checked_shard(shard, self.batch_size)
        if packing not in _PACKING:
            raise DataError(f"packing: expected False, True, 'best' or 'first', got {packing!r:.80}")
        self.packing = _PACKING[packing]
        if self.packing and self.kind != "supervised":
            raise DataError(f"packing: rows of {self.kind} data hold one example each: pass packing=False")
        self.shuffle, self.drop_last, self.image_size = bool(shuffle), bool(drop_last), image_size
        self.seed = _at_least(seed, 0, "seed")
        self._packing_buffer = _at_least(packing_buffer, 1, "packing_buffer")
        self._wanted_buckets, self._cache_bytes, self._progress = buckets, cache_bytes, progress
        self.labels = self._labels(labels)
        self._encoder = Encoder(
            tokenizer=tokenizer,
            max_length=max_length,
            format=format,
            truncate=truncate,
            labels=self.labels,
            template=template,
            parse_special=parse_special,
            last_turn_only=last_turn_only,
        )

    def _labels(self, labels: Any) -> dict[str, int] | None:
        """Label to token, of a classification."""
        if self.kind != "classification":
            if labels is not None:
                raise DataError(f"labels: expected none for {self.kind} data, got {labels!r:.80}")
            return None
        return label_tokens(self.tokenizer, found_labels(self.examples) if labels is None else labels)

    @property
    def label_ids(self) -> np.ndarray | None:
        """Of a classification, the token of each label, int32 [n]; else None."""
        return None if self.labels is None else np.array(list(self.labels.values()), np.int32)

    # --- what the first pass finds

    @functools.cached_property
    def _items(self) -> Items:
        items = Items(self.examples, self._encoder, cache_bytes=self._cache_bytes, progress=self._progress)
        if not len(items):
            c = items.counts
            raise DataError(
                f"{self.examples!r}: no example is left to train on: {c.dropped_long} are longer than max_length "
                f"{self.max_length}, {c.no_labels} have nothing to learn; raise max_length, or see truncate="
            )
        if items.max_images and self.packing:
            raise DataError("packing: rows with images hold one example each: pass packing=False")
        if items.max_images and self.image_size is None:
            raise DataError("image_size: the examples hold images: pass the side of the model's pictures in pixels")
        return items

    @functools.cached_property
    def buckets(self) -> tuple[int, ...]:
        """The widths T that batches may have, ascending."""
        if self.packing:
            return (self.max_length,)
        return checked_buckets(self._wanted_buckets, self._items.lengths, self.max_length)

    @functools.cached_property
    def _plan(self) -> Plan:
        return Plan(
            batch_size=self.batch_size,
            width=self.max_length,
            packing=self.packing,
            buffer=self._packing_buffer,
            buckets=self.buckets,
            shuffle=self.shuffle,
            group=self.shuffle and not self.packing,
            drop_last=self.drop_last,
            seed=self.seed,
        )

    def planned(self, epoch: int) -> Iterator[PlannedBatch]:
        """The batches of an epoch (0, 1, ...) as numbers of items."""
        return self._plan.batches(self._items.lengths, epoch)

    def steps_in(self, epoch: int) -> int:
        """Batches of an epoch. They differ between epochs only with packing, and there by little."""
        return self.report.batches if epoch == 0 else sum(1 for _ in self.planned(epoch))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of the first epoch."""
        return self.report.batches

    @functools.cached_property
    def total_steps(self) -> int | None:
        """Batches of all epochs; None if they are without end."""
        if self.epochs is None:
            return None
        if not (self.packing and self.shuffle):
            return self.epochs * self.steps_per_epoch
        return sum(map(self.steps_in, range(self.epochs)))

    @functools.cached_property
    def report(self) -> DataReport:
        """What became of the examples; print it before the first step."""
        items, shapes, rows, placed, positions = self._items, {}, 0, 0, 0
        copies = 2 if self.kind == "preference" else 1
        for batch in self.planned(0):
            shapes[batch.width] = shapes.get(batch.width, 0) + 1
            rows += len(batch.rows)
            placed += sum(int(items.tokens[item]) for row in batch.rows for item in row)
            positions += copies * batch.width * self.batch_size
        if not shapes:
            raise DataError(
                f"{self.examples!r}: {len(items)} rows fill no batch of {self.batch_size}, and drop_last leaves them "
                f"out: lower batch_size, or pass drop_last=False"
            )
        return DataReport(
            rows=len(self.examples),
            bad_rows=self.examples.bad_rows,
            **dataclasses.asdict(items.counts),
            longest=int(items.lengths.max()),
            median_length=float(np.median(items.lengths)),
            positions=positions,
            placed_tokens=placed,
            batches=sum(shapes.values()),
            shapes=shapes,
            packed_rows=rows,
            items=len(items),
            packing=self.packing is not None,
            batch_size=self.batch_size,
        )

    # --- batches

    def batch(self, planned: PlannedBatch) -> Batch:
        """This shard's rows of a planned batch."""
        index, shards = self.shard
        each = self.batch_size // shards
        rows = [*planned.rows, *[()] * (self.batch_size - len(planned.rows))][index * each : (index + 1) * each]
        items = self._items
        return make_batch(
            rows,
            items.__getitem__,
            kind=self.kind,
            width=planned.width,
            packing=self.packing is not None,
            images=(items.max_images, self.image_size) if items.max_images else None,
            where=items.where,
        )

    def __iter__(self) -> BatchIterator:
        """A new iterator, at the beginning."""
        return BatchIterator(self)

    def to_grain(self) -> Any:
        """The batches as a `grain.IterDataset`, whose iterators have the same states; for grain's threads, or orbax.

        Raises:
          DependencyError: grain is missing.
        """
        from gemma.gm.data._grain import as_dataset

        return as_dataset(self)

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What a state belongs to, JSON-able: a digest of the encoded data, and the settings that place it."""
        return {
            "data": self._items.digest,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "packing": self.packing,
            "packing_buffer": self._packing_buffer if self.packing else None,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "buckets": list(self.buckets),
            "drop_last": self.drop_last,
        }


class BatchIterator(Iterator[Batch]):
    """The batches of a `Loader`, epoch after epoch. Its state is which batch comes next, and of what."""

    def __init__(self, loader: Loader):
        self._loader = loader
        self._go(0, 0)

    def _go(self, epoch: int, batch: int) -> None:
        self._epoch, self._batch = epoch, batch
        self._planned: Iterator[PlannedBatch] | None = None

    @property
    def epoch(self) -> int:
        """The epoch that the last batch was of, from 0; before the first one 0."""
        return self._epoch

    def __next__(self) -> Batch:
        loader = self._loader
        while loader.epochs is None or self._epoch < loader.epochs:
            if self._planned is None:
                loader.report  # noqa: B018 - refuses data that fills no batch, which would loop for ever
                self._planned = itertools.islice(loader.planned(self._epoch), self._batch, None)
            planned = next(self._planned, None)
            if planned is not None:
                try:
                    batch = loader.batch(planned)
                except BaseException:
                    self._planned = None  # this batch is still the next one
                    raise
                self._batch += 1
                return batch
            self._go(self._epoch + 1, 0)
        raise StopIteration

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, JSON-able: the next batch after those that were handed out."""
        state = {"version": STATE_VERSION, "epoch": self._epoch, "batch": self._batch}
        return state | {"of": dict(self._loader.fingerprint)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `get_state` was called, on this or another machine, with any number of shards.

        Raises:
          DataError: it is no such state, or one of other data or settings; they are named. Nothing has changed then.
        """
        if not isinstance(state, Mapping) or state.get("version") != STATE_VERSION:
            raise DataError(f"state: expected one of get_state(), version {STATE_VERSION}, got {state!r:.120}")
        epoch, batch, of = (state.get(name) for name in ("epoch", "batch", "of"))
        if not _is_count(epoch) or not _is_count(batch) or not isinstance(of, Mapping):
            raise DataError(f"state: expected whole numbers epoch and batch, and what it is of, got {state!r:.120}")
        own = self._loader.fingerprint
        other = [name for name in sorted({*own, *of}) if own.get(name) != of.get(name)]
        settings = [f"{name} was {of.get(name)!r:.80}, is {own.get(name)!r:.80}" for name in other if name != "data"]
        if settings:
            raise DataError(f"state: it is of a loader with other settings: {'; '.join(settings)}")
        if other:
            raise DataError(
                "state: it is of other data: the examples, the tokenizer, the chat format or the truncation have "
                "changed; use the data of that run, or begin anew"
            )
        last = self._loader.steps_in(epoch) if self._loader.epochs is None or epoch < self._loader.epochs else 0
        if batch > last:
            raise DataError(f"state: batch {batch} of epoch {epoch}, which has only {last}")
        self._go(epoch, batch)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _at_least(value: Any, least: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{name}: expected a whole number, {least} or more, got {value!r:.80}")
    return value


def _checked_shard(shard: Any, batch_size: int) -> tuple[int, int]:
    try:
        index, count = shard
    except (TypeError, ValueError):
        raise DataError(f"shard: expected (index, number), got {shard!r:.80}") from None
    if not _is_count(index) or not _is_count(count) or index >= count:
        raise DataError(f"shard: expected an index below the number of shards, got {shard!r:.80}")
    if batch_size % count:
        raise DataError(f"batch_size: {batch_size} rows cannot be shared evenly by {count} shards")
    return index, count
