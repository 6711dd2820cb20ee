# SPDX-License-Identifier: Apache-2.0
"""A vocabulary, whatever file it came from: pieces, scores, types, and which pieces are control tokens.

Reads the three sources (a SentencePiece `.model`, a `tokenizer.json`, the arrays of a GGUF) into one checked form.
Text is cut into pieces by `tokenizer.py`, with the engine that this module prepares.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma import _sp_wire as proto
from gemma._sp_wire import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from gemma.errors import CheckpointNotFound, FormatError, TokenizerError

BLOCK = "▁"  # stands for a space inside pieces
_MAX_FILE = 256 << 20
_MAX_PIECE = 512  # characters; the longest published piece has 31
# User-defined pieces that steer a model rather than spell content: text typed by a person must not become one.
_MARKER = re.compile(
    r"<(?:pad|eos|bos|unk|mask|unused\d+|(?:start|end)_of_(?:turn|image|audio)|image_soft_token|image|loc\d{4}|seg\d{3}"
    r"|(?:start|end)_function_\w+|escape|\|[^<>|]+\|?|[^<>|]+\|)>"
)
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Pieces by id, checked.

    Attributes:
      path: the file it came from, for messages.
      pieces: [V], with the block character for spaces.
      types: uint8 [V], SentencePiece's types; markers are CONTROL whatever their file calls them.
      engine: makes the function that cuts plain text (no control tokens) into ids.
    """

    path: Path
    pieces: list[str]
    types: np.ndarray
    engine: Callable[[], Callable[[str], list[int]]]

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}


def from_model(path: Path) -> Vocabulary:
    """The vocabulary of a SentencePiece `.model` file."""
    pieces, scores, types = proto.parse(_read(path), path)
    if types.count(UNKNOWN) != 1:
        raise FormatError(path, None, f"expected one unknown piece, got {types.count(UNKNOWN)}")
    return _checked(path, pieces, scores, np.array([t if 0 <= t < 256 else 0 for t in types], np.uint8))


def from_arrays(path: Path, pieces: Sequence[str], scores: np.ndarray, types: np.ndarray, unk: int = 3) -> Vocabulary:
    """The vocabulary inside a GGUF; its user-defined pieces hold real spaces, and `<unk>` is called a control token."""
    shown = [p.replace(" ", BLOCK) if " " in p else p for p in pieces]
    kinds = np.asarray(types).astype(np.uint8)
    kinds[kinds == UNKNOWN] = CONTROL
    if not 0 <= unk < len(shown):
        raise FormatError(path, None, f"the id of the unknown token, {unk}, is outside the vocabulary")
    kinds[unk] = UNKNOWN
    return _checked(path, shown, np.asarray(scores, np.float32), kinds)


def from_json(path: Path) -> Vocabulary:
    """The vocabulary and merges of a `tokenizer.json`; the `tokenizers` library runs them."""
    from gemma import _tokenizer_json

    pieces, types, engine = _tokenizer_json.read(path, _read(path), is_marker)
    _check_pieces(path, pieces, types)
    return Vocabulary(path, pieces, types, engine)


def is_marker(piece: str) -> bool:
    """Whether a user-defined piece of that spelling is a control token rather than content."""
    return _MARKER.fullmatch(piece) is not None


def _checked(path: Path, pieces: list[str], scores: np.ndarray, types: np.ndarray) -> Vocabulary:
    if not np.isfinite(scores).all():
        raise FormatError(path, None, f"the score of piece {int(np.argmin(np.isfinite(scores)))} is not a finite number")
    for i in np.flatnonzero(types == USER_DEFINED):
        if is_marker(pieces[i]):
            types[i] = CONTROL
    _check_pieces(path, pieces, types)
    return Vocabulary(path, pieces, types, functools.partial(_sentencepiece, path, pieces, scores, types))


