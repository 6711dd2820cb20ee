# SPDX-License-Identifier: Apache-2.0
"""The SentencePiece ModelProto on the wire: a bounded reader and a small writer of the fields that a Gemma uses.

The library never sees a file: `read_model` takes pieces, scores and types out of a `.model` and checks its settings,
`check_vocabulary` holds every rule a vocabulary must meet whatever it came from, `write_model` makes the proto that
`sentencepiece` runs. What the pieces mean (control, content) is `_special_tokens.py`; the files are opened in
`_tokenizer_sources.py`.

    ModelProto      1 pieces (repeated)   2 trainer_spec   3 normalizer_spec   4 self_test_data   5 denormalizer_spec
    SentencePiece   1 piece (string)      2 score (float)  3 type (enum)
    TrainerSpec     3 model_type          24 treat_whitespace_as_suffix        35 byte_fallback
    NormalizerSpec  2 precompiled_charsmap 3 add_dummy_prefix 4 remove_extra_whitespaces 5 escape_whitespaces
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Iterator

import numpy as np

from gemma.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece.Type
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # U+2581 stands for a space inside pieces
MAX_PIECES = 1 << 20  # four times the largest vocabulary of the family
MAX_PIECE = 1024  # bytes of UTF-8; Gemma's longest has 93
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

_BPE = 2  # TrainerSpec.model_type
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; groups (3 and 4) are refused
_MAX_FIELDS = 1 << 16  # of a message other than the list of pieces


@dataclasses.dataclass(eq=False)
class Vocabulary:
    """Pieces by id, as SentencePiece spells them (U+2581 for a space).

    Attributes:
      pieces: [V] bytes of UTF-8.
      scores: float32 [V]; of two possible merges the one with the higher score comes first.
      types: uint8 [V], NORMAL..BYTE.
    """

    pieces: list[bytes]
    scores: np.ndarray
    types: np.ndarray


# --- reading


class _Wire:
    """A cursor over one message; every length is compared with the bytes that are left."""

    def __init__(self, data: bytes, path, start: int, end: int):
        self.data, self.path, self.pos, self.end = data, path, start, end

    def fail(self, rule: str, at: int | None = None) -> TokenizerError:
        return TokenizerError(f"{self.path} at byte {self.pos if at is None else at}: {rule}")

    def varint(self) -> int:
        value, start = 0, self.pos
        for shift in range(0, 70, 7):
            if self.pos >= self.end:
                raise self.fail(
                    "expected a number, but the message ends; the file is truncated or no SentencePiece model"
                )
            byte = self.data[self.pos]
            self.pos += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise self.fail("expected a number of at most 10 bytes, got a longer one", start)

    def skip(self, count: int) -> int:
        """Moves over `count` bytes and returns where they began."""
        start = self.pos
        if count > self.end - start:
            raise self.fail(f"expected {count} bytes, but {self.end - start} are left; the file is truncated")
        self.pos += count
        return start

    def field(self) -> tuple[int, int, int, int]:
        """(field number, wire type, start, end) of the next field; a varint's value stands in place of its start."""
        at = self.pos
        key = self.varint()
        number, wire = key >> 3, key & 7
        if number == 0 or key >= 1 << 32:
            raise self.fail(f"expected a field number in 1..2^29-1, got {number}", at)
        if wire == _VARINT:
            return number, wire, self.varint(), self.pos
        if wire == _BYTES:
            return number, wire, self.skip(self.varint()), self.pos
        if wire in (_FIXED64, _FIXED32):
            return number, wire, self.skip(8 if wire == _FIXED64 else 4), self.pos
        raise self.fail(f"expected wire type 0, 1, 2 or 5, got {wire}; this is no SentencePiece model", at)

    def fields(self) -> Iterator[tuple[int, int, int, int]]:
        while self.pos < self.end:
            yield self.field()


def read_model(data: bytes, path) -> Vocabulary:
    """The vocabulary of a `.model` file; settings that no Gemma has are refused, parts that are not needed dropped.

    Args:
      data: the whole file.
      path: named in errors.

    Raises:
      TokenizerError: the bytes are no SentencePiece model, or it is not of Gemma's kind.
    """
    wire = _Wire(data, path, 0, len(data))
    pieces: list[bytes] = []
    scores: list[float] = []
    types, settings, others = bytearray(), {}, 0
    while True:
        wire.pos = _read_common_pieces(data, wire.pos, pieces, scores, types)
        if len(pieces) > MAX_PIECES:
            raise wire.fail(f"expected at most {MAX_PIECES} pieces, got more")
        if wire.pos >= wire.end:
            break
        number, kind, start, end = wire.field()
        if number == 1 and kind == _BYTES:
            piece, score, type_ = _read_piece(_Wire(data, path, start, end))
            pieces.append(piece)
            scores.append(score)
            types.append(type_)
            continue
        others += 1
        if others > _MAX_FIELDS:
            raise wire.fail(f"expected at most {_MAX_FIELDS} fields besides the pieces, got more")
        if number in (2, 3, 5) and kind == _BYTES:
            for field, value in _settings(_Wire(data, path, start, end)).items():
                settings[number, field] = value  # a repeated message is merged, as protobuf does
    _check_settings(settings, path)
    found = Vocabulary(pieces, np.array(scores, np.float32), np.frombuffer(bytes(types), np.uint8))
    if settings.get((2, 35)) and not (found.types == BYTE).any():
        raise TokenizerError(f"{path}: byte_fallback is on: expected 256 byte pieces, got none")
    return found


