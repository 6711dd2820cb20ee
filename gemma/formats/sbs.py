# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the `.sbs` files of gemma.cpp: named blobs, back to back, each at a multiple of 256 bytes.

Read are both orders of a file (directory first, as before August 2025, or last) and both ways of naming tensors (with a
table "toc", or with a letter for the type before each name). Types: float32, bfloat16 and SFP8. Written is the newer
order with a table. No build of gemma.cpp was at hand: what is written is checked by reading it back only. Names and
layouts of tensors are in `gemma.weights`, the records inside of blobs in `_sbs_fields.py`.

    header  pad  blob  pad  blob ... pad  [keys | (offset, bytes)] header      directory last
    header [keys | (offset, bytes)] pad  blob  pad  blob ...       pad         directory first
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO

import numpy as np

from gemma.errors import FormatError, ShapeError, UnsupportedError
from gemma.formats._sbs_fields import OTHER_TYPES, TYPES, TocEntry, read_toc, toc_words
from gemma.formats._source import Source

MAGIC = b"SBS\n"
MAX_BLOBS = 1 << 16
MAX_RECORD = 1 << 21  # bytes of "toc" or "config"; a table of 16,384 tensors takes half of it
_ALIGN, _END_ALIGN = 256, 1 << 16
_HEADER = struct.Struct("<4sIQ")
_PREFIXES = {"F": "F32", "B": "BF16", "$": "SFP8", "2": "NUQ", "I": "I8", "4": "Q4_0"}
WIDTH = {"F32": 4, "BF16": 2, "SFP8": 1}
RECORDS = ("config", "tokenizer", "toc")


@dataclasses.dataclass(frozen=True)
class Blob:
    name: str
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class SbsTensor:
    """One tensor: values of `dtype` times `scale`; `cols` is None where the file does not say it."""

    name: str
    dtype: str
    count: int
    cols: int | None
    scale: float
    offset: int
    nbytes: int


