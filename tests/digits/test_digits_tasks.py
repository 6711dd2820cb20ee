# SPDX-License-Identifier: Apache-2.0
"""Prompts and answers about scenes of digits, and the vocabulary that spells them."""

import random

import pytest
from _digits_tasks import CAPTION, PLURALS, WORDS, answer, caption, prompts, vocabulary

from gemma.tokenizer import Tokenizer
from paligemma.detection import parse_detections

# (digit, (y0, x0, y1, x1)), in reading order
FOUND = [(7, (0, 40, 20, 52)), (2, (8, 2, 30, 16)), (7, (32, 30, 50, 44)), (7, (40, 0, 60, 10))]
NOTHING: list = []


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
    path.write_bytes(vocabulary())
    return Tokenizer.from_file(path)


@pytest.mark.parametrize(
    ("digits", "text"),
    [
        ([7, 7, 2, 7], "three sevens and a two"),
        ([8], "an eight"),
        ([6, 6], "two sixes"),
        ([5, 2], "a two and a five"),
        ([1, 3, 2, 3], "two threes, a one and a two"),
        ([], "nothing"),
    ],
)
def test_captions(digits, text):
    assert caption(digits) == text


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        (CAPTION, "three sevens and a two"),
        ("ocr", "7 2 7 7"),  # by the left edge: 0, 2, 30, 40
        ("count", "four"),
        ("count digits", "four"),
        ("count sevens", "three"),
        ("count eights", "zero"),
        ("answer en how many sevens are there?", "three"),
        ("answer en how many digits are there?", "four"),
        ("answer en is there a two?", "yes"),
        ("answer en is there an eight?", "no"),
        ("answer en what is the largest digit?", "seven"),
        ("answer en what is the smallest digit?", "two"),
        ("answer en what is the leftmost digit?", "seven"),
        ("answer en what is the rightmost digit?", "seven"),
        ("detect eight", ""),
    ],
)
def test_answers(prompt, text):
    assert answer(prompt, FOUND) == text


def test_nothing_to_see():
    assert answer("ocr", NOTHING) == answer("answer en what is the largest digit?", NOTHING) == "nothing"
    assert answer("count", NOTHING) == "zero" and answer("detect digit", NOTHING) == ""


@pytest.mark.parametrize(
    ("prompt", "labels"),
    [
        ("detect seven", ["seven", "seven", "seven"]),
        ("detect seven ; two", ["seven", "two", "seven", "seven"]),
        ("detect digit", ["seven", "two", "seven", "seven"]),
    ],
)
def test_detections_read_back(prompt, labels):
    given = parse_detections(answer(prompt, FOUND), 64, 64)
    wanted = [(WORDS[digit], (x0, y0, x1, y1)) for digit, (y0, x0, y1, x1) in FOUND if WORDS[digit] in labels]
    assert [(d.label, tuple(round(v) for v in d.box)) for d in given] == wanted


def test_every_training_prompt_has_an_answer_in_the_vocabulary(tokenizer):
    rng, unknown = random.Random(0), tokenizer.special.unk
    for _ in range(300):
        for prompt in prompts(FOUND[: rng.randrange(5)], rng, 4):
            ids = tokenizer.encode(prompt) + tokenizer.encode(answer(prompt, FOUND))
            assert unknown not in ids and not any(piece.startswith("<0x") for piece in map(tokenizer.piece, ids))


def test_words_are_one_token_each(tokenizer):
    for word in (*WORDS, *PLURALS):
        assert len(tokenizer.encode(word)) == len(tokenizer.encode(f" {word}")) == 1, word


def test_marks_stand_last_and_other_texts_survive(tokenizer):
    assert tokenizer.id_of("<image>") == tokenizer.vocab_size - 1
    assert tokenizer.id_of("<loc0000>") == tokenizer.vocab_size - 1 - 128 - 1024
    assert tokenizer.id_of("<seg127>") == tokenizer.vocab_size - 2
    for text in ("Größe: 3 µm\n\tend", "seven sevens, eh?", "日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
