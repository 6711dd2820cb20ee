# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face `tokenizer.json` as an engine: parsed and checked here, run by the `tokenizers` library.

The library never sees the file. Its own parser would build whatever pipeline the file asks for, regular expressions
included; here the pipeline must be the one that every Gemma has (spaces to U+2581, BPE with byte fallback), and only
the vocabulary, the merges and the added tokens are taken. Special pieces are kept from the library, see
`_special_tokens.py`; `tokenizer.model` is `_tokenizer_sources.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma._sentencepiece_proto import (
    BYTE,
    BYTE_PIECE,
    CONTROL,
    MAX_PIECE,
    MAX_PIECES,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
)
from gemma._special_tokens import hide_special, special_ids
from gemma.errors import TokenizerError

MAX_BYTES = 1 << 26  # of a file; Gemma 3's has 33 MB
MAX_MERGES = 1 << 21  # four times Gemma 3's
MAX_ADDED = 1 << 15  # added tokens; Gemma has 6,415
_MAX_BRACKETS = 1 << 21  # of one kind in the file: they bound what json.loads allocates
_MAX_COMMAS = 1 << 23
_SURROGATE = re.compile("[\ud800-\udfff]")

_ESCAPE = dict(type="Replace", pattern=dict(String=" "), content=SPACE)
_NORMALIZERS = (_ESCAPE, dict(type="Sequence", normalizers=[_ESCAPE]))
_SPLIT = dict(type="Split", pattern=dict(String=" "), behavior="MergedWithPrevious", invert=False)
_PRE_TOKENIZERS = (None, _SPLIT)  # after the normalizer there is no space left to split at
_UNESCAPE = dict(type="Replace", pattern=dict(String=SPACE), content=" ")
_DECODERS = (None, dict(type="Sequence", decoders=[_UNESCAPE, dict(type="ByteFallback"), dict(type="Fuse")]))


class JsonEngine:
    """`tokenizers` with a BPE model of checked parts."""

    def __init__(self, vocabulary: Vocabulary, ids: Mapping[str, int], merges: list, added: list, path):
        from tokenizers import AddedToken, Tokenizer, models, normalizers

        self.types = vocabulary.types
        self.special = special_ids(vocabulary)
        self._pieces, self._ids = [piece.decode() for piece in vocabulary.pieces], ids
        unknown = self._pieces[int(np.flatnonzero(self.types == UNKNOWN)[0])]
        try:
            model = models.BPE(dict(ids), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
            self._tokenizer = Tokenizer(model)
            self._tokenizer.normalizer = normalizers.Replace(" ", SPACE)
            self._tokenizer.add_tokens([AddedToken(text, normalized=normal) for text, normal in added])
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path}: the tokenizers library refuses the vocabulary: {error}") from None
        if self._tokenizer.get_vocab_size() != len(ids):
            raise TokenizerError(f"{path}: an added token is no piece of the vocabulary")

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def piece(self, token: int) -> str:
        return self._pieces[token]

    def find(self, piece: str) -> int | None:
        return self._ids.get(piece)


def read_tokenizer_json(source) -> JsonEngine:
    """The engine of an open `tokenizer.json` (a `formats._source.Source`).

    Raises:
      TokenizerError: no JSON, too large, or another tokenizer's pipeline; the field is named.
    """
    vocabulary, ids, merges, added = read_parts(source)
    control = set(special_ids(vocabulary))
    content = [(token["content"], bool(token.get("normalized"))) for token in added if token["content"] not in control]
    return JsonEngine(vocabulary, ids, merges, content, source.path)


def read_parts(source) -> tuple[Vocabulary, dict[str, int], list[tuple[str, str]], list[dict[str, Any]]]:
    """(vocabulary with its special pieces hidden and scores of zero, piece to id, merges in order, added tokens)."""
    path = source.path
    root = _Field(_parse(source), path, "")
    for name, allowed in (("normalizer", _NORMALIZERS), ("pre_tokenizer", _PRE_TOKENIZERS), ("decoder", _DECODERS)):
        root.one_of(name, allowed)
    model = root.child("model")
    model.one_of("type", (None, "BPE"))
    model.one_of("dropout", (None, 0, 0.0))
    model.one_of("byte_fallback", (True,))
    for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"):
        model.one_of(name, (None, False, ""))
    ids = _vocabulary_ids(model)
    added = _added_tokens(root, ids)
    vocabulary = _vocabulary(ids, added, model)
    hide_special(vocabulary)
    return vocabulary, ids, _merges(model, ids, set(special_ids(vocabulary))), added


# --- parsing


class _Field:
    """A JSON object with the way to it, so that each refusal names the field."""

    def __init__(self, value: Any, path, name: str):
        self.value, self.path, self.name = value, path, name
        if not isinstance(value, dict):
            raise TokenizerError(f"{path}: {name or 'the file'}: expected an object, got {type(value).__name__}")

    def fail(self, name: str, rule: str) -> TokenizerError:
        return TokenizerError(f"{self.path}: {self.name + '.' if self.name else ''}{name}: {rule}")

    def child(self, name: str) -> _Field:
        return _Field(self.value.get(name), self.path, f"{self.name}.{name}".lstrip("."))

    def get(self, name: str, kind: type):
        value = self.value.get(name)
        if not isinstance(value, kind):
            raise self.fail(name, f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    def one_of(self, name: str, allowed: tuple) -> None:
        value = self.value.get(name)
        if not any(value == wanted for wanted in allowed):
            raise self.fail(name, f"no Gemma tokenizer has {value!r:.200}; expected {allowed[-1]!r:.200}")


def _parse(source) -> Any:
    path = source.path
    if source.size > MAX_BYTES:
        raise TokenizerError(f"{path}: a tokenizer.json has at most {MAX_BYTES} bytes, got {source.size}")
    data = source.read(0, source.size).tobytes()
    for sign, limit in ((b"[", _MAX_BRACKETS), (b"{", _MAX_BRACKETS), (b",", _MAX_COMMAS)):
        if data.count(sign) > limit:
            raise TokenizerError(f"{path}: expected at most {limit} of {sign.decode()!r}, got {data.count(sign)}")
    try:
        return json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise TokenizerError(f"{path}: the JSON is nested too deeply for a tokenizer") from None
    except ValueError as error:
        raise TokenizerError(f"{path}: expected JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return found


def _refuse(constant: str):
    raise ValueError(f"{constant} is no JSON number")


# --- parts


def _vocabulary_ids(model: _Field) -> dict[str, int]:
    ids = model.get("vocab", dict)
    if not 1 <= len(ids) <= MAX_PIECES:
        raise model.fail("vocab", f"expected 1 to {MAX_PIECES} pieces, got {len(ids)}")
    for piece in ids if _any_odd(ids) else ():  # one by one only to name the culprit
        _check_piece(model, "vocab", piece)
    for piece, i in ids.items():
        if type(i) is not int or not 0 <= i < MAX_PIECES:
            raise model.fail(
                "vocab", f"the id of {piece!r:.80}: expected an integer in 0..{MAX_PIECES - 1}, got {i!r:.80}"
            )
    return ids


def _any_odd(ids: dict[str, int]) -> bool:
    joined = "".join(ids)
    return "" in ids or "\0" in joined or max(map(len, ids)) > MAX_PIECE or bool(_SURROGATE.search(joined))


def _check_piece(field: _Field, name: str, piece: Any) -> None:
    if not isinstance(piece, str) or not piece or len(piece) > MAX_PIECE or "\0" in piece:
        raise field.fail(name, f"expected pieces of 1 to {MAX_PIECE} characters without NUL, got {piece!r:.80}")
    if _SURROGATE.search(piece):
        raise field.fail(name, f"expected Unicode text, got a lone surrogate in {piece!r:.80}")


def _added_tokens(root: _Field, ids: dict[str, int]) -> list[dict[str, Any]]:
    """The added tokens, each checked; those that the model does not know are added to `ids`."""
    tokens = root.value.get("added_tokens") or []
    if not isinstance(tokens, list) or len(tokens) > MAX_ADDED:
        raise root.fail("added_tokens", f"expected a list of at most {MAX_ADDED}, got {type(tokens).__name__}")
    seen: set[str] = set()
    for n, token in enumerate(tokens):
        field = _Field(token, root.path, f"added_tokens[{n}]")
        content, i = field.get("content", str), field.get("id", int)
        _check_piece(field, "content", content)
        for name in ("single_word", "lstrip", "rstrip"):
            field.one_of(name, (None, False))
        for name in ("normalized", "special"):
            field.one_of(name, (None, False, True))
        if content in seen:
            raise field.fail("content", f"{content!r:.80} is there twice")
        seen.add(content)
        if ids.setdefault(content, i) != i:
            raise field.fail("id", f"{content!r:.80} is id {ids[content]} in the vocabulary, got {i}")
    return tokens


def _vocabulary(ids: dict[str, int], added: list[dict[str, Any]], model: _Field) -> Vocabulary:
    """Pieces by id with the types that SentencePiece would give them."""
    count = len(set(ids.values()))
    if min(ids.values()) < 0 or max(ids.values()) != count - 1:
        raise model.fail("vocab", f"expected the ids 0..{count - 1} without a gap, got up to {max(ids.values())}")
    types = np.full(count, NORMAL, np.uint8)
    pieces: list[bytes | None] = [None] * count
    for piece, i in ids.items():
        match = BYTE_PIECE.fullmatch(piece)
        if pieces[i] is not None:
            # Gemma 1 and 2 give the tab and its byte piece one id; any other pair is a damaged file.
            first = pieces[i].decode()
            match = match or BYTE_PIECE.fullmatch(first)
            if not match or {piece, first} != {match[0], chr(int(match[1], 16))}:
                raise model.fail("vocab", f"id {i} is given twice: {first!r:.80} and {piece!r:.80}")
            piece = match[0]
        pieces[i] = piece.encode()
        if match:
            types[i] = BYTE
    for token in added:
        types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    unknown = model.value.get("unk_token")
    if not isinstance(unknown, str) or unknown not in ids:
        raise model.fail("unk_token", f"expected a piece of the vocabulary, got {unknown!r:.80}")
    types[ids[unknown]] = UNKNOWN
    _check_bytes(ids, model)
    return Vocabulary(pieces, np.zeros(count, np.float32), types)


def _check_bytes(ids: dict[str, int], model: _Field) -> None:
    """Each byte needs a piece; an ASCII character that is a piece itself (Gemma 1's tab) needs none."""
    for byte in range(256):
        if f"<0x{byte:02X}>" not in ids and not (byte < 128 and chr(byte) in ids):
            raise model.fail("vocab", f"byte_fallback is on, but there is no piece <0x{byte:02X}>")


def _merges(model: _Field, ids: dict[str, int], control: set[str]) -> list[tuple[str, str]]:
    """The merges as pairs, in their order; those that would make a special piece out of text are left out."""
    merges = model.get("merges", list)
    if len(merges) > MAX_MERGES:
        raise model.fail("merges", f"expected at most {MAX_MERGES}, got {len(merges)}")
    out = []
    for n, merge in enumerate(merges):
        try:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            whole = left + right
            known = left in ids and right in ids and whole in ids
        except (TypeError, ValueError):  # not two, or not strings
            known = False
        if not known:
            raise model.fail(f"merges[{n}]", f"expected two pieces whose union is a piece too, got {merge!r:.80}")
        if whole not in control:
            out.append((left, right))
    return out
