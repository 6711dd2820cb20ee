# SPDX-License-Identifier: Apache-2.0
"""The SentencePiece ModelProto, read and written at the level of its wire format, with every length bounded.

Only what a Gemma vocabulary needs is kept: pieces, scores, types, and the few settings that decide how text is cut.
Field numbers are those of SentencePiece's published `sentencepiece_model.proto`. What the vocabulary means is
`_vocabulary.py`; the SentencePiece library that runs the result is called in `tokenizer.py`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from gemma.errors import FormatError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_BPE = 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_PIECES = 1 << 22


def build(pieces: Sequence[str], scores: np.ndarray, types: Sequence[int]) -> bytes:
    """A ModelProto of a Gemma vocabulary: BPE, byte fallback, text kept as it is, no special ids of its own.

    Args:
      pieces: [V], with the block character for spaces.
      scores: float32 [V].
      types: [V], the six types above; exactly one is UNKNOWN.
    """
    raw = np.ascontiguousarray(scores, "<f4").tobytes()
    out = bytearray()
    for i, (piece, kind) in enumerate(zip(pieces, types)):
        text = piece.encode()
        # piece = 1 (bytes), score = 2 (fixed32), type = 3 (varint)
        body = b"\x0a" + _varint(len(text)) + text + b"\x15" + raw[4 * i : 4 * i + 4] + b"\x18" + bytes([kind])
        out += b"\x0a" + _varint(len(body)) + body
    unknown = list(types).index(UNKNOWN)
    trainer = _number(3, _BPE) + _number(4, len(pieces)) + _number(35, 1) + _number(40, unknown)
    trainer += b"".join(_number(field, 2**64 - 1) for field in (41, 42, 43))  # bos, eos, pad: we add them, not it
    normalizer = _block(1, b"identity") + _number(3, 0) + _number(4, 0) + _number(5, 1)
    return bytes(out + _block(2, trainer) + _block(3, normalizer))


def parse(data: bytes, path: Path) -> tuple[list[str], np.ndarray, list[int]]:
    """(pieces, scores, types) of a `.model` file that cuts text as Gemma's do; FormatError otherwise."""
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    settings: dict[str, dict[int, int | bytes | float]] = {"trainer": {}, "normalizer": {}}
    for field, value, at in _fields(data, 0, len(data), path):
        if field == 1:
            piece, score, kind = _piece(data, value, at, path)
            pieces.append(piece)
            scores.append(score)
            types.append(kind)
            if len(pieces) > _MAX_PIECES:
                raise FormatError(path, at, f"expected at most {_MAX_PIECES} pieces")
        elif field in (2, 3):
            start, end = _span(value, at, path)
            settings["trainer" if field == 2 else "normalizer"] |= {f: v for f, v, _ in _fields(data, start, end, path)}
    _check_settings(data, settings, path)
    return pieces, np.array(scores, np.float32), types


def _check_settings(data: bytes, settings: dict[str, dict], path: Path) -> None:
    trainer, normalizer = settings["trainer"], settings["normalizer"]
    if trainer.get(3, 1) != _BPE:
        raise FormatError(path, None, f"expected a BPE model (model_type 2), got model_type {trainer.get(3, 1)}")
    if not trainer.get(35, 0):
        raise FormatError(path, None, "expected byte fallback, as every Gemma vocabulary has; this one has none")
    charsmap = normalizer.get(2, (0, 0))
    name = normalizer.get(1, (0, 0))
    same = isinstance(charsmap, tuple) and charsmap[0] == charsmap[1]
    # add_dummy_prefix and remove_extra_whitespaces default to true in the format.
    if not same or normalizer.get(3, 1) or normalizer.get(4, 1) or not normalizer.get(5, 1):
        shown = data[name[0] : name[1]][:40].decode(errors="replace") if isinstance(name, tuple) else "?"
        raise FormatError(
            path, None, f"expected a normalizer that keeps text as it is (identity), got {shown!r} with its settings"
        )


def _piece(data: bytes, value, at: int, path: Path) -> tuple[str, float, int]:
    start, end = _span(value, at, path)
    text, score, kind = b"", 0.0, NORMAL
    for field, inner, where in _fields(data, start, end, path):
        if field == 1:
            low, high = _span(inner, where, path)
            text = data[low:high]
        elif field == 2:
            if not isinstance(inner, float):
                raise FormatError(path, where, "expected a piece's score as a 32-bit float")
            score = inner
        elif field == 3:
            if not isinstance(inner, int):
                raise FormatError(path, where, "expected a piece's type as an integer")
            kind = inner
    try:
        return text.decode(), score, kind
    except UnicodeDecodeError:
        raise FormatError(path, start, f"expected a piece in UTF-8, got {text[:20]!r}") from None


def _fields(data: bytes, at: int, end: int, path: Path) -> Iterator[tuple[int, int | float | tuple[int, int], int]]:
    """(field number, value, offset) of a message; a length-delimited value is the (start, end) of its bytes."""
    while at < end:
        begin = at
        key, at = _read_varint(data, at, end, path)
        field, wire = key >> 3, key & 7
        if not field:
            raise FormatError(path, begin, "expected a field number of at least 1, got 0")
        if wire == _VARINT:
            value, at = _read_varint(data, at, end, path)
        elif wire == _BYTES:
            size, at = _read_varint(data, at, end, path)
            if size > end - at:
                raise FormatError(path, begin, f"a field of {size} bytes, but {end - at} are left")
            value, at = (at, at + size), at + size
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
            if size > end - at:
                raise FormatError(path, begin, f"a field of {size} bytes, but {end - at} are left")
            value = struct.unpack_from("<f", data, at)[0] if size == 4 else 0
            at += size
        else:
            raise FormatError(path, begin, f"expected wire type 0, 1, 2 or 5, got {wire}: this is no SentencePiece model")
        yield field, value, begin


def _read_varint(data: bytes, at: int, end: int, path: Path) -> tuple[int, int]:
    value = 0
    for i in range(10):
        if at + i >= end:
            raise FormatError(path, at, "the file ends inside a number")
        byte = data[at + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, at + i + 1
    raise FormatError(path, at, "expected a number of at most 10 bytes")


def _span(value, at: int, path: Path) -> tuple[int, int]:
    if not isinstance(value, tuple):
        raise FormatError(path, at, "expected a length-delimited field: this is no SentencePiece model")
    return value


def _varint(n: int) -> bytes:
    out = bytearray()
    while n >= 128:
        out.append(n & 127 | 128)
        n >>= 7
    out.append(n)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _block(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(body)) + body
