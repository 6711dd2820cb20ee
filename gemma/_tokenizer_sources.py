# SPDX-License-Identifier: Apache-2.0
"""From a file or a TokenizerSource to the engine that a `Tokenizer` runs; which kind a file is, is found by content.

A SentencePiece `.model` and the vocabulary inside a GGUF go the same way: read, checked, special pieces hidden, written
as a ModelProto, run by `sentencepiece`. `tokenizer.json` is `_tokenizer_json.py`. GGUF files are read by
`gemma.formats` and `gemma.checkpoint`. Encoding and decoding is `tokenizer.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import sentencepiece

from gemma import _vocabulary_cache
from gemma._sentencepiece_proto import CONTROL, SPACE, UNKNOWN, Vocabulary, check_vocabulary, read_model, write_model
from gemma._special_tokens import find_special, hide_special, mark_unknown, special_ids
from gemma.errors import CheckpointNotFound, TokenizerError

if TYPE_CHECKING:
    from gemma.checkpoint import Checkpoint, TokenizerSource
    from gemma.formats.gguf import Gguf

MAX_MODEL = 1 << 25  # bytes of a .model file; Gemma 3's has 4.7 MB
MAX_GGUF_HEADER = 1 << 28  # bytes that are hashed to find a vocabulary in the cache; more are only read
_GGUF_MAGIC = b"GGUF"
_USER_DEFINED = 4


class Engine(Protocol):
    """A vocabulary and the way from plain text to its ids. `types` is uint8 [V], special pieces are control pieces."""

    types: np.ndarray
    special: Mapping[str, int]  # spelling to id of each special piece

    def encode(self, text: str) -> list[int]: ...
    def piece(self, token: int) -> str: ...
    def find(self, piece: str) -> int | None: ...


class SentencePieceEngine:
    """`sentencepiece` on a proto that `write_model` made."""

    def __init__(self, types: np.ndarray, proto: bytes, path):
        self.types = types
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (RuntimeError, OSError) as error:
            raise TokenizerError(f"{path}: sentencepiece refuses the vocabulary: {error}") from None
        if self._processor.vocab_size() != len(types):
            raise TokenizerError(f"{path}: {len(types)} pieces became {self._processor.vocab_size()} in sentencepiece")
        hidden = np.flatnonzero((types == CONTROL) | (types == UNKNOWN)).tolist()
        self.special = dict(zip(self._processor.id_to_piece(hidden), hidden)) if hidden else {}

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token)

    def find(self, piece: str) -> int | None:
        token = self._processor.piece_to_id(piece)
        return token if self._processor.id_to_piece(token) == piece else None  # unknown pieces map to <unk>


# --- files


def open_engine(path: str | os.PathLike[str]) -> Engine:
    """The engine of a `.model`, `tokenizer.json` or `.gguf` file, or of a folder that holds one."""
    path = _in_folder(Path(path))
    with contextlib.closing(_open(path)) as source:
        start = source.read(0, min(source.size, 64)).tobytes()
        if start[:4] == _GGUF_MAGIC:
            return _from_gguf_file(source)
        if path.suffix == ".json" or (path.suffix != ".model" and start.lstrip()[:1] == b"{"):
            from gemma._tokenizer_json import read_tokenizer_json

            return read_tokenizer_json(source)
        if source.size > MAX_MODEL:
            raise TokenizerError(f"{path}: a SentencePiece model has at most {MAX_MODEL} bytes, got {source.size}")
        return _from_model(source.read(0, source.size).tobytes(), path)


def _open(path: Path):
    from gemma.formats._source import Source

    return Source(path)


def _in_folder(path: Path) -> Path:
    """The tokenizer file in a folder, or beside a safetensors file; a path to any other file as it is."""
    if path.suffix == ".safetensors":
        path = path.parent
    if not os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        return path
    for name in ("tokenizer.model", "tokenizer.json"):
        if (path / name).exists():
            return path / name
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} GGUF files: name one of them" if found else "none of them"
    raise CheckpointNotFound(f"{path}: expected tokenizer.model, tokenizer.json or one .gguf file, found {what}")


def _from_model(data: bytes, path: Path) -> Engine:
    def read() -> Vocabulary:
        vocabulary = read_model(data, path)
        check_vocabulary(vocabulary, path)
        return vocabulary

    return _cached(hashlib.sha256(data).hexdigest(), read, path)


def _from_gguf_file(source) -> Engine:
    from gemma.checkpoint import open_checkpoint
    from gemma.formats.gguf import Gguf

    def read() -> TokenizerSource | None:
        with open_checkpoint(source.path) as checkpoint:
            return checkpoint.tokenizer_source()

    return _from_gguf(Gguf(source), read)


def checkpoint_engine(checkpoint: Checkpoint) -> Engine | None:
    """The engine of an open checkpoint, whose header is not parsed again; None where it carries no tokenizer."""
    gguf = getattr(checkpoint, "gguf", None)
    if gguf is None:
        source = checkpoint.tokenizer_source()
        return None if source is None else source_engine(source)
    return _from_gguf(gguf, checkpoint.tokenizer_source) if "tokenizer.ggml.model" in gguf.values else None


def _from_gguf(header: Gguf, read_source: Callable[[], TokenizerSource | None]) -> Engine:
    """A GGUF's header is hashed as it stands: where the cache knows it, 262,144 pieces need not be decoded."""
    source = header.source
    end = min((tensor.offset for tensor in header.tensors.values()), default=source.size)

    def read() -> Vocabulary:
        found = read_source()
        if found is None:
            raise TokenizerError(f"{source.path}: this GGUF file carries no tokenizer; pass a tokenizer file")
        return gguf_vocabulary(found)

    if end > MAX_GGUF_HEADER:
        return _engine(read(), source.path)
    return _cached(hashlib.sha256(source.view(0, end)).hexdigest(), read, source.path)


