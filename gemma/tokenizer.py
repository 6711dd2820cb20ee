# SPDX-License-Identifier: Apache-2.0
"""Text to ids and back, for every Gemma: one class over a SentencePiece `.model`, a `tokenizer.json`, or a GGUF.

Knows nothing of turns (`chat.py`) and reads no file itself (`_tokenizer_sources.py`). Ids of special tokens are found
by their pieces, never written down.

Special spellings. With `parse_special=True`, `encode` turns `<bos>`, `<start_of_turn>`, `<start_of_image>` and the like
into their one id, as raw prompts want it. With `parse_special=False` they are text, whatever the file calls them: no
text can then become a control token, a turn marker or an image marker. Tags such as `<table>` and runs of spaces, tabs
and newlines are content with pieces of their own and are matched in both.

Not reversible: U+2581 in a text reads as a space, because it is the vocabulary's own sign for one.
"""

from __future__ import annotations

import codecs
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from gemma._sentencepiece_proto import BYTE, BYTE_PIECE, SPACE
from gemma._special_tokens import SpecialTokens, SpellingFinder, find_special, version_of
from gemma._tokenizer_sources import Engine, checkpoint_engine, open_engine, source_engine
from gemma.errors import TokenizerError

if TYPE_CHECKING:
    from gemma.checkpoint import Checkpoint, TokenizerSource

__all__ = ["SpecialTokens", "StreamDecoder", "Tokenizer"]

_INVALID = re.compile("([\udc80-\udcff]+)")  # how surrogateescape spells bytes that are no UTF-8


