# SPDX-License-Identifier: Apache-2.0
"""`read_examples`: files to `Examples`. Every row is read and checked once; afterwards only its place is held.

The kinds of files are `_rows.py`, the meaning of columns `_formats.py`.
"""

from __future__ import annotations

import itertools
import os
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gemma.errors import DataError
from gemma.gm.data import _formats, _rows
from gemma.gm.data._examples import MAX_LISTED, BadRow, Example, Examples, checked_paths

_SAMPLE = 50  # first good rows of a file that its format is told by
_SHOWN = 10  # problems in an error
_FILE_KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "text")


def read_examples(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    format: str = "auto",
    limit: int | None = None,
    skip_bad: bool = False,
    sample_by: str = "line",
    **columns: str,
) -> Examples:
    """Reads files of examples for training: JSONL, JSON lists, CSV, TSV, Parquet, text.

    Formats are told by the columns of the first rows; `gemma/gm/data/_formats.py` lists them. Images are given by
    paths relative to their file, or inside messages as parts. JSONL and text files may be larger than the memory.

        examples = read_examples("chats.jsonl")
        examples = read_examples("qa.csv", format="prompt_completion", prompt="question", completion="answer")

    Args:
      paths: one file or several. They may differ in format, not in kind (supervised, preference, KTO, classification).
      format: "auto", one of messages, sharegpt, alpaca, prompt_completion, preference, kto, labelled, text; or, for
        files with another ending, csv, tsv, parquet, jsonl, json.
      limit: use the first so many good rows.
      skip_bad: leave rows out that cannot be used (they are counted, and listed in `.problems`), instead of raising.
      sample_by: of text files, what one example is: a "line", a "paragraph" or the "document".
      **columns: names of columns, by field, where they are not the usual ones.

    Raises:
      DataError: (a ValueError) a file is missing or unreadable, its format is unknown or not the only one possible, a
        row cannot be used (the first of them are listed with their lines), or nothing is left.
      DependencyError: a Parquet file, and pyarrow is missing.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise DataError(f"limit: expected a number of rows, 1 or more, got {limit!r:.80}")
    if format not in ("auto", *_FILE_KINDS, *_formats.FORMATS):
        names = ", ".join(["auto", *_formats.FORMATS, *(k for k in _FILE_KINDS if k not in _formats.FORMATS)])
        raise DataError(f"format: expected one of {names}, got {format!r:.80}")
    scan = _Scan(limit)
    files = [_File(path, format, sample_by, columns) for path in checked_paths(paths)]
    for number, file in enumerate(files):
        scan.file(number, file)
    return scan.examples(files, skip_bad)


class _File:
    """One file: its rows, and once it is known its format."""

    def __init__(self, path: Path, format: str, sample_by: str, columns: dict[str, str]):
        self.path, self.name = path, os.fspath(path)
        by_ending = _rows.ENDINGS.get(path.suffix.lower())
        kind = format if format in _FILE_KINDS and not (format == "text" and by_ending) else by_ending
        try:
            self.rows = _rows.open_rows(path, kind, sample_by=sample_by)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from None
        known = _formats.FORMATS.get(format)
        if format in ("auto", *_FILE_KINDS) and isinstance(self.rows, _rows.TextLines):
            known = _formats.FORMATS["text"]
        self.format = known
        self.columns = _formats.checked_columns(columns, known)

    def detect(self, cells: list[dict[str, Any]]) -> None:
        if self.format is None:
            self.format = _formats.detect(cells, self.columns, self.name)

    def convert(self, cells: dict[str, Any]) -> Example:
        return _formats.convert(self.format, cells, self.columns, self.path.parent)


class _Scan:
    """Collects places of good rows and the problems of bad ones, over all files."""

    def __init__(self, limit: int | None):
        self.limit = limit
        self.places = array("q")  # per good row: file, two words of key, line
        self.problems: list[BadRow] = []
        self.bad = 0

    @property
    def full(self) -> bool:
        return self.limit is not None and len(self.places) // 4 >= self.limit

    def file(self, number: int, file: _File) -> None:
        try:
            scanned = file.rows.scan()
            first, good = [], []
            while len(good) < _SAMPLE and (found := next(scanned, None)) is not None:
                first.append(found)
                good += [found[2]] if isinstance(found[2], dict) else []
            if good:
                file.detect(good)
            for count, (key, line, row) in enumerate(itertools.chain(first, scanned), 1):
                if self.full:
                    return
                self._row(number, file, key, line, row, count)
        except OSError as error:
            raise DataError(f"{file.name}: {error.strerror or error}") from None

    def _row(self, number: int, file: _File, key: tuple[int, int], line: int, row: Any, count: int) -> None:
        why = row.why if isinstance(row, _rows.Broken) else None
        if why is None:
            try:
                file.convert(row)
            except DataError as error:
                why = str(error)
        if why is None:
            self.places.extend((number, *key, line))
        else:
            self.bad += 1
            if isinstance(file.rows, _rows.JsonList) and file.rows.one_line:
                why = f"row {count} of the list: {why}"
            if len(self.problems) < MAX_LISTED:
                self.problems.append(BadRow(file.name, line, why))

    def examples(self, files: list[_File], skip_bad: bool) -> Examples:
        names = ", ".join(file.name for file in files)
        places = np.array(self.places, np.int64).reshape(-1, 4)
        if self.bad and (not skip_bad or not len(places)):
            shown = "".join(f"\n  {problem}" for problem in self.problems[:_SHOWN])
            more = f"\n  and {self.bad - _SHOWN} more" if self.bad > _SHOWN else ""
            advice = (
                "correct them, or leave them out with skip_bad=True (--skip-bad)" if len(places) else "no row is left"
            )
            total = self.bad + len(places)
            raise DataError(f"{names}: {self.bad} of {total} rows cannot be used:{shown}{more}\n{advice}")
        if not len(places):
            raise DataError(f"{names}: expected rows of examples, found none")
        used = [files[n] for n in np.unique(places[:, 0])]
        kinds = {file.format.kind: file.name for file in used}
        if len(kinds) > 1:
            listed = ", ".join(f"{name} ({kind})" for kind, name in kinds.items())
            raise DataError(f"the files hold examples of different kinds: {listed}; expected one kind per run")
        return Examples(
            _ReadAt(files, places),
            _NameAt(files, places),
            np.arange(len(places)),
            kind=next(iter(kinds)),
            format="+".join(dict.fromkeys(file.format.name for file in used)),
            problems=self.problems,
            bad_rows=self.bad,
            paths=[file.name for file in files],
        )


class _ReadAt:
    """Reads the example of a place again. A class and not a closure, so that other processes can be sent it."""

    def __init__(self, files: list[_File], places: np.ndarray):
        self._files, self._places = files, places

    def __call__(self, place: int) -> Example:
        number, *key, _ = self._places[place].tolist()
        file = self._files[number]
        return file.convert(file.rows.read(tuple(key)))


class _NameAt(_ReadAt):
    def __call__(self, place: int) -> str:
        return f"{self._files[self._places[place, 0]].name}:{self._places[place, 3]}"