class Sbs:
    """The parsed directory of one file: `blobs` and `tensors` by name."""

    def __init__(self, source: Source):
        self.source, self.path = source, source.path
        self.blobs = self._read_blobs()
        self.tensors = self._from_toc() if "toc" in self.blobs else self._from_prefixes()

    def words(self, name: str) -> list[int] | None:
        """A record as 32-bit words, None if the file has none of that name."""
        blob = self.blobs.get(name)
        if blob is None:
            return None
        if blob.nbytes > MAX_RECORD or blob.nbytes % 4:
            raise FormatError(
                self.path, blob.offset, f"{name}: {blob.nbytes} bytes; expected whole words, at most {MAX_RECORD} bytes"
            )
        return self.source.read(blob.offset, blob.nbytes).view("<u4").tolist()

    def _read_blobs(self) -> dict[str, Blob]:
        size = self.source.size
        if size < 2 * _HEADER.size:
            raise FormatError(self.path, size, "the file ends within its header")
        magic, count, total = _HEADER.unpack(self.source.read(0, _HEADER.size).tobytes())
        last = not count
        if last:
            magic, count, total = _HEADER.unpack(self.source.read(size - _HEADER.size, _HEADER.size).tobytes())
        where = size - _HEADER.size if last else 0
        if magic != MAGIC or not 0 < count <= MAX_BLOBS or total != size:
            raise FormatError(
                self.path,
                where,
                f"expected a header with 1..{MAX_BLOBS} blobs and the file's {size} bytes, got {magic!r}, {count} blobs, "
                f"{total} bytes: the file is damaged or incomplete",
            )
        start = where - 32 * count if last else _HEADER.size
        if start < _HEADER.size or start + 32 * count > size:
            raise FormatError(self.path, where, f"a directory of {count} blobs does not fit into the file")
        directory = self.source.read(start, 32 * count)
        keys, ranges = directory[: 16 * count].reshape(count, 16), directory[16 * count :].view("<u8").reshape(count, 2)
        expected = _ALIGN if last else _aligned(start + 32 * count)
        limit = start if last else size
        blobs: dict[str, Blob] = {}
        for key, (offset, nbytes) in zip(keys, ranges.tolist()):
            name = key.tobytes().rstrip(b"\0").decode("ascii", "replace")
            if not name or not name.isprintable() or "\ufffd" in name or name in blobs:
                raise FormatError(self.path, start, f"blob name {name!r}: expected printable ASCII, each name once")
            if offset != expected or not 0 < nbytes <= limit - offset:
                raise FormatError(
                    self.path, start, f"blob {name}: {nbytes} bytes at {offset}; expected {expected} and to stay inside"
                )
            blobs[name], expected = Blob(name, offset, nbytes), _aligned(offset + nbytes)
        return blobs

    def _from_toc(self) -> dict[str, SbsTensor]:
        tensors: dict[str, SbsTensor] = {}
        for entry in read_toc(self.path, self.words("toc")):
            name, dtype = entry["name"], TYPES.get(entry["type"])
            if dtype is None:
                self._refuse(name, OTHER_TYPES.get(entry["type"], f"type {entry['type']}"))
            if entry["stride"] != entry["cols"] and entry["rows"] != 1:
                raise UnsupportedError(f"{self.path}: {name} has padded rows; expected packed ones")
            if dtype != "SFP8" and entry["scale"] != 1.0:
                raise UnsupportedError(f"{self.path}: {name} is {dtype} with a scale of {entry['scale']}; expected 1")
            tensor = self._tensor(name, name, dtype, entry["cols"], entry["scale"])
            if tensor.count != entry["rows"] * entry["cols"] or name in tensors:
                raise FormatError(
                    self.path,
                    tensor.offset,
                    f"{name}: the table says {entry['rows']} x {entry['cols']}, the blob has {tensor.count} values",
                )
            tensors[name] = tensor
        return tensors

    def _from_prefixes(self) -> dict[str, SbsTensor]:
        scales = self.blobs.get("Fscales")
        if scales is not None:
            count = min(scales.nbytes, MAX_RECORD) // 4
            if (self.source.read(scales.offset, 4 * count).view("<f4") != 1.0).any():
                raise UnsupportedError(
                    f"{self.path}: scales of the format before 2025 belong to tensors by their order only; convert the "
                    f"file with gemma.cpp to the single-file format first"
                )
        tensors = {}
        for key in self.blobs:
            if key in RECORDS or key == "Fscales":
                continue
            dtype = _PREFIXES.get(key[0])
            if dtype not in WIDTH:
                self._refuse(key, dtype or "an unknown type")
            tensors[key[1:]] = self._tensor(key[1:], key, dtype, None, 1.0)
        return tensors

    def _refuse(self, name: str, dtype: str) -> None:
        raise UnsupportedError(f"{self.path}: {name} is {dtype}; expected {', '.join(WIDTH)}")

    def _tensor(self, name: str, key: str, dtype: str, cols: int | None, scale: float) -> SbsTensor:
        blob = self.blobs.get(key)
        if blob is None:
            raise FormatError(self.path, None, f"the table lists {name!r:.40}, but there is no such blob")
        if blob.nbytes % WIDTH[dtype] or not np.isfinite(scale):
            raise FormatError(self.path, blob.offset, f"{name}: {blob.nbytes} bytes of {dtype}, scale {scale}")
        return SbsTensor(name, dtype, blob.nbytes // WIDTH[dtype], cols, scale, blob.offset, blob.nbytes)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def write_sbs(
    file: BinaryIO,
    entries: Sequence[TocEntry],
    read: Callable[[str], np.ndarray],
    records: Mapping[str, bytes | np.ndarray],
) -> None:
    """Writes one file, one tensor in memory at a time.

    Args:
      file: open for writing and at its start; making it safe against a crash is the caller's part.
      entries: of the table; names of at most 16 characters. `scale` is asked for after `read` has given the codes, so
        an entry may be replaced by then: pass scales of 1.0 where they are not known, `read` returns (codes, scale).
      read: name to the bytes of a tensor, any array of its type, or (uint8 codes, scale) for SFP8.
      records: "config" and "tokenizer", as bytes or words.
    """
    directory: list[tuple[str, int, int]] = []
    file.write(_HEADER.pack(MAGIC, 0, _END_ALIGN).ljust(_ALIGN, b"\0"))

    def add(name: str, data) -> None:
        key = name.encode("ascii")
        if not 0 < len(key) <= 16 or not len(data):
            raise ShapeError(f"blob {name!r}: expected a name of 1..16 characters and some bytes")
        directory.append((name, file.tell(), len(data)))
        file.write(data)
        file.write(b"\0" * (_aligned(file.tell()) - file.tell()))

    written = []
    for entry in entries:
        values = read(entry.name)
        values, scale = values if isinstance(values, tuple) else (values, 1.0)
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        if data.size != entry.rows * entry.cols * WIDTH[entry.type]:
            raise ShapeError(f"{entry.name}: announced {entry.rows} x {entry.cols} {entry.type}, got {data.size} bytes")
        add(entry.name, data.data)
        written.append(dataclasses.replace(entry, scale=float(scale)))
    for name, record in {**records, "toc": toc_words(written)}.items():
        add(name, record if isinstance(record, bytes) else record.astype("<u4").tobytes())
    tail = b"".join(name.encode("ascii").ljust(16, b"\0") for name, _, _ in directory)
    tail += b"".join(struct.pack("<QQ", offset, nbytes) for _, offset, nbytes in directory)
    total = -(-(file.tell() + len(tail) + _HEADER.size) // _END_ALIGN) * _END_ALIGN
    file.write(b"\0" * (total - file.tell() - len(tail) - _HEADER.size))
    file.write(tail + _HEADER.pack(MAGIC, len(directory), total))
