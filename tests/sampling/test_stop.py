# SPDX-License-Identifier: Apache-2.0
"""StopChecker: never shows a stop string or part of one, holds nothing else back, whatever the pieces."""

import random

import pytest

from gemma.errors import SamplingError
from gemma.sampling import StopChecker


def run(stops, pieces):
    checker = StopChecker(stops)
    text = "".join(checker.push(piece) for piece in pieces)
    return text + ("" if checker.stopped else checker.flush()), checker.stopped


def naive(stops, text):
    """The definition: cut before the stop string that is complete first; of several, the longest."""
    for end in range(len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            longest = max(done, key=len)
            return text[: end - len(longest)], longest
    return text, None


def pieces_of(text, rng):
    cuts = sorted(rng.sample(range(len(text) + 1), rng.randint(0, min(6, len(text)))))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]


def test_any_cut_gives_the_same_text():
    rng = random.Random(0)
    stopped = 0
    for _ in range(5000):
        text = "".join(rng.choice("ab\nü🙂") for _ in range(rng.randint(0, 14)))
        stops = ["".join(rng.choice("ab\nü🙂") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        expected = naive(stops, text)
        assert run(stops, pieces_of(text, rng)) == expected, (text, stops)
        assert run(stops, list(text)) == expected, (text, stops)
        stopped += expected[1] is not None
    assert 1000 < stopped < 4500  # both outcomes are well covered


def test_only_a_possible_beginning_is_held():
    checker = StopChecker(["<end>"])
    assert checker.push("a <") == "a "
    assert checker.push("en") == ""
    assert checker.push("x") == "<enx"
    assert checker.push("<e<end") == "<e"
    assert checker.push("> more") == "" and checker.stopped == "<end>"
    assert checker.push("more") == "" and checker.flush() == ""


def test_overlap_with_itself():
    assert run(["aab"], ["a", "a", "a", "b"]) == ("a", "aab")


def test_without_stops_everything_passes_at_once():
    checker = StopChecker()
    assert checker.push("abc") == "abc" and checker.flush() == "" and checker.stopped is None


def test_bad_stops():
    with pytest.raises(SamplingError, match="stop"):
        StopChecker([""])