def _read_common_pieces(data: bytes, pos: int, pieces: list, scores: list, types: bytearray) -> int:
    """Takes pieces of the usual form as long as they come; returns where another form, or the end, begins.

    The usual form is short strings, a score, and a type or none, in that order: all 262,144 pieces of a Gemma but a
    handful. Reading them field by field would take five times as long.
    """
    end, unpack = len(data), struct.Struct("<f").unpack_from
    while pos + 4 <= end and len(pieces) <= MAX_PIECES:
        stop, at = pos + 2 + data[pos + 1], pos + 4 + data[pos + 3]
        if not (data[pos] == data[pos + 2] == 0x0A and pos + 4 < at < stop <= end and data[pos + 1] < 128):
            break
        if data[pos + 3] > 127 or data[at] != 0x15:
            break
        if stop - at == 7 and data[at + 5] == 0x18 and NORMAL <= data[at + 6] <= BYTE:
            types.append(data[at + 6])
        elif stop - at == 5:
            types.append(NORMAL)
        else:
            break
        pieces.append(data[pos + 4 : at])
        scores.append(unpack(data, at + 1)[0])
        pos = stop
    return pos


def _read_piece(wire: _Wire) -> tuple[bytes, float, int]:
    piece, score, type_ = b"", 0.0, NORMAL
    for number, kind, start, end in wire.fields():
        if number == 1 and kind == _BYTES:
            if end - start > MAX_PIECE:
                raise wire.fail(f"expected a piece of at most {MAX_PIECE} bytes, got {end - start}", start)
            piece = wire.data[start:end]
        elif number == 2 and kind == _FIXED32:
            (score,) = struct.unpack_from("<f", wire.data, start)
        elif number == 3 and kind == _VARINT:
            if not NORMAL <= start <= BYTE:
                raise wire.fail(f"expected a piece type in {NORMAL}..{BYTE}, got {start}")
            type_ = start
        elif number in (1, 2, 3):
            raise wire.fail(f"field {number} of a piece has wire type {kind}")
    if not piece:
        raise wire.fail("expected a piece, got an empty one", wire.end)
    return piece, score, type_


def _settings(wire: _Wire) -> dict[int, int]:
    """Field number to value: of numbers the value, of bytes their length."""
    found: dict[int, int] = {}
    for count, (number, kind, start, end) in enumerate(wire.fields()):
        if count > _MAX_FIELDS:
            raise wire.fail(f"expected at most {_MAX_FIELDS} settings, got more")
        found[number] = end - start if kind == _BYTES else start
    return found


# (message, field): (default of the format, what a Gemma has, name)
_EXPECTED = {
    (2, 3): (1, _BPE, "trainer_spec.model_type (1 unigram, 2 BPE, 3 word, 4 char)"),
    (2, 24): (0, 0, "trainer_spec.treat_whitespace_as_suffix"),
    (3, 2): (0, 0, "normalizer_spec.precompiled_charsmap, bytes"),
    (3, 3): (1, 0, "normalizer_spec.add_dummy_prefix"),
    (3, 4): (1, 0, "normalizer_spec.remove_extra_whitespaces"),
    (3, 5): (1, 1, "normalizer_spec.escape_whitespaces"),
    (5, 2): (0, 0, "denormalizer_spec.precompiled_charsmap, bytes"),
}


def _check_settings(settings: dict[tuple[int, int], int], path) -> None:
    for key, (default, wanted, name) in _EXPECTED.items():
        got = settings.get(key, default)
        if got != wanted:
            raise TokenizerError(
                f"{path}: {name}: every Gemma tokenizer has {wanted}, got {got}; it is another model's"
            )


# --- rules