def _check_pieces(path: Path, pieces: Sequence[str], types: np.ndarray) -> None:
    if not pieces:
        raise FormatError(path, None, "expected a vocabulary, got no pieces")
    bad = np.flatnonzero((types < NORMAL) | (types > BYTE))
    if bad.size:
        raise FormatError(path, None, f"piece {bad[0]} has the type {types[bad[0]]}; the types are 1..6")
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    bad = np.flatnonzero((lengths == 0) | (lengths > _MAX_PIECE))
    if bad.size:
        raise FormatError(path, None, f"piece {bad[0]} has {lengths[bad[0]]} characters; expected 1..{_MAX_PIECE}")
    if len(set(pieces)) != len(pieces):
        seen: set[str] = set()
        twice = next(p for p in pieces if p in seen or seen.add(p))
        raise FormatError(path, None, f"the piece {twice!r} stands twice")
    if (types == UNKNOWN).sum() != 1:
        raise FormatError(path, None, f"expected one unknown piece, got {(types == UNKNOWN).sum()}")
    spelled = [_BYTE_PIECE.fullmatch(pieces[i]) for i in np.flatnonzero(types == BYTE)]
    if None in spelled or {int(m[1], 16) for m in spelled} != set(range(256)):
        raise FormatError(path, None, "expected the 256 byte pieces <0x00>..<0xFF>, each once; they are not all there")
    missing = {"<bos>", "<eos>", "<pad>"} - {pieces[i] for i in np.flatnonzero((types == CONTROL) | (types == UNKNOWN))}
    if missing:
        raise FormatError(path, None, f"this is no Gemma vocabulary: it lacks {', '.join(sorted(missing))}")


def _sentencepiece(path: Path, pieces: list[str], scores: np.ndarray, types: np.ndarray) -> Callable[[str], list[int]]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(_cached_proto(pieces, scores, types))
    except RuntimeError as error:
        raise FormatError(path, None, f"SentencePiece refuses this vocabulary: {error}") from None
    return processor.EncodeAsIds


def _cached_proto(pieces: list[str], scores: np.ndarray, types: np.ndarray) -> bytes:
    """The ModelProto of a vocabulary: building it takes longer than a command may need to start, so it is kept.

    The file holds the SHA-256 of what follows; a damaged one is written anew. A cache folder that cannot be written is
    no error: the proto is then built every time.
    """
    from gemma import hub

    key = hashlib.sha256(b"gemmakit 1")
    lengths = np.fromiter(map(len, pieces), np.int32, len(pieces))
    for part in (lengths.tobytes(), "".join(pieces).encode(), scores.tobytes(), types.tobytes()):
        key.update(part)
    target = hub.cache_dir() / "tokenizer" / f"{key.hexdigest()}.proto"
    try:
        data = target.read_bytes()
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return data[32:]
    except OSError:
        pass  # not there yet, or not readable: it is built
    data = proto.build(pieces, scores, types.tolist())
    _keep(target, hashlib.sha256(data).digest() + data)
    return data


def _keep(target: Path, data: bytes) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError:
        return  # a read-only or full cache folder costs time, nothing else


def _read(path: Path) -> bytes:
    from gemma.formats._source import Source

    source = Source(path, mmap=False)
    try:
        if source.size > _MAX_FILE:
            raise FormatError(path, None, f"expected a tokenizer of at most {_MAX_FILE >> 20} MB, got {source.size >> 20}")
        return source.read(0, source.size).tobytes()
    finally:
        source.close()


def find(path: Path) -> Path:
    """The tokenizer file that a path means: itself, or the one inside a folder."""
    if not path.is_dir():
        return path
    for name in ("tokenizer.model", "tokenizer.json"):
        if (path / name).exists():
            return path / name
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    raise CheckpointNotFound(f"{path}: expected tokenizer.model, tokenizer.json or one .gguf file in this folder")


def strict_json(data: bytes, path: Path) -> Mapping[str, Any]:
    """A JSON object without duplicate fields; TokenizerError otherwise."""

    def pairs(items):
        fields = dict(items)
        if len(fields) != len(items):
            raise ValueError("a field stands twice")
        return fields

    try:
        value = json.loads(data.decode(), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: expected a tokenizer.json, got no valid JSON ({str(error)[:200]})") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
