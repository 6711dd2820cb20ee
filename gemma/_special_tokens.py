# SPDX-License-Identifier: Apache-2.0
"""Which pieces of a vocabulary are special, what they are called, and where a text spells one.

A piece is special if no text may become it unless special spellings are asked for: control pieces, and user-defined
pieces that are no plain content. SentencePiece itself then never sees a special piece in a text, because all of them
are control pieces in the proto it runs. Files are read in `_tokenizer_sources.py`, chat markers used in `chat.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from gemma._sentencepiece_proto import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary
from gemma.errors import TokenizerError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the special tokens, found by their pieces; None where a vocabulary has no such piece.

    `image_soft_token` is the placeholder that image features replace; `start_of_image` and `end_of_image` stand around
    a run of them.
    """

    pad: int | None = None
    eos: int | None = None
    bos: int | None = None
    unk: int | None = None
    mask: int | None = None
    start_of_turn: int | None = None
    end_of_turn: int | None = None
    start_of_image: int | None = None
    end_of_image: int | None = None
    image_soft_token: int | None = None


# The spelling of each token in Gemma 1 to 3, then in Gemma 4 and PaliGemma where they differ.
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "pad": ("<pad>",),
    "eos": ("<eos>",),
    "bos": ("<bos>",),
    "unk": ("<unk>",),
    "mask": ("<mask>",),
    "start_of_turn": ("<start_of_turn>", "<|turn>"),
    "end_of_turn": ("<end_of_turn>", "<turn|>"),
    "start_of_image": ("<start_of_image>", "<|image>"),
    "end_of_image": ("<end_of_image>", "<image|>"),
    "image_soft_token": ("<image_soft_token>", "<|image|>", "<image>"),
}
_MARKERS = frozenset(spelling.encode() for spellings in SPELLINGS.values() for spelling in spellings)

# The tags that Gemma's vocabularies hold as user-defined pieces: they are content, matched in every text.
_TAG_NAMES = "table caption thead tbody tfoot tr th td h1 h2 h3 h4 h5 h6 blockquote strong em b i u s sub sup code"
_TAG_NAMES += " a html body img span bbox ul ol li div iframe footer p br hr"
_TAGS = frozenset(f"<{slash}{name}>".encode() for name in _TAG_NAMES.split() for slash in ("", "/"))


def is_content(piece: bytes) -> bool:
    """True for a user-defined piece that is plain content: a run of blanks, an HTML tag, or without angle brackets.

    The last are `[multimodal]` of Gemma 3 and `[@BOS@]` of Gemma 1: they have no function, and every other
    implementation matches them in plain text.
    """
    return piece in _TAGS or not (piece[:1] == b"<" and piece[-1:] == b">")


def hide_special(vocabulary: Vocabulary) -> None:
    """Turns every special piece into a control piece, in place, so that no text is ever matched to it."""
    types = vocabulary.types.copy()
    for i in np.flatnonzero(types == USER_DEFINED):
        if not is_content(vocabulary.pieces[i]):
            types[i] = CONTROL
    # Some converters call the turn markers ordinary pieces; an ordinary piece could be merged out of plain text.
    for i, piece in enumerate(vocabulary.pieces):
        if piece in _MARKERS and types[i] != UNKNOWN:
            types[i] = CONTROL
    vocabulary.types = types


def find_special(ids: Mapping[str, int], path) -> SpecialTokens:
    """The special tokens among `ids` (spelling to id); a vocabulary without <bos> or <eos> is refused."""
    found = {}
    for name, spellings in SPELLINGS.items():
        found[name] = next((ids[spelling] for spelling in spellings if spelling in ids), None)
    for name in ("bos", "eos"):
        if found[name] is None:
            raise TokenizerError(f"{path}: expected a piece <{name}>, found none; this is no Gemma vocabulary")
    return SpecialTokens(**found)


def version_of(ids: Mapping[str, int]) -> int | None:
    """2 for the vocabulary of Gemma 1, 2 and PaliGemma, 3 for Gemma 3, 4 for Gemma 4; None where no marker tells."""
    if "<|turn>" in ids:
        return 4
    if "<start_of_image>" in ids:
        return 3
    return 2 if "<start_of_turn>" in ids else None


class SpellingFinder:
    """Finds the special spellings in a text, leftmost first and the longest of those that begin at one place.

    Nearly all spellings are a pair of brackets with none of their kind inside, so a bracket expression that is looked
    up in a dictionary finds thousands of them in time linear in the text.
    """

    _PAIRS = (("<", ">"), ("[", "]"))

    def __init__(self, ids: Mapping[str, int]):
        self._ids = dict(ids)
        bracketed = {spelling for spelling in ids if self._is_bracketed(spelling)}
        odd = sorted(set(ids) - bracketed, key=len, reverse=True)
        # A bracketed spelling that begins with an odd one must be tried before it.
        odd += [s for s in bracketed if odd and s.startswith(tuple(odd))]
        patterns = [re.escape(spelling) for spelling in sorted(odd, key=len, reverse=True)]
        for opening, closing in self._PAIRS:
            inner = max((len(s) - 2 for s in bracketed if s[0] == opening), default=0)
            if inner:
                o, c = re.escape(opening), re.escape(closing)
                patterns.append(f"{o}[^{o}{c}]{{1,{inner}}}{c}")
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def _is_bracketed(self, spelling: str) -> bool:
        for opening, closing in self._PAIRS:
            if len(spelling) > 2 and spelling[0] == opening and spelling[-1] == closing:
                return not {opening, closing} & set(spelling[1:-1])
        return False

    def split(self, text: str) -> Iterator[str | int]:
        """The text in order: ids of special spellings, and the non-empty strings between them."""
        start = at = 0
        while self._pattern is not None and (match := self._pattern.search(text, at)):
            token = self._ids.get(match[0])
            if token is None:
                at = match.start() + 1
                continue
            if match.start() > start:
                yield text[start : match.start()]
            yield token
            start = at = match.end()
        if start < len(text):
            yield text[start:]


def special_ids(vocabulary: Vocabulary) -> dict[str, int]:
    """Spelling to id of every special piece of a vocabulary that went through `hide_special`."""
    where = np.flatnonzero((vocabulary.types == CONTROL) | (vocabulary.types == UNKNOWN))
    return {vocabulary.pieces[i].decode(): int(i) for i in where}


def mark_unknown(vocabulary: Vocabulary, stated: int | None, path) -> None:
    """Gives the unknown piece its type where a file has it as a control piece, as GGUF files do; in place.

    Args:
      stated: the id that the metadata names, or None: then the piece `<unk>` is meant.
    """
    types = vocabulary.types.copy()
    if (types == UNKNOWN).any():
        return
    if stated is None:
        if b"<unk>" not in vocabulary.pieces:
            raise TokenizerError(f"{path}: expected a piece <unk>, found none; this is no Gemma vocabulary")
        stated = vocabulary.pieces.index(b"<unk>")
    if not 0 <= stated < len(types) or types[stated] == NORMAL:
        raise TokenizerError(f"{path}: id {stated} is named as the unknown token, but is an ordinary piece")
    types[stated] = UNKNOWN
    vocabulary.types = types
