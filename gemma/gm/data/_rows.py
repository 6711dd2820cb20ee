# SPDX-License-Identifier: Apache-2.0
"""Files as rows: JSONL, a JSON list, CSV and TSV, Parquet, text. What the columns mean is `_formats.py`.

Each class scans its file once, giving (key, line, row) or (key, line, Broken), and reads a row again by its key. Files
are hostile: one broken row never hides the others where the format lets one find the next, and a row has a size limit.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gemma.errors import DataError, DependencyError

MAX_ROW = 64 << 20  # bytes of one row; a larger one is no example but a mistake
MAX_WHOLE = 2 << 30  # bytes of a file that has to be held in memory (JSON list, CSV, document)


@dataclasses.dataclass(frozen=True)
class Broken:
    """A row that could not be read, and why."""

    why: str


_TOO_LONG = Broken(f"longer than {MAX_ROW >> 20} MiB: no row of examples is that long")

Key = tuple[int, int]
Scanned = Iterator[tuple[Key, int, "dict[str, Any] | Broken"]]


class JsonLines:
    """One JSON object per line. Only offsets are kept, so the file may be larger than the memory."""

    def __init__(self, path: Path):
        self.path = path

    def scan(self) -> Scanned:
        for (start, end), line, raw in _lines(self.path):
            if raw is None:
                yield (start, end), line, _TOO_LONG
            elif raw.strip():
                yield (start, end), line, _json_row(raw)

    def read(self, key: Key) -> dict[str, Any]:
        return _good(_json_row(_between(self.path, key)))


class TextLines:
    """A text per line, per paragraph (separated by empty lines), or one text that is the file.

    Args: by: "line", "paragraph" or "document".
    """

    def __init__(self, path: Path, by: str = "line"):
        if by not in ("line", "paragraph", "document"):
            raise DataError(f'sample_by: expected "line", "paragraph" or "document", got {by!r}')
        self.path, self.by = path, by

    def scan(self) -> Scanned:
        if self.by == "document":
            _check_size(self.path)
            yield self._piece(0, os.path.getsize(self.path), 1)
            return
        if self.by == "line":
            for key, line, raw in _lines(self.path):
                if raw is None or raw.strip():
                    yield key, line, _TOO_LONG if raw is None else _text_row(raw)
            return
        begin = None
        for (start, end), line, raw in _lines(self.path):
            if raw is None or raw.strip():
                begin, first = (start, line) if begin is None else (begin, first)
                last = end
            elif begin is not None:
                yield self._piece(begin, last, first)
                begin = None
        if begin is not None:
            yield self._piece(begin, last, first)

    def _piece(self, start: int, end: int, line: int):
        limit = MAX_WHOLE if self.by == "document" else MAX_ROW
        if end - start > limit:
            return (start, end), line, Broken(f"longer than {limit >> 20} MiB: split it into lines or paragraphs")
        return (start, end), line, _text_row(_between(self.path, (start, end)))

    def read(self, key: Key) -> dict[str, Any]:
        return _good(_text_row(_between(self.path, key)))


class JsonList:
    """A JSON list of objects, held in memory as text. After a syntax error the rest cannot be found: it is one problem.

    The line of a row is that of its first character; where the whole list is one line, that says nothing (`one_line`).
    """

    def __init__(self, path: Path):
        _check_size(path)
        self.path, self._text = path, _decoded(path)
        self.one_line = "\n" not in self._text.strip()

    def scan(self) -> Scanned:
        text, decoder = self._text, json.JSONDecoder()
        at = _skip(text, _skip(text, 0) + 1)  # behind the bracket
        line, counted = 1, 0
        while text[at : at + 1] != "]":
            line, counted = line + text.count("\n", counted, at), at
            try:
                row, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                yield (at, at), line, Broken(f"no valid JSON from here on: {_short(error)}")
                return
            good = isinstance(row, dict)
            yield (at, end), line, row if good else Broken(f"expected a JSON object, got {type(row).__name__}")
            at = _skip(text, end)
            if text[at : at + 1] == ",":
                at = _skip(text, at + 1)
            elif text[at : at + 1] != "]":
                yield (at, at), line, Broken("no valid JSON from here on: expected a comma or the closing bracket")
                return
        at = _skip(text, at + 1)
        if at < len(text):  # such as a second list
            line += text.count("\n", counted, at)
            yield (at, at), line, Broken(f"expected nothing after the list, got {text[at : at + 20]!r}: join the lists")

    def read(self, key: Key) -> dict[str, Any]:
        return json.loads(self._text[key[0] : key[1]])


class Table:
    """CSV or TSV with a header line, held in memory. The line of a row is that of its first character.

    Args: delimiter: between the cells.
    """

    def __init__(self, path: Path, delimiter: str):
        _check_size(path)
        self.path, self._delimiter = path, delimiter
        self._rows: list[list[str]] = []
        self._header: list[str] = []

    def scan(self) -> Scanned:
        self._rows, self._header = [], []
        reader = csv.reader(io.StringIO(_decoded(self.path), newline=""), delimiter=self._delimiter, strict=True)
        number = 0
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield (0, 0), line, Broken(f"no valid row of cells: {error}")
                continue
            if cells is None:
                return
            if not self._header:
                self._header = self._checked_header(cells)
            elif cells:
                if len(cells) != len(self._header):
                    why = f"expected {len(self._header)} cells as in the header, got {len(cells)}"
                    yield (0, 0), line, Broken(why)
                else:
                    self._rows.append(cells)
                    yield (number, 0), line, self.read((number, 0))
                    number += 1

    def _checked_header(self, cells: list[str]) -> list[str]:
        names = [cell.strip() for cell in cells]
        if len(set(names)) != len(names) or not all(names):
            raise DataError(f"{self.path}:1: expected a header of different column names, got {names!r:.200}")
        return names

    def read(self, key: Key) -> dict[str, Any]:
        return dict(zip(self._header, self._rows[key[0]], strict=True))


class ParquetRows:
    """A Parquet file, held in memory as Arrow's columns. Needs pyarrow."""

    def __init__(self, path: Path):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise DependencyError("pyarrow", "train", f"reading {path.name}") from error
        self.path = path
        try:
            self._table = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(f"{path}: no readable Parquet file: {_short(error)}") from None

    def scan(self) -> Scanned:
        for n in range(self._table.num_rows):
            try:
                row = self.read((n, 0))
            except (ValueError, OverflowError) as error:  # a text that is no UTF-8, a time out of range
                row = Broken(_short(error))
            yield (n, 0), n + 1, row

    def read(self, key: Key) -> dict[str, Any]:
        return self._table.slice(key[0], 1).to_pylist()[0]


