# SPDX-License-Identifier: Apache-2.0
"""Writes a tree as an Orbax checkpoint, leaf by leaf, so that no more than a few leaves are in memory besides it.

The files are those that Orbax itself writes (arrays as zarr in an OCDBT store, `_METADATA`), and Orbax reads them. They
are written through TensorStore rather than through Orbax's checkpointer: that copies the whole tree before it writes.
Which leaf gets which name is `_compat.py`; what makes the folder appear at once is `gemma/_atomic.py`.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from gemma._orbax_folder import ITEM, METADATA, STEP_METADATA
from gemma.errors import CheckpointError, SaveError
from gemma.gm.ckpts._compat import Keys, Layout, is_stacked, stack, stored_keys

_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
_CHUNK = 1 << 24  # bytes of one zarr chunk at most, where an axis can be cut: what a reader of a part has to decode
# Bytes that are committed together, and that are in memory until then; each commit rewrites the store's index, so a
# large checkpoint takes larger batches: a 32nd of what it has, up to the second number.
_BATCH, _LARGEST_BATCH = 1 << 24, 1 << 28
_OCDBT = dict(compression=dict(id="zstd"), max_decoded_node_bytes=100_000_000, max_inline_value_bytes=1024)


@dataclasses.dataclass(frozen=True)
class Rows:
    """One leaf to be written.

    Attributes:
      shape, dtype: of the leaf.
      runs: gives its values when it is its turn: arrays of one or more rows along the first axis, in order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    runs: Callable[[], Iterable[np.ndarray]]

    @classmethod
    def of(cls, array: Any) -> Rows:
        """A leaf that is in memory; a JAX array on the CPU is not copied."""
        return cls(tuple(array.shape), np.dtype(array.dtype), lambda: [np.ascontiguousarray(np.asarray(array))])