def check_vocabulary(vocabulary: Vocabulary, path) -> None:
    """Every rule that a vocabulary must meet, whatever file it came from; TokenizerError names path and id."""
    pieces, scores, types = vocabulary.pieces, vocabulary.scores, vocabulary.types
    if not 1 <= len(pieces) <= MAX_PIECES:
        raise TokenizerError(f"{path}: expected 1 to {MAX_PIECES} pieces, got {len(pieces)}")
    if not len(pieces) == len(scores) == len(types):
        raise TokenizerError(f"{path}: {len(pieces)} pieces, but {len(scores)} scores and {len(types)} types")
    if not np.isfinite(scores).all():
        raise TokenizerError(f"{path}: the score of id {int(np.argmin(np.isfinite(scores)))} is not a finite number")
    outside = (types < NORMAL) | (types > BYTE)
    if outside.any():
        at = int(np.argmax(outside))
        raise TokenizerError(f"{path}: id {at}: expected a type in {NORMAL}..{BYTE}, got {types[at]}")
    longest = max(range(len(pieces)), key=lambda i: len(pieces[i]))
    if len(pieces[longest]) > MAX_PIECE:
        raise TokenizerError(f"{path}: id {longest}: a piece has at most {MAX_PIECE} bytes, got {len(pieces[longest])}")
    _check_spellings(pieces, path)
    unknown = np.flatnonzero(types == UNKNOWN)
    if len(unknown) != 1:
        raise TokenizerError(f"{path}: expected one piece of type unknown, got {len(unknown)}")
    if not (types == NORMAL).any():
        raise TokenizerError(f"{path}: expected ordinary pieces, got only special ones")
    _check_bytes(vocabulary, path)


def _check_spellings(pieces: list[bytes], path) -> None:
    if len(set(pieces)) != len(pieces):
        seen: set[bytes] = set()
        at = next(i for i, piece in enumerate(pieces) if piece in seen or seen.add(piece))
        raise TokenizerError(f"{path}: id {at}: the piece {pieces[at]!r:.80} is there twice")
    if b"" in pieces:
        raise TokenizerError(f"{path}: the piece of id {pieces.index(b'')} is empty")
    try:
        joined = b"\n".join(pieces).decode()
    except UnicodeDecodeError as error:
        at = _first(pieces, lambda piece: not _is_text(piece))
        raise TokenizerError(f"{path}: id {at}: the piece is not valid UTF-8 ({error.reason})") from None
    if "\0" in joined:
        raise TokenizerError(f"{path}: id {_first(pieces, lambda piece: 0 in piece)}: a piece holds a NUL character")


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def _first(pieces: list[bytes], wrong) -> int:
    return next(i for i, piece in enumerate(pieces) if wrong(piece))


def _check_bytes(vocabulary: Vocabulary, path) -> None:
    ids = np.flatnonzero(vocabulary.types == BYTE)
    for i in ids:
        if not BYTE_PIECE.fullmatch(vocabulary.pieces[i].decode()):
            raise TokenizerError(
                f"{path}: id {i} is a byte piece: expected <0x00>..<0xFF>, got {vocabulary.pieces[i]!r:.80}"
            )
    if len(ids) not in (0, 256):
        raise TokenizerError(f"{path}: expected all 256 byte pieces or none, got {len(ids)}")


# --- writing


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | _VARINT) + _varint(value)
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def write_model(vocabulary: Vocabulary, special: dict[str, int]) -> bytes:
    """The ModelProto of a checked vocabulary: BPE, identity normalizer, byte fallback where it has byte pieces.

    Args:
      special: ids of "unk", "bos", "eos" and "pad"; -1 for a piece that the vocabulary lacks.
    """
    pieces, types = vocabulary.pieces, vocabulary.types
    # Each entry ends in 7 bytes that numpy lays out for all pieces at once: tag and float of the score, tag and type.
    tails = np.empty((len(pieces), 7), np.uint8)
    tails[:, 0], tails[:, 5], tails[:, 6] = 2 << 3 | _FIXED32, 3 << 3 | _VARINT, types
    tails[:, 1:5] = np.ascontiguousarray(vocabulary.scores, "<f4").view(np.uint8).reshape(-1, 4)
    tail = tails.tobytes()
    heads = {n: _field(1, b"\x0a" + _varint(n) + bytes(n + 7))[: -n - 7] for n in {len(piece) for piece in pieces}}
    out = [heads[len(piece)] + piece + tail[at : at + 7] for piece, at in zip(pieces, range(0, len(tail), 7))]
    minus_one = (1 << 64) - 1  # protobuf writes a negative int32 as ten bytes
    trainer = _field(3, _BPE) + _field(4, len(pieces)) + _field(35, int((types == BYTE).any()))
    for number, name in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad")):
        trainer += _field(number, special[name] if special[name] >= 0 else minus_one)
    normalizer = _field(1, b"identity") + _field(3, 0) + _field(4, 0) + _field(5, 1)
    return b"".join(out) + _field(2, trainer) + _field(3, normalizer)
