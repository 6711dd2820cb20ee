# SPDX-License-Identifier: Apache-2.0
"""ByteTokenizer, a tokenizer of bytes with the interface of `gemma.tokenizer.Tokenizer`; public through `testing.py`.

It holds no file and needs no library, so a test of an engine, a server or a command can run without a vocabulary.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

from gemma._testing_files import SPECIAL_PIECES
from gemma.errors import TokenizerError


class ByteTokenizer:
    """One id per byte of UTF-8, after the special tokens; its ids fit every `tiny_config`.

    ids 0..9 are `<pad> <eos> <bos> <unk> <mask> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image>
    <image_soft_token>`; byte b is id 10 + b. The ids equal those of `tiny_pieces` except for the space, which has a
    piece of its own there.
    """

    FIRST_BYTE = len(SPECIAL_PIECES)
    version = 3

    def __init__(self):
        self.vocab_size = self.FIRST_BYTE + 256
        self.pieces = [*SPECIAL_PIECES, *(f"<0x{byte:02X}>" for byte in range(256))]
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        self._special = re.compile("(" + "|".join(map(re.escape, SPECIAL_PIECES)) + ")")

    @property
    def special(self):
        """The ids of the special tokens, as `gemma.tokenizer.SpecialTokens`."""
        from gemma.tokenizer import SpecialTokens

        return SpecialTokens(
            **{f: self._ids[f"<{f}>"] for f in SpecialTokens.__dataclass_fields__ if f"<{f}>" in self._ids}
        )

    def encode(
        self, text: str | bytes, *, add_bos: bool = False, add_eos: bool = False, parse_special: bool = True
    ) -> list[int]:
        """The ids of a text; with `parse_special`, spellings such as `<bos>` become their one id."""
        if isinstance(text, bytes):
            parts = [text]
        else:
            parts = self._special.split(text) if parse_special else [text]
        ids = [self._ids["<bos>"]] if add_bos else []
        for n, part in enumerate(parts):
            if n % 2:  # re.split puts the separators at odd places
                ids.append(self._ids[part])
            else:
                raw = part if isinstance(part, bytes) else part.encode()
                ids += [self.FIRST_BYTE + byte for byte in raw]
        return ids + ([self._ids["<eos>"]] if add_eos else [])

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return self._bytes(ids, skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; special tokens are spelled out."""
        return self._bytes(ids, False)

    def stream(self) -> ByteStream:
        """A decoder for ids that come one at a time."""
        return ByteStream(self)

    def piece(self, token: int) -> str:
        return self.pieces[self._checked(token)]

    def id_of(self, piece: str) -> int:
        if piece not in self._ids:
            raise TokenizerError(f"ByteTokenizer: no piece {piece!r}")
        return self._ids[piece]

    def is_special(self, token: int) -> bool:
        return self._checked(token) < self.FIRST_BYTE

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"ByteTokenizer: expected ids in 0..{self.vocab_size - 1}, got {token}")
        return token

    def _bytes(self, ids: Iterable[int], skip_special: bool) -> bytes:
        out = bytearray()
        for token in ids:
            if not self.is_special(token):
                out.append(token - self.FIRST_BYTE)
            elif not skip_special:
                out += self.pieces[token].encode()
        return bytes(out)


class ByteStream:
    """Decodes ids one at a time; a character appears when its last byte has come."""

    def __init__(self, tokenizer: ByteTokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)
