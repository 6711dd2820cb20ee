# SPDX-License-Identifier: Apache-2.0
"""Writes a tree as an Orbax checkpoint, leaf by leaf, so that no more than a few leaves are in memory besides it.

The files are those that Orbax itself writes (arrays as zarr in an OCDBT store, `_METADATA`), and Orbax reads them. They
are written through TensorStore rather than through Orbax's checkpointer: that copies the whole tree before it writes.
Which leaf gets which name is `_compat.py`; what makes the folder appear at once is `gemma/_atomic.py`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from gemma._orbax_folder import ITEM, METADATA, STEP_METADATA
from gemma.errors import CheckpointError, SaveError
from gemma.gm.ckpts._compat import Keys, Layout, is_stacked, stack, stored_keys

Read = Callable[[], Any]  # gives one leaf as an array, when it is its turn

_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
_CHUNK = 1 << 25  # bytes of one zarr chunk at most, where an axis can be cut: what a reader of a part has to decode
_BATCH = 1 << 26  # bytes that are committed together; each commit rewrites the store's small index
_OCDBT = dict(compression=dict(id="zstd"), max_decoded_node_bytes=100_000_000, max_inline_value_bytes=1024)


def write_orbax(
    folder: Path,
    leaves: Mapping[str, Read],
    *,
    layout: str | Layout = Layout.NESTED,
    pattern_length: int = 1,
    step: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes an Orbax checkpoint into an existing, empty folder.

    Args:
      folder: where to.
      leaves: slash name in the NESTED tree, and a function that gives the array (numpy or JAX).
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
        array = _stacked(keys, [leaves[name] for name in names]) if is_stacked(keys) else _host(leaves[names[0]]())
        store.put(keys, array)
        entries[keys] = dict(value_type="jax.Array", skip_deserialize=False, write_shape=list(array.shape))
        if progress is not None:
            progress(done + 1, len(arrays))
    if layout is Layout.KAULDRON:
        entries |= {(key,): dict(value_type="Dict", skip_deserialize=True) for key in ("collections", "opt_state")}
        store.put(("step",), np.asarray(step, np.int32))
        entries["step",] = dict(value_type="jax.Array", skip_deserialize=False, write_shape=[])
    store.commit()
    _write_metadata(folder, target, entries)


def _host(leaf: Any) -> np.ndarray:
    """A leaf in memory, with its axes in order; a JAX array on the CPU without a copy."""
    return np.ascontiguousarray(np.asarray(leaf)).reshape(np.shape(leaf))


def _stacked(keys: Keys, reads: Iterable[Read]) -> np.ndarray:
    rows = [_host(read()) for read in reads]
    kinds = {(row.shape, row.dtype) for row in rows}
    if len(kinds) > 1:
        found = ", ".join(sorted(f"{shape} {dtype}" for shape, dtype in kinds))
        raise CheckpointError(
            f"{'/'.join(keys)}: its layers differ ({found}) and cannot be stacked; use another layout"
        )
    return np.stack(rows)


class _Store:
    """An OCDBT store that is being filled."""

    def __init__(self, folder: Path):
        self._folder, self._bytes, self._writes = folder, 0, []
        self._transaction = ts.Transaction()
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}, "file_io_concurrency": {"limit": 4}})

    def put(self, keys: Keys, array: np.ndarray) -> None:
        path = ".".join(keys) + "/"
        base = dict(driver="file", path=f"{self._folder}/")
        kvstore = dict(driver="ocdbt", base=base, path=path, config=_OCDBT)
        metadata = dict(shape=list(array.shape), chunks=_chunks(array), compressor=dict(id="zstd", level=1))
        spec = dict(driver="zarr", kvstore=kvstore, metadata=metadata, dtype=array.dtype.name)
        spec["store_data_equal_to_fill_value"] = True
        try:
            opened = ts.open(spec, create=True, open=False, context=self._context, transaction=self._transaction)
            store, rows = opened.result(), metadata["chunks"][0] if array.ndim else 1
            for start in range(0, array.shape[0] if array.ndim else 1, rows):  # not all at once: it is kept until then
                if self._bytes >= _BATCH:
                    self.commit()
                    store = store.with_transaction(self._transaction)
                target = store[start : min(start + rows, array.shape[0])] if array.ndim else store
                values = array[start : start + rows] if array.ndim else array
                self._writes.append(target.write(values, can_reference_source_data_indefinitely=True))
                self._bytes += values.nbytes
        except (ValueError, OSError) as error:
            raise self._error(error) from error

    def commit(self) -> None:
        """Puts on disk what was given so far."""
        try:
            for write in self._writes:
                write.copy.result()
            self._transaction.commit_sync()
        except (ValueError, OSError) as error:
            raise self._error(error) from error
        self._writes, self._bytes, self._transaction = [], 0, ts.Transaction()

    def _error(self, error: Exception) -> SaveError:
        reason = str(error).splitlines()[0][:300]
        return SaveError(f"{self._folder}: could not be written ({reason}); free some space, or save to another place")


def _chunks(array: np.ndarray) -> list[int]:
    """The shape of a chunk: whole rows of the leading axes, as many as fit."""
    shape, room = list(array.shape), max(1, _CHUNK // array.itemsize)
    for axis in range(array.ndim):
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
