# SPDX-License-Identifier: Apache-2.0
"""Vocabularies for the tests of the tokenizer and the chat: a SentencePiece model trained on the spot, and its doubles.

`trained` is the oracle's own file: trained and written by `sentencepiece`, with special tokens where Gemma has them.
`as_json` derives a `tokenizer.json` from pieces, scores and types as Hugging Face's converters do.
"""

from __future__ import annotations

import io
import json
import random

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as pb

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)

_WORDS = "the of and history computing began with invention first computer model answer question table user system"
_WORDS += " water mountain river garden letters numbers sequence 1947 naïve größer été 漢字 東京 привет мир 안녕 مرحبا"
TAGS = ["<table>", "</table>", "<b>", "</b>", "<h1>", "</h1>"]
RUNS = [sign * n for sign, most in (("\n", 4), (SPACE, 5), ("\t", 3)) for n in range(2 if sign == SPACE else 1, most)]
TURNS = {
    2: ["<start_of_turn>", "<end_of_turn>"],
    3: ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"],
    4: ["<|turn>", "<turn|>", "<|image>", "<image|>", "<|image|>"],
}


def trained(version: int = 3, *, extra: list[str] | None = None, newlines: bool = True) -> bytes:
    """The bytes of a `.model`: BPE with byte fallback, the identity normalizer, Gemma's special tokens.

    Args:
      version: of the markers, see `TURNS`. They are user-defined symbols, as in Gemma's own files.
      extra: more user-defined symbols.
      newlines: whether runs of newlines are pieces of their own.
    """
    rng, words = random.Random(3), _WORDS.split()
    lines = [" ".join(rng.choice(words) for _ in range(rng.randint(3, 9))) for _ in range(400)]
    runs = [run for run in RUNS if newlines or "\n" not in run]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=620,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<mask>", "<unused0>", "<unused1>", *TURNS[version], *runs, *TAGS, *(extra or [])],
        minloglevel=2,
    )
    return out.getvalue()


def parsed(data: bytes) -> tuple[list[str], list[float], list[int]]:
    """(pieces, scores, types) of a `.model`, by the official protobuf classes."""
    proto = pb.ModelProto.FromString(data)
    return [p.piece for p in proto.pieces], [p.score for p in proto.pieces], [p.type for p in proto.pieces]


def as_json(pieces: list[str], scores: list[float], types: list[int]) -> dict:
    """The `tokenizer.json` of a vocabulary: every split of a piece into two pieces is a merge, by score."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, score, kind in zip(pieces, scores, types):
        for cut in range(1, len(piece) if kind in (NORMAL, USER) else 0):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-score, ids[left], ids[right], left, right))
    added = [
        dict(id=i, content=p, single_word=False, lstrip=False, rstrip=False, normalized=False, special=kind != USER)
        for i, (p, kind) in enumerate(zip(pieces, types))
        if kind in (CONTROL, UNKNOWN, USER) and SPACE not in p
    ]
    unescape = dict(type="Replace", pattern=dict(String=SPACE), content=" ")
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=added,
        normalizer=dict(type="Replace", pattern=dict(String=" "), content=SPACE),
        pre_tokenizer=dict(type="Split", pattern=dict(String=" "), behavior="MergedWithPrevious", invert=False),
        post_processor=None,
        decoder=dict(type="Sequence", decoders=[unescape, dict(type="ByteFallback"), dict(type="Fuse")]),
        model=dict(
            type="BPE",
            dropout=None,
            unk_token="<unk>",
            continuing_subword_prefix=None,
            end_of_word_suffix=None,
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=False,
            vocab=ids,
            merges=[[left, right] for *_, left, right in sorted(merges)],
        ),
    )


def write_json(path, content: dict) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# --- strings

_PARTS = [" ", "  ", "   ", "     ", "\n", "\n\n", "\n\n\n\n\n", "\t\t", "\r\n", *TAGS, "<br/>", "<b", "table>", "</"]
_PARTS += [
    "😀",
    "👩‍👩‍👧",
    "é",
    "e\u0301",
    "שלום",
    "مرحبا",
    "漢",
    "\u200f",
    "\x00",
    "\x7f",
    "\u3000",
    "<0x41>",
    "<unused",
]
_PARTS += ["<start_of_turn", "＜bos＞", "< bos>", "<|turn", "[multimodal]", "<unusedX>", *_WORDS.split()]
SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>", "<mask>", "<unused1>"]


def string(rng: random.Random, special: list[str] = ()) -> str:
    """A few awkward parts side by side; some of `special` among them."""
    parts = _PARTS + list(special) * 4
    return "".join(rng.choice(parts) + rng.choice(["", "", " "]) for _ in range(rng.randint(1, 12)))