def open_rows(path: Path, kind: str | None = None, *, sample_by: str = "line"):
    """The rows of a file, by its ending or by `kind` ("jsonl", "json", "csv", "tsv", "parquet", "text")."""
    kind = kind or ENDINGS.get(path.suffix.lower())
    if kind is None:
        raise DataError(
            f"{path}: expected a file ending in {', '.join(sorted(ENDINGS))}: rename it, or pass format= with one of "
            f"csv, tsv, parquet, text"
        )
    if kind in ("json", "jsonl"):  # both endings are used for both
        return JsonList(path) if _first_character(path) == "[" else JsonLines(path)
    if kind in ("csv", "tsv"):
        return Table(path, "," if kind == "csv" else "\t")
    return ParquetRows(path) if kind == "parquet" else TextLines(path, sample_by)


ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}


# --- bytes


def _lines(path: Path) -> Iterator[tuple[Key, int, bytes | None]]:
    """((start, end), number, bytes) of every line; bytes are None for one above the limit. A byte-order mark is cut."""
    with open(path, "rb") as file:
        start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
        file.seek(start)
        number = 0
        while raw := file.readline(MAX_ROW + 1):
            number += 1
            end, whole, rest = start + len(raw), len(raw) <= MAX_ROW, raw
            while not rest.endswith(b"\n") and (rest := file.readline(MAX_ROW)):
                end += len(rest)  # of a line above the limit, read in blocks and not kept
            yield (start, end), number, raw if whole else None
            start = end


def _between(path: Path, key: Key) -> bytes:
    with open(path, "rb") as file:
        file.seek(key[0])
        return file.read(key[1] - key[0])


def _json_row(raw: bytes) -> dict[str, Any] | Broken:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8 at byte {error.start} of the row")
    except (ValueError, RecursionError) as error:
        return Broken(f"not valid JSON: {_short(error)}")
    return row if isinstance(row, dict) else Broken(f"expected a JSON object, got {type(row).__name__}")


def _text_row(raw: bytes) -> dict[str, Any] | Broken:
    try:
        return {"text": raw.decode("utf-8").rstrip("\r\n")}
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8 at byte {error.start} of the row")


def _good(row: dict[str, Any] | Broken) -> dict[str, Any]:
    if isinstance(row, Broken):
        raise DataError(row.why)
    return row


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected UTF-8, which byte {error.start} breaks: save the file as UTF-8") from None


def _check_size(path: Path) -> None:
    size = os.path.getsize(path)
    if size > MAX_WHOLE:
        raise DataError(
            f"{path}: {size >> 20} MiB, but files of this form are held in memory, up to {MAX_WHOLE >> 20} MiB: "
            f"convert it to JSONL, which is read from the disk"
        )


def _first_character(path: Path) -> str:
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 16), b""):
            text = block.removeprefix(b"\xef\xbb\xbf").lstrip()
            if text:
                return chr(text[0])
    return ""


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _short(error: BaseException) -> str:
    return f"{error}".split("\n")[0][:200] or type(error).__name__
