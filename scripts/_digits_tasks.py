# SPDX-License-Identifier: Apache-2.0
"""What the small PaliGemma is asked about a scene and what it should answer, and the vocabulary these texts need.

    caption en                                three sevens and a two        the larger groups first, then by digit
    ocr                                       7 2 7 7                       from left to right
    detect seven | detect seven ; two         <loc..>x4 seven ; ...         in reading order; nothing where there is none
    detect digit                              <loc..>x4 seven ; <loc..>x4 two ; ...
    count | count digits | count sevens       four | four | three
    answer en how many sevens are there?      three
    answer en is there a seven?               yes
    answer en what is the largest digit?      seven                         also smallest, leftmost, rightmost

Scenes come from `_digits_scenes.py`.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
from _digits_scenes import SIDE

from gemma._sentencepiece_proto import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED, Vocabulary, write_model
from gemma.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig
from paligemma.detection import LOC_BINS, SEG_CODES, encode_box

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = tuple(word + ("es" if word == "six" else "s") for word in WORDS)
EXTREMES = ("largest", "smallest", "leftmost", "rightmost")
CAPTION = "caption en"
PATCH = 8  # pixels of a patch, square

Found = Sequence[tuple[int, tuple[int, int, int, int]]]  # what Scenes.digits returns: digit, (y0, x0, y1, x1)


# --- answers


def caption(digits: Sequence[int]) -> str:
    """The caption of a scene with these digits."""
    groups = sorted(Counter(digits).items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{_article(d)} {WORDS[d]}" if count == 1 else f"{WORDS[count]} {PLURALS[d]}" for d, count in groups]
    if not parts:
        return "nothing"
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _article(digit: int) -> str:
    return "an" if digit == 8 else "a"


def detections(found: Found, wanted: Sequence[int] = range(10)) -> str:
    """The boxes of the wanted digits, with their labels."""
    parts = [
        f"{encode_box((x0, y0, x1, y1), SIDE, SIDE)} {WORDS[digit]}"
        for digit, (y0, x0, y1, x1) in found
        if digit in wanted
    ]
    return " ; ".join(parts)


def answer(prompt: str, found: Found) -> str:
    """The right answer to a prompt about a scene."""
    digits = [digit for digit, _ in found]
    words = prompt.rstrip("?").split()
    if prompt == CAPTION:
        return caption(digits)
    if words[0] == "ocr":
        return " ".join(str(digit) for digit, _ in sorted(found, key=lambda item: item[1][1])) or "nothing"
    if words[0] == "detect":
        wanted = range(10) if words[1] == "digit" else [WORDS.index(word) for word in words[1:] if word != ";"]
        return detections(found, wanted)
    if words[0] == "count" or words[2:4] == ["how", "many"]:
        what = words[-1] if words[0] == "count" else words[4]
        return WORDS[len(digits) if what in ("count", "digits") else digits.count(PLURALS.index(what))]
    if words[2:4] == ["is", "there"]:
        return "yes" if WORDS.index(words[-1]) in digits else "no"
    if not found:
        return "nothing"
    left_to_right = [digit for digit, _ in sorted(found, key=lambda item: item[1][1])]
    picks = dict(largest=max(digits), smallest=min(digits), leftmost=left_to_right[0], rightmost=left_to_right[-1])
    return WORDS[picks[words[-2]]]


def prompts(found: Found, rng: random.Random, number: int) -> list[str]:
    """`number` prompts to train on: the caption, then a mixture of the others; digits that are there come up more."""
    asked = [CAPTION]
    present = [digit for digit, _ in found]
    for _ in range(number - 1):
        digit = rng.choice(present) if present and rng.random() < 0.7 else rng.randrange(10)
        other = rng.choice(present) if present and rng.random() < 0.7 else rng.randrange(10)
        pair = f"{WORDS[digit]} ; {WORDS[other]}" if other != digit else WORDS[digit]
        choices = (
            (30, f"detect {WORDS[digit]}"),
            (8, f"detect {pair}"),
            (20, "detect digit"),
            (10, f"count {PLURALS[digit]}"),
            (2, "count"),
            (2, "count digits"),
            (10, "ocr"),
            (5, f"answer en how many {PLURALS[digit]} are there?"),
            (2, "answer en how many digits are there?"),
            (5, f"answer en is there {_article(digit)} {WORDS[digit]}?"),
            (6, f"answer en what is the {rng.choice(EXTREMES)} digit?"),
        )
        asked.append(rng.choices([text for _, text in choices], [weight for weight, _ in choices])[0])
    return asked


# --- the vocabulary

_OTHERS = """caption cap describe answer question ocr detect segment count en a an and the how many are is there what digit
digits nothing none yes no number which"""
_WORDS = (*WORDS, *PLURALS, *EXTREMES, *_OTHERS.split(), *"0123456789,;?")
_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:?!'\"()-+*/=<>_#&%"
_CONTROLS = ("<pad>", "<eos>", "<bos>")


def _merges(words: Sequence[str]) -> list[str]:
    """Byte-pair merges, the most frequent pair first, until every word and every word behind a space is one piece."""
    texts = [list(word) for word in words] + [[SPACE, *word] for word in words]
    merged: list[str] = []
    while True:
        pairs = Counter(pair for text in texts for pair in itertools.pairwise(text))
        if not pairs:
            return merged
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged.append("".join(best))
        for text in texts:
            at = 0
            while at < len(text) - 1:
                if (text[at], text[at + 1]) == best:
                    text[at : at + 2] = [merged[-1]]
                at += 1


def vocabulary() -> bytes:
    """The tokenizer.model: control pieces, newline, bytes, merges, characters, then locations, segments, `<image>`."""
    merges = list(dict.fromkeys(_merges(_WORDS)))
    entries: list[tuple[str, float, int]] = [(name, 0.0, CONTROL) for name in _CONTROLS] + [("<unk>", 0.0, UNKNOWN)]
    entries += [("\n", 0.0, USER_DEFINED)]
    entries += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    plain = merges + [c for c in SPACE + _CHARACTERS if c not in merges]
    entries += [(piece, -float(rank), NORMAL) for rank, piece in enumerate(plain)]
    marks = [f"<loc{n:04d}>" for n in range(LOC_BINS)] + [f"<seg{n:03d}>" for n in range(SEG_CODES)] + ["<image>"]
    entries += [(mark, 0.0, USER_DEFINED) for mark in marks]
    pieces, scores, types = zip(*entries)
    table = Vocabulary([p.encode() for p in pieces], np.array(scores, np.float32), np.array(types, np.uint8))
    return write_model(table, dict(pad=0, eos=1, bos=2, unk=3))


def model_config(pieces: int) -> PaliGemmaConfig:
    """The model's sizes, for a vocabulary of this many pieces, `<image>` being the last."""
    text = GemmaConfig(
        vocab_size=pieces,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
    )
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=128,
    )
    return PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=pieces - 1,
        vocab_size=pieces,
        projection_dim=128,
        hidden_size=128,
        tokenizer_vocab_size=pieces - 1,
    )
