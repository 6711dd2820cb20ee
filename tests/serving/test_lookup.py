# SPDX-License-Identifier: Apache-2.0
"""Prompt lookup: what is guessed, when nothing is, and how guesses adapt."""

from gemma.serving._lookup import Lookup


def after(ids, most=8, room=100):
    lookup = Lookup(most)
    lookup.extend(ids)
    return lookup.draft(room)


def test_what_followed_the_same_words():
    assert after([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]) == [4, 5]
    assert after([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3], room=1) == [4]
    assert after([1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3], most=1) == [4]


def test_nothing_alike():
    assert after([1, 2, 3, 4, 5, 6]) == after([]) == after([5]) == after([5, 5]) == []
    assert after([1, 2, 3, 4, 1, 2]) == []  # two words are not enough
    assert after([1, 2, 3, 4, 1, 2, 3], room=0) == []


def test_a_loop_is_its_own_guess():
    assert after([7, 7, 7, 7]) == [7]
    assert after([1, 2, 1, 2, 1, 2]) == [1, 2]


def test_the_longest_match_wins_and_of_equals_the_newest():
    assert after([9, 5, 1, 2, 30, 8, 5, 1, 2, 40, 7, 9, 5, 1, 2])[0] == 30
    assert after([8, 5, 1, 2, 30, 8, 5, 1, 2, 40, 7, 9, 5, 1, 2])[0] == 40


def test_guesses_grow_while_they_are_right_and_shrink():
    lookup = Lookup(8)
    lookup.extend([*range(1, 30), 1, 2, 3, 4, 5, 6, 7, 8])
    for size in (2, 4, 8, 8):
        assert len(lookup.draft(100)) == size
        lookup.learn(size, size)
    lookup.learn(8, 2)
    assert len(lookup.draft(100)) == 3
    lookup.learn(3, 0)
    assert len(lookup.draft(100)) == 1


def test_wrong_guesses_ask_for_longer_matches():
    lookup = Lookup(8)
    lookup.extend([1, 2, 3, 9, 8, 7, 1, 2, 3])
    assert lookup.draft(100)
    for _ in range(9):
        lookup.learn(1, 0)
    assert lookup.draft(100) == []
    lookup.extend([9, 8, 7, 1, 2, 3])
    assert lookup.draft(100) == [9]  # six words agree
    for _ in range(4):
        lookup.learn(1, 1)
    lookup.extend([50, 9, 8])
    assert lookup.draft(100)[0] == 7  # two are enough again


def test_few_places_are_compared():
    lookup = Lookup(4)
    lookup.extend([5, 6] * 5000)
    assert lookup.draft(4) and max(map(len, lookup._places.values())) <= 8
