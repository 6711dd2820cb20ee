# SPDX-License-Identifier: Apache-2.0
"""GGUF versions 2 and 3, little-endian: header, metadata and tensor table, checked in full before any tensor is read.

Every count and length is compared with the bytes left before anything is allocated or looped over, in Python integers,
so a lying file is refused at once with the byte and the rule. Big arrays are only walked; their values are decoded when
asked for. Which tensors a model needs is `gemma.weights`; metadata to configuration is `gguf_config.py`; block types
are `gemma.quants`. Rule of zero: a dimension of 0 is refused.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Sequence

import numpy as np

from gemma.errors import FormatError, UnsupportedError
from gemma.formats._source import Source
from gemma.quants import QuantType

MAX_PAIRS = 65_536  # metadata pairs
MAX_TENSORS = 32_768
MAX_TEXT = 1 << 24  # bytes of all strings together: three times those of the largest vocabulary
MAX_STRINGS = 1 << 19  # strings in all arrays together: twice the largest vocabulary, 56 MB once decoded
MAX_KEY, MAX_TENSOR_NAME, MAX_DIMS = 65_535, 64, 4
MAX_ALIGNMENT = 65_536

_STRING, _ARRAY, _BOOL = 8, 9, 7
# Type id of a metadata value to its name and struct format (strings and arrays have none).
_VALUE_TYPES = {
    0: ("UINT8", "<B"),
    1: ("INT8", "<b"),
    2: ("UINT16", "<H"),
    3: ("INT16", "<h"),
    4: ("UINT32", "<I"),
    5: ("INT32", "<i"),
    6: ("FLOAT32", "<f"),
    7: ("BOOL", "<?"),
    8: ("STRING", None),
    9: ("ARRAY", None),
    10: ("UINT64", "<Q"),
    11: ("INT64", "<q"),
    12: ("FLOAT64", "<d"),
}
_NUMPY = {i: np.dtype(f if i != _BOOL else "u1") for i, (_, f) in _VALUE_TYPES.items() if f}
# ggml types that exist but are not read, by id. 4, 5, 31-33 and 36-38 were removed from ggml.
_UNREAD = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
} | {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
_UNREAD |= {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
_TYPES = {t.ggml_id: t for t in QuantType if t.ggml_id is not None}


@dataclasses.dataclass(frozen=True)
class Value:
    """One metadata value. `type` and `item_type` are GGUF's names ("UINT32", "ARRAY"); arrays stay in the file."""

    type: str
    offset: int  # of the value in the file
    data: object = None  # a scalar or str; None for arrays
    item_type: str = ""  # of an array
    count: int = 0  # items of an array


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` is row-major (GGUF's dimensions reversed), `offset` counts from the start of the file."""

    name: str
    type: QuantType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Gguf:
    """The parsed header of one GGUF file.

    Attributes:
      version, alignment: of the file.
      values: key to `Value`, in file order.
      tensors: name to `GgufTensor`, in file order.
    """

    def __init__(self, source: Source):
        self.source = source
        cursor = _Cursor(source)
        self.version, tensor_count, pair_count = _read_head(cursor)
        self.values = _read_pairs(cursor, pair_count)
        self.alignment = _alignment(cursor, self.values)
        self.tensors = _read_tensors(cursor, tensor_count, self.alignment)

    def scalar(self, key: str) -> object | None:
        """A scalar or string of the metadata; None where the key is absent or holds an array."""
        value = self.values.get(key)
        return None if value is None else value.data

    def array(self, key: str) -> np.ndarray | list[str]:
        """An array of the metadata: numpy for numbers and truth values, a list for strings."""
        value = self.values[key]
        if value.type != "ARRAY":
            raise FormatError(self.source.path, value.offset, f"{key}: expected an ARRAY, got {value.type}")
        return _decode_array(_Cursor(self.source, value.offset), f"{key}: ")


class _Cursor:
    """Reads forward with bounds: through the map, or through a sliding window of a file that is not mapped."""

    def __init__(self, source: Source, start: int = 0):
        self.source, self.pos = source, start
        self.buffer, self.base = source.buffer(), 0
        self.end = source.size  # of the buffered bytes
        if self.buffer is None:
            self.buffer, self.base, self.end = memoryview(b""), start, start

    def fail(self, rule: str, at: int | None = None) -> FormatError:
        return FormatError(self.source.path, self.pos if at is None else at, rule)

    def left(self) -> int:
        return self.source.size - self.pos

    def need(self, count: int, what: str) -> int:
        """The index in the buffer of the next `count` bytes, which are there; moves past them."""
        if count > self.left():
            raise self.fail(f"{what}needs {count} bytes, but the file has {self.left()} left")
        if self.pos + count > self.end:
            self.slide(count)
        self.pos += count
        return self.pos - count - self.base

    def slide(self, count: int) -> None:
        size = min(max(count, 1 << 20), self.left())
        self.buffer, self.base = memoryview(self.source.read(self.pos, size)), self.pos
        self.end = self.pos + size

    def unpack(self, layout: str, what: str):
        at = self.need(struct.calcsize(layout), what)
        return struct.unpack_from(layout, self.buffer, at)[0]

    def string(self, what: str, limit: int = MAX_TEXT) -> str:
        length = self.unpack("<Q", what + "length ")
        if length > limit:
            raise self.fail(f"{what}expected at most {limit} bytes of text, got length {length}", self.pos - 8)
        at = self.need(length, what)
        try:
            return str(self.buffer[at : at + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what}is not UTF-8", self.pos - length + error.start) from None

    def skip_strings(self, count: int, what: str) -> None:
        """Moves past `count` strings, comparing each length with the bytes left."""
        unpack, size = struct.Struct("<Q").unpack_from, self.source.size
        buffer, base, end, pos = self.buffer, self.base, self.end, self.pos
        for index in range(count):
            if pos + 8 > end:
                self.pos = pos
                self.need(8, f"{what}item {index} length ")
                buffer, base, end = self.buffer, self.base, self.end
            length = unpack(buffer, pos - base)[0]
            if length > size - pos - 8:
                raise self.fail(f"{what}item {index} has length {length}, but {size - pos - 8} bytes are left", pos)
            pos += 8 + length
        self.pos = pos


def _read_head(cursor: _Cursor) -> tuple[int, int, int]:
    """(version, number of tensors, number of pairs), both counts compared with the file."""
    at = cursor.need(4, "the magic ")
    magic = bytes(cursor.buffer[at : at + 4])
    if magic != b"GGUF":
        raise cursor.fail(f'expected the magic "GGUF", got {magic!r}', 0)
    version = cursor.unpack("<I", "the version ")
    if version not in (2, 3):
        if version and version & 0xFFFF == 0:
            raise UnsupportedError(f"{cursor.source.path}: a big-endian GGUF; expected little-endian, convert the file")
        if version == 1:
            raise UnsupportedError(f"{cursor.source.path}: GGUF version 1; expected 2 or 3, convert the file anew")
        raise cursor.fail(f"expected GGUF version 2 or 3, got {version}", 4)
    counts = []
    for what, smallest, limit in (("tensor count ", 33, MAX_TENSORS), ("metadata pair count ", 14, MAX_PAIRS)):
        count = cursor.unpack("<Q", what)
        most = min(limit, cursor.left() // smallest)
        if count > most:
            raise cursor.fail(f"{what}{count}: at most {most} fit the {cursor.left()} bytes left", cursor.pos - 8)
        counts.append(count)
    return version, *counts


def _read_pairs(cursor: _Cursor, count: int) -> dict[str, Value]:
    values: dict[str, Value] = {}
    strings, text = 0, 0  # in arrays, and bytes of strings, so far
    for index in range(count):
        start = cursor.pos
        key = cursor.string(f"metadata key {index} ", MAX_KEY)
        if not key:
            raise cursor.fail(f"metadata key {index} is empty", start)
        if key in values:
            raise cursor.fail(f"duplicate metadata key {key!r:.100}", start)
        label = f"{key:.100}: "
        kind, at = cursor.unpack("<I", f"{label}type "), cursor.pos
        name, layout = _value_type(cursor, kind, label)
        if layout is not None:
            value = Value(name, at, _scalar(cursor, kind, layout, label))
        elif kind == _STRING:
            value = Value(name, at, cursor.string(label, MAX_TEXT - text))
            text += cursor.pos - at
        else:
            item, items = _array_head(cursor, label)
            strings += items if item == _STRING else 0
            if strings > MAX_STRINGS:
                raise cursor.fail(f"{label}more than {MAX_STRINGS} strings in the arrays of one file", cursor.pos - 8)
            if item == _STRING:
                cursor.skip_strings(items, label)
                text += cursor.pos - at
            else:
                cursor.pos += items * _NUMPY[item].itemsize  # fits: compared with the bytes left
            value = Value(name, at, None, _VALUE_TYPES[item][0], items)
        if text > MAX_TEXT:
            raise cursor.fail(f"{label}more than {MAX_TEXT} bytes of strings in the metadata", at)
        values[key] = value
    return values


def _value_type(cursor: _Cursor, kind: int, label: str) -> tuple[str, str | None]:
    if kind not in _VALUE_TYPES:
        raise cursor.fail(f"{label}expected a value type 0..12, got {kind}", cursor.pos - 4)
    return _VALUE_TYPES[kind]


def _scalar(cursor: _Cursor, kind: int, layout: str, label: str):
    if kind == _BOOL:
        byte = cursor.unpack("<B", label)
        if byte > 1:
            raise cursor.fail(f"{label}a BOOL is 0 or 1, got {byte}", cursor.pos - 1)
        return bool(byte)
    return cursor.unpack(layout, label)


def _array_head(cursor: _Cursor, what: str) -> tuple[int, int]:
    """(item type, count) of an array, the count compared with the bytes left."""
    kind = cursor.unpack("<I", what + "item type ")
    _value_type(cursor, kind, what)
    count = cursor.unpack("<Q", what + "count ")
    if kind == _ARRAY:
        raise UnsupportedError(
            f"{cursor.source.path}: {what}an array of arrays, which no Gemma file has (nor ggml reads)"
        )
    smallest = 8 if kind == _STRING else _NUMPY[kind].itemsize
    if count > cursor.left() // smallest:
        raise cursor.fail(
            f"{what}{count} items of type {_VALUE_TYPES[kind][0]} cannot fit the {cursor.left()} bytes left",
            cursor.pos - 8,
        )
    return kind, count


def _decode_array(cursor: _Cursor, what: str):
    kind, count = _array_head(cursor, what)
    if kind == _STRING:
        return _decode_strings(cursor, count, what)
    values = cursor.source.read(cursor.pos, count * _NUMPY[kind].itemsize).view(_NUMPY[kind])
    cursor.pos += values.nbytes
    if kind == _BOOL:
        if values.max(initial=0) > 1:
            raise cursor.fail(f"{what}a BOOL is 0 or 1, got {values.max()}", cursor.pos - values.nbytes)
        return values.view(np.bool_)
    return values


def _decode_strings(cursor: _Cursor, count: int, what: str) -> list[str]:
    """The strings of an array, read with one walk and one copy of its bytes."""
    start = cursor.pos
    cursor.skip_strings(count, what)
    data = cursor.source.read(start, cursor.pos - start).tobytes()
    unpack, items, at = struct.Struct("<Q").unpack_from, [], 0
    try:
        for _ in range(count):
            first = at + 8
            at = first + unpack(data, at)[0]
            items.append(data[first:at].decode())
    except UnicodeDecodeError as error:
        raise cursor.fail(f"{what}item {len(items)} is not UTF-8", start + first + error.start) from None
    return items


def _alignment(cursor: _Cursor, values: dict[str, Value]) -> int:
    value = values.get("general.alignment")
    if value is None:
        return 32  # the format's default
    number = value.data
    if value.type != "UINT32" or not 8 <= number <= MAX_ALIGNMENT or number & (number - 1):
        raise cursor.fail(
            f"general.alignment: expected a UINT32 power of two in 8..{MAX_ALIGNMENT}, got {value.type} {number}",
            value.offset,
        )
    return number


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    entries: list[tuple[int, str, QuantType, tuple[int, ...], int, int]] = []
    seen: set[str] = set()
    for index in range(count):
        start = cursor.pos
        name = cursor.string(f"name of tensor {index} ", MAX_TENSOR_NAME)
        if not name or name in seen:
            raise cursor.fail(f"duplicate tensor name {name!r}" if name else f"tensor {index} has no name", start)
        seen.add(name)
        shape = _dims(cursor, name)
        type = _tensor_type(cursor, name, shape)
        nbytes = math.prod(shape[:-1]) * type.row_bytes(shape[-1])
        offset = cursor.unpack("<Q", f"{name}: offset ")
        if offset % alignment:
            raise cursor.fail(f"{name}: offset {offset} is not a multiple of the alignment {alignment}", cursor.pos - 8)
        entries.append((offset, name, type, shape, nbytes, cursor.pos - 8))
    data = -(-cursor.pos // alignment) * alignment
    _check_spans(cursor, entries, data)
    return {name: GgufTensor(name, type, shape, data + offset, n) for offset, name, type, shape, n, _ in entries}


def _dims(cursor: _Cursor, name: str) -> tuple[int, ...]:
    count = cursor.unpack("<I", f"{name}: number of dimensions ")
    if not 1 <= count <= MAX_DIMS:
        raise cursor.fail(f"{name}: expected 1..{MAX_DIMS} dimensions, got {count}", cursor.pos - 4)
    dims = [cursor.unpack("<Q", f"{name}: dimension {i} ") for i in range(count)]
    if 0 in dims:
        raise cursor.fail(f"{name}: dimension {dims.index(0)} is 0; every dimension must be at least 1")
    return tuple(reversed(dims))


def _tensor_type(cursor: _Cursor, name: str, shape: Sequence[int]) -> QuantType:
    kind = cursor.unpack("<I", f"{name}: type ")
    if kind in _UNREAD:
        able = ", ".join(t.name for t in _TYPES.values())
        raise UnsupportedError(
            f"{cursor.source.path}: tensor {name} has type {_UNREAD[kind]}, which gemmakit does not read; "
            f"get the model in one of: {able}"
        )
    if kind not in _TYPES:
        raise cursor.fail(f"{name}: unknown tensor type {kind}", cursor.pos - 4)
    type = _TYPES[kind]
    if shape[-1] % type.block_size:
        raise cursor.fail(f"{name}: a row of {shape[-1]} elements is not whole {type.name} blocks of {type.block_size}")
    return type


def _check_spans(cursor: _Cursor, entries: list, data: int) -> None:
    """Every tensor inside the file and none over another."""
    room, last_end, last_name = cursor.source.size - data, 0, ""
    for offset, name, _, shape, nbytes, at in sorted(entries, key=lambda entry: entry[0]):
        if offset + nbytes > room:
            raise cursor.fail(
                f"{name}: shape {shape} needs bytes {data + offset}..{data + offset + nbytes}, but the file has "
                f"{cursor.source.size}",
                at,
            )
        if offset < last_end:
            raise cursor.fail(f"{name}: its bytes overlap those of {last_name}", at)
        last_end, last_name = offset + nbytes, name