# --- sources


def source_engine(source: TokenizerSource) -> Engine:
    """The engine of what a checkpoint says about its tokenizer."""
    if source.model is not None:
        return _from_model(source.model, _name(source))
    if source.kind in ("sentencepiece", "tokenizer.json"):
        if source.path is None:
            raise TokenizerError(f"a TokenizerSource of kind {source.kind!r} needs a path, got None")
        return open_engine(source.path)
    if source.kind != "gguf" or source.pieces is None or source.scores is None or source.types is None:
        raise TokenizerError(
            f'a TokenizerSource is "sentencepiece", "tokenizer.json" or "gguf" with pieces, scores and types, '
            f"got {source.kind!r}"
        )
    digest = hashlib.sha256(b"pieces %d\0" % len(source.pieces))
    digest.update(repr((sorted(source.special.items()), sorted(source.flags.items()))).encode())
    # A piece holds no NUL (checked when the vocabulary is built), so this joins without ambiguity.
    digest.update("\0".join(source.pieces).encode("utf-8", "surrogatepass"))
    digest.update(np.ascontiguousarray(source.scores, "<f4").tobytes())
    digest.update(np.ascontiguousarray(source.types, "<i4").tobytes())
    return _cached(digest.hexdigest(), lambda: gguf_vocabulary(source), _name(source))


def _name(source: TokenizerSource):
    return "the vocabulary" if source.path is None else source.path


def gguf_vocabulary(source: TokenizerSource) -> Vocabulary:
    path = _name(source)
    if source.flags.get("add_space_prefix"):
        raise TokenizerError(f"{path}: tokenizer.ggml.add_space_prefix is true: no Gemma adds a space before a text")
    types = np.asarray(source.types)
    if types.size and (types.min() < 1 or types.max() > 255):
        raise TokenizerError(f"{path}: expected piece types in 1..6, got {types.min()}..{types.max()}")
    pieces = [piece.encode("utf-8", "surrogatepass") for piece in source.pieces]
    # GGUF holds user-defined pieces with real spaces, all others with U+2581.
    for i in np.flatnonzero(types == _USER_DEFINED).tolist():
        pieces[i] = pieces[i].replace(b" ", SPACE.encode())
    vocabulary = Vocabulary(pieces, np.asarray(source.scores, np.float32), types.astype(np.uint8))
    mark_unknown(vocabulary, source.special.get("unk"), path)
    check_vocabulary(vocabulary, path)
    _check_stated(vocabulary, source.special, path)
    return vocabulary


def _check_stated(vocabulary: Vocabulary, stated: Mapping[str, int], path) -> None:
    """The ids that the metadata names must be those of the pieces: a shifted vocabulary shows here."""
    for name, spelling in (("bos", b"<bos>"), ("pad", b"<pad>")):
        token = stated.get(name)
        if token is not None and spelling in vocabulary.pieces and vocabulary.pieces[token] != spelling:
            raise TokenizerError(
                f"{path}: {name}_token_id is {token}, but {spelling.decode()} is id {vocabulary.pieces.index(spelling)}"
            )


# --- from a vocabulary


def _cached(digest: str, read: Callable[[], Vocabulary], path) -> Engine:
    kept = _vocabulary_cache.load(digest)
    if kept is not None:
        return SentencePieceEngine(*kept, path)
    engine, types, proto = _build(read(), path)
    _vocabulary_cache.store(digest, types, proto)
    return engine


def _engine(vocabulary: Vocabulary, path) -> Engine:
    return _build(vocabulary, path)[0]


def _build(vocabulary: Vocabulary, path) -> tuple[Engine, np.ndarray, bytes]:
    hide_special(vocabulary)
    tokens = find_special(special_ids(vocabulary), path)
    unknown = int(np.flatnonzero(vocabulary.types == UNKNOWN)[0])
    ids = {"bos": tokens.bos, "eos": tokens.eos, "pad": -1 if tokens.pad is None else tokens.pad, "unk": unknown}
    proto = write_model(vocabulary, ids)
    return SentencePieceEngine(vocabulary.types, proto, path), vocabulary.types, proto