def write_orbax(
    folder: Path,
    leaves: Mapping[str, Rows],
    *,
    layout: str | Layout = Layout.NESTED,
    pattern_length: int = 1,
    step: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes an Orbax checkpoint into an existing, empty folder.

    Args:
      folder: where to.
      leaves: by slash name in the NESTED tree.
      layout: how to arrange them; KAULDRON puts the tree into the subfolder `default`, as the trainer does.
      pattern_length: for STACKED, after how many layers the kinds of attention repeat.
      step: for KAULDRON, the number of the step.
      progress: called with the arrays written and their number.

    Raises:
      SaveError: the disk is full or cannot be written.
      CheckpointError: leaves that cannot be stacked.
    """
    layout = Layout.of(layout)
    target = folder / ITEM if layout is Layout.KAULDRON else folder
    target.mkdir(exist_ok=True)
    if layout is Layout.STACKED:
        arrays = stack(leaves, pattern_length)
    else:
        arrays = {stored_keys(name, layout): [name] for name in leaves}
    entries: dict[Keys, dict[str, Any]] = {}
    store = _Store(target)
    for done, (keys, names) in enumerate(arrays.items()):
        leaf = _stacked(keys, [leaves[name] for name in names]) if is_stacked(keys) else leaves[names[0]]
        store.put(keys, leaf)
        entries[keys] = dict(value_type="jax.Array", skip_deserialize=False, write_shape=list(leaf.shape))
        if progress is not None:
            progress(done + 1, len(arrays))
    if layout is Layout.KAULDRON:
        entries |= {(key,): dict(value_type="Dict", skip_deserialize=True) for key in ("collections", "opt_state")}
        store.put(("step",), Rows.of(np.asarray(step, np.int32)))
        entries["step",] = dict(value_type="jax.Array", skip_deserialize=False, write_shape=[])
    store.commit()
    _write_metadata(folder, target, entries)


def _stacked(keys: Keys, layers: Sequence[Rows]) -> Rows:
    """One array of several layers, which are read one after the other."""
    kinds = {(layer.shape, layer.dtype) for layer in layers}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{shape} {dtype}" for shape, dtype in kinds))
        raise CheckpointError(
            f"{'/'.join(keys)}: its layers differ ({found}) and cannot be stacked; use another layout"
        )
    shape, dtype = kinds.pop()
    return Rows((len(layers), *shape), dtype, lambda: (_whole(layer)[None] for layer in layers))


def _whole(leaf: Rows) -> np.ndarray:
    runs = list(leaf.runs())
    return (runs[0] if len(runs) == 1 else np.concatenate(runs)).reshape(leaf.shape)


def _chunked(leaf: Rows, rows: int) -> Iterator[np.ndarray]:
    """The leaf in runs of exactly `rows` rows, except the last."""
    left, block, filled = leaf.shape[0], None, 0
    for run in leaf.runs():
        while len(run):
            if block is None and len(run) >= min(rows, left):  # a view: what is in memory already is not copied
                part, run = np.ascontiguousarray(run[:rows]), run[rows:]
                left -= len(part)
                yield part
                continue
            if block is None:
                block, filled = np.empty((min(rows, left), *leaf.shape[1:]), leaf.dtype), 0
            taken = min(len(run), len(block) - filled)
            block[filled : filled + taken] = run[:taken]
            filled, run = filled + taken, run[taken:]
            if filled == len(block):
                left -= filled
                yield block
                block = None


class _Store:
    """An OCDBT store that is being filled."""

    def __init__(self, folder: Path):
        self._folder, self._bytes, self._total, self._writes = folder, 0, 0, []
        self._transaction = ts.Transaction()
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_concurrency": {"limit": 4}})

    def put(self, keys: Keys, leaf: Rows) -> None:
        path, chunks = ".".join(keys) + "/", _chunks(leaf.shape, leaf.dtype.itemsize)
        base = dict(driver="file", path=f"{self._folder}/")
        kvstore = dict(driver="ocdbt", base=base, path=path, config=_OCDBT)
        metadata = dict(shape=list(leaf.shape), chunks=chunks, compressor=dict(id="zstd", level=1))
        spec = dict(driver="zarr", kvstore=kvstore, metadata=metadata, dtype=leaf.dtype.name)
        spec["store_data_equal_to_fill_value"] = True
        try:
            opened = ts.open(spec, create=True, open=False, context=self._context, transaction=self._transaction)
            store, start = opened.result(), 0
            if not leaf.shape:
                self._write(store, _whole(leaf))
                return
            for values in _chunked(leaf, chunks[0]):  # not all at once: it is kept in memory until it is committed
                if self._bytes and self._bytes + values.nbytes > min(max(_BATCH, self._total >> 5), _LARGEST_BATCH):
                    self.commit()
                    store = store.with_transaction(self._transaction)
                self._write(store[start : start + len(values)], values)
                start += len(values)
        except (ValueError, OSError) as error:
            raise self._error(error) from error

    def _write(self, target: ts.TensorStore, values: np.ndarray) -> None:
        self._writes.append(target.write(values, can_reference_source_data_indefinitely=True))
        self._bytes += values.nbytes

    def commit(self) -> None:
        """Puts on disk what was given so far."""
        try:
            for write in self._writes:
                write.copy.result()
            self._transaction.commit_sync()
        except (ValueError, OSError) as error:
            raise self._error(error) from error
        self._total += self._bytes
        self._writes, self._bytes, self._transaction = [], 0, ts.Transaction()

    def _error(self, error: Exception) -> SaveError:
        reason = str(error).splitlines()[0][:300]
        return SaveError(f"{self._folder}: could not be written ({reason}); free some space, or save to another place")


def _chunks(shape: Sequence[int], itemsize: int) -> list[int]:
    """The shape of a chunk: whole rows of the leading axes, as many as fit."""
    shape, room = list(shape), max(1, _CHUNK // itemsize)
    for axis in range(len(shape)):
        inner = int(np.prod(shape[axis + 1 :], dtype=np.int64))
        if shape[axis] * inner <= room:
            break
        shape[axis] = max(1, room // max(1, inner))
    return [max(1, size) for size in shape]


def _write_metadata(folder: Path, target: Path, entries: Mapping[Keys, dict[str, Any]]) -> None:
    now = time.time_ns()
    handler: Any = _HANDLER if folder == target else {ITEM: _HANDLER}
    head = dict(item_handlers=handler, metrics={}, performance_metrics={}, custom_metadata={})
    head |= dict(init_timestamp_nsecs=now, commit_timestamp_nsecs=now)
    tree = {
        str(keys): dict(key_metadata=[dict(key=key, key_type=2) for key in keys], value_metadata=value)
        for keys, value in sorted(entries.items())
    }
    about = dict(tree_metadata=tree, use_ocdbt=True, use_zarr3=False, store_array_data_equal_to_fill_value=True)
    (target / METADATA).write_text(json.dumps(about | dict(custom_metadata=None)), encoding="utf-8")
    (folder / STEP_METADATA).write_text(json.dumps(head), encoding="utf-8")