class Tokenizer:
    """A vocabulary with its encoder and decoder. Immutable; safe to share between threads.

    Attributes:
      vocab_size: V, number of ids.
      special: ids of the special tokens.
      version: 2 for Gemma 1, 2 and PaliGemma, 3 for Gemma 3, 4 for Gemma 4; None if no marker tells.
    """

    def __init__(self, engine: Engine, name: str = "tokenizer", spellings: Mapping[int, str] | None = None):
        self._engine, self._name = engine, name
        self._renamed = dict(spellings or {})
        self._special_ids = frozenset(engine.special.values())
        taken = {spelling: i for spelling, i in engine.special.items() if i not in self._renamed}
        self._spellings = taken | {spelling: i for i, spelling in self._renamed.items()}
        self._finder = SpellingFinder(self._spellings)
        self._byte_ids: dict[int, int] | None = None  # byte to id, filled on first need
        self._pieces: list[str] | None = None
        self.vocab_size = len(engine.types)
        self.special: SpecialTokens = find_special(self._spellings, name)
        self.version: int | None = version_of(self._spellings)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads a `.model`, `tokenizer.json` or `.gguf` file, or the one that lies in a folder.

        Raises:
          CheckpointNotFound: nothing to read at that path.
          TokenizerError, FormatError, UnsupportedError: the file is broken, or no tokenizer of a Gemma.
        """
        return cls(open_engine(path), os.fspath(path))

    @classmethod
    def from_source(cls, source: TokenizerSource) -> Tokenizer:
        """Makes the tokenizer that a checkpoint carries: `open_checkpoint(path).tokenizer_source()`."""
        return cls(source_engine(source), "tokenizer" if source.path is None else os.fspath(source.path))

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer | None:
        """The tokenizer of an open checkpoint, None where it carries none: quicker than `from_source`, as a vocabulary
        that was seen before is not decoded again.
        """
        engine = checkpoint_engine(checkpoint)
        return None if engine is None else cls(engine, os.fspath(checkpoint.path))

    def __repr__(self) -> str:
        return f"Tokenizer({self._name!r}, vocab_size={self.vocab_size}, version={self.version})"

    # --- text to ids

    def encode(
        self, text: str | bytes, *, add_bos: bool = False, add_eos: bool = False, parse_special: bool = True
    ) -> list[int]:
        """The ids of a text.

        Args:
          text: a string, or bytes that should be UTF-8: invalid bytes become byte pieces, `decode_bytes` gives them
            back. A string with surrogate escapes (as `sys.argv` has them) means the bytes that it stands for.
          add_bos: the ids begin with exactly one bos, also where the text spells one already.
          add_eos: the ids end with an eos, likewise.
          parse_special: see the module's text.

        Raises:
          TokenizerError: a string that is no Unicode text, or bytes without a piece for them.
        """
        ids: list[int] = []
        for part in _INVALID.split(self._as_text(text)):
            if not part:
                continue
            if "\udc80" <= part[0] <= "\udcff":
                ids += self._encode_bytes(part)
            elif parse_special:
                for found in self._finder.split(part):
                    if isinstance(found, int):
                        ids.append(found)
                    else:
                        ids += self._engine.encode(found)
            else:
                ids += self._engine.encode(part)
        if add_bos and ids[:1] != [self.special.bos]:
            ids.insert(0, self.special.bos)
        if add_eos and (len(ids) == add_bos or ids[-1] != self.special.eos):
            ids.append(self.special.eos)
        return ids

    def split(self, text: str | bytes, *, parse_special: bool = True) -> list[str]:
        """The pieces of a text, with spaces as spaces: `["The", " history"]`."""
        return [self._spelled(i) for i in self.encode(text, parse_special=parse_special)]

    def _as_text(self, text: str | bytes) -> str:
        if isinstance(text, (bytes, bytearray, memoryview)):
            return bytes(text).decode("utf-8", "surrogateescape")
        if not isinstance(text, str):
            raise TokenizerError(f"expected a text as str or bytes, got {type(text).__name__}")
        if text.isascii():
            return text
        try:
            return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"expected Unicode text, got the lone surrogate {text[error.start]!r} at position {error.start}"
            ) from None

    def _encode_bytes(self, escaped: str) -> list[int]:
        if self._byte_ids is None:
            where = np.flatnonzero(self._engine.types == BYTE).tolist()
            self._byte_ids = {self._bytes_of(i)[0]: i for i in where}
        data = escaped.encode("utf-8", "surrogateescape")
        if any(byte not in self._byte_ids for byte in data):
            raise TokenizerError(f"{self._name}: the vocabulary has no byte pieces, but the text holds invalid UTF-8")
        return [self._byte_ids[byte] for byte in data]

    # --- ids to text

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of ids; bytes that form no UTF-8 become U+FFFD.

        Args:
          ids: integers in 0..V-1.
          skip_special: leave out special tokens; otherwise they are spelled (`<bos>`).
        """
        ids = self._checked(ids)
        if skip_special:
            ids = [i for i in ids if i not in self._special_ids]
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids, whether they are UTF-8 or not; special tokens are spelled."""
        return b"".join(map(self._bytes_of, self._checked(ids)))

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    def _bytes_of(self, token: int) -> bytes:
        if token in self._renamed:
            return self._renamed[token].encode()
        piece = self._engine.piece(token)
        if token in self._special_ids:
            return piece.encode()
        if self._engine.types[token] == BYTE and (match := BYTE_PIECE.fullmatch(piece)):
            return bytes([int(match[1], 16)])
        return piece.replace(SPACE, " ").encode()

    def _checked(self, ids: Iterable[int]) -> list[int]:
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
            raise TokenizerError(f"expected a sequence of token ids, got {type(ids).__name__}")
        return [self._check(i) for i in ids]

    def _check(self, token: int) -> int:
        try:
            value = operator.index(token)
        except TypeError:
            raise TokenizerError(f"expected a token id as an integer, got {token!r:.80}") from None
        if not 0 <= value < self.vocab_size:
            raise TokenizerError(f"{self._name}: expected token ids in 0..{self.vocab_size - 1}, got {value}")
        return value

    # --- the vocabulary

    def piece(self, token: int) -> str:
        """The piece of an id as the vocabulary spells it: U+2581 for a space, `<0x41>` for a byte."""
        token = self._check(token)
        return self._renamed[token] if token in self._renamed else self._engine.piece(token)

    def _spelled(self, token: int) -> str:
        return self.piece(token).replace(SPACE, " ")

    def id_of(self, piece: str) -> int:
        """The id of a piece; spaces may be written as spaces. TokenizerError if there is no such piece."""
        if not isinstance(piece, str):
            raise TokenizerError(f"expected a piece as str, got {type(piece).__name__}")
        if piece in self._spellings:
            return self._spellings[piece]
        for spelled in (piece, piece.replace(" ", SPACE)):
            found = self._engine.find(spelled)
            if found is not None and found not in self._renamed:
                return found
        raise TokenizerError(f"{self._name}: the vocabulary has no piece {piece!r:.200}")

    @property
    def pieces(self) -> list[str]:
        """All pieces [V] by id, as `piece` spells them."""
        if self._pieces is None:
            self._pieces = [self.piece(i) for i in range(self.vocab_size)]
        return self._pieces

    def is_special(self, token: int) -> bool:
        """True for control tokens, markers and reserved pieces: what `parse_special=False` never makes of a text."""
        return self._check(token) in self._special_ids

    def explain(self, ids: Iterable[int]) -> list[tuple[int, str]]:
        """(id, piece) pairs, for people to read."""
        return [(i, self.piece(i)) for i in self._checked(ids)]

    def with_spellings(self, spellings: Mapping[int, str]) -> Tokenizer:
        """The same vocabulary with other names for special pieces, for example custom tokens for `<unused7>`.

        Args:
          spellings: id of a special piece to its new spelling. The old spelling is plain text from then on.

        Raises:
          TokenizerError: an id that is not special, or a spelling that is empty or taken.
        """
        names = self._renamed | {self._check(i): spelling for i, spelling in spellings.items()}
        others = {s for s, i in self._spellings.items() if i not in names}
        for token, spelling in names.items():
            if token not in self._special_ids:
                raise TokenizerError(f"id {token} ({self.piece(token)!r}) is an ordinary piece and keeps its spelling")
            if not isinstance(spelling, str) or not spelling or spelling in others:
                raise TokenizerError(
                    f"id {token}: expected a spelling that is not empty and not taken, got {spelling!r}"
                )
        if len(set(names.values())) != len(names):
            raise TokenizerError(f"expected one spelling for each id, got {sorted(names.values())}")
        return Tokenizer(self._engine, self._name, names)

    def __len__(self) -> int:
        return self.vocab_size

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)


class StreamDecoder:
    """Decodes ids one at a time. A character appears when its last byte has come, never in parts.

    The parts joined, `flush` included, equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that became complete with this id; may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD; the decoder can be used anew afterwards."""
        return self._decoder.decode(b"", final=True)
