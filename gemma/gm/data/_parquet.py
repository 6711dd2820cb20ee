# SPDX-License-Identifier: Apache-2.0
"""`Parquet`: the rows of parquet files by their number, read a row group at a time. Needs pyarrow.

It is a source for grain and for the tasks of this package. Where kauldron is installed, `gm.data.Parquet` is a data set
of it over the same rows (`gm/_kauldron.py`). Examples of gemmakit's own trainer are read with `gm.data.read_examples`.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import itertools
import operator
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma.errors import DataError, DependencyError
from gemma.gm._plain import PlainForm

_KEPT_GROUPS = 4  # row groups in memory: neighbours are cheap, and a shuffled pass cannot fill the memory


@dataclasses.dataclass(frozen=True)
class Parquet(PlainForm):
    """The rows of one or several parquet files, one after the other.

      rows = gm.data.Parquet("train.parquet")
      rows[0]                                          # {"text": "...", "label": 1}
      grain.MapDataset.source(rows).map(task)

    Attributes:
      path: a file, several files, or a folder, whose `*.parquet` files are taken in the order of their names.
      columns: names of the columns to read; None: all.
    """

    KAULDRON_FIELDS = frozenset(
        {
            *("batch_drop_remainder", "batch_size", "num_epochs", "num_workers", "seed", "shuffle", "transforms"),
            *("enable_profiling", "per_worker_buffer_size", "read_options", "shard_by_process", "worker_init_fn"),
        }
    )

    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
    columns: Sequence[str] | None = None

    def __post_init__(self):
        if not isinstance(self.path, (str, os.PathLike)):
            object.__setattr__(self, "path", tuple(self.path))
        if self.columns is not None:
            object.__setattr__(self, "columns", tuple(self.columns))

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "columns": self.columns}  # files are opened anew in another process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __len__(self) -> int:
        return self._reader.ends[-1]

    def __getitem__(self, record_key: int) -> dict[str, Any]:
        """A row: column to value; lists of numbers are arrays.

        Raises:
          IndexError: there is no such row.
        """
        row, count = operator.index(record_key), len(self)
        if not -count <= row < count:
            raise IndexError(f"row {row} of {count} rows")
        return self._reader.row(row % count)

    @functools.cached_property
    def _reader(self) -> _Reader:
        return _Reader(_files(self.path), self.columns)


class _Reader:
    """Open files, and the row groups that were used last."""

    def __init__(self, paths: list[Path], columns: tuple[str, ...] | None):
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise DependencyError("pyarrow", "train", "gm.data.Parquet") from error
        self._columns = None if columns is None else list(columns)
        self._groups: list[tuple[Any, int]] = []
        sizes = []
        for path in paths:
            try:
                file = parquet.ParquetFile(path)
            except (ArrowException, OSError) as error:
                raise DataError(f"{path}: expected a parquet file; {error}") from error
            missing = sorted(set(columns or ()) - set(file.schema_arrow.names))
            if missing:
                has = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path}: no column {', '.join(missing)}; it has {has}")
            for group in range(file.num_row_groups):
                self._groups.append((file, group))
                sizes.append(file.metadata.row_group(group).num_rows)
        self.ends = list(itertools.accumulate(sizes)) or [0]
        self._starts = [0, *self.ends[:-1]]
        self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()  # pyarrow's readers are not for several threads at a time

    def row(self, row: int) -> dict[str, Any]:
        group = bisect.bisect_right(self.ends, row)
        with self._lock:
            table = self._kept.pop(group, None)
            if table is None:
                file, number = self._groups[group]
                table = file.read_row_group(number, columns=self._columns)
            self._kept[group] = table
            while len(self._kept) > _KEPT_GROUPS:
                self._kept.popitem(last=False)
        at = row - self._starts[group]
        return {name: _value(table.column(name)[at].as_py()) for name in table.column_names}


def _value(value: Any) -> Any:
    numbers = isinstance(value, list) and value and all(isinstance(v, (bool, int, float)) for v in value)
    return np.asarray(value) if numbers else value


def _files(path: Any) -> list[Path]:
    if isinstance(path, (str, os.PathLike)):
        one = Path(path)
        found = sorted(one.glob("*.parquet")) if one.is_dir() else [one]
        if not found:
            raise DataError(f"{one}: no *.parquet file in this folder")
    else:
        found = [Path(part) for part in path]
        if not found:
            raise DataError("Parquet: expected at least one file, got none")
    lost = [str(part) for part in found if not part.is_file()]
    if lost:
        raise DataError(f"{', '.join(lost)}: expected a parquet file, there is none")
    return found
