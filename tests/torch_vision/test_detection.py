# SPDX-License-Identifier: Apache-2.0
"""Boxes in text: order, scale, several objects, labels, scores, malformed output, targets, drawing."""

import math
import random

import numpy as np
import pytest

from gemma.errors import PromptError, ShapeError
from paligemma.detection import (
    Detection,
    draw,
    encode_box,
    encode_codes,
    encode_detections,
    intersection_over_union,
    parse_detections,
)

BOX = "<loc0100><loc0200><loc0300><loc0400>"  # y0 x0 y1 x1
SEG = "".join(f"<seg{n:03d}>" for n in range(16))


def boxes(text, width=1023, height=1023):
    return [(d.label, tuple(round(v) for v in d.box)) for d in parse_detections(text, width, height)]


def test_order_is_y_x_and_the_scale_is_the_pictures():
    [found] = parse_detections(f"{BOX} cat", 640, 480)
    expected = (200 / 1023 * 640, 100 / 1023 * 480, 400 / 1023 * 640, 300 / 1023 * 480)
    assert found.label == "cat" and found.score is None and found.mask is None and found.codes is None
    assert np.allclose(found.box, expected)


def test_the_last_bin_is_the_edge_of_the_picture():
    [found] = parse_detections("<loc0000><loc0000><loc1023><loc1023> all", 640, 480)
    assert found.box == (0, 0, 640, 480)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (f"{BOX} cat ; {BOX} dog", ["cat", "dog"]),
        (f"{BOX} cat;{BOX} dog<eos>", ["cat", "dog"]),
        (f"{BOX}{BOX} cat", ["cat", "cat"]),  # no label between: both are cats
        (f"{BOX} cat ; {BOX}", ["cat", "cat"]),
        (f"cat {BOX} ; big dog {BOX}", ["cat", "big dog"]),  # labels before
        (f"{BOX}", [""]),
        (f"the answer: {BOX} red car ; and more\nlast line", ["red car"]),
        (f"{BOX} cat ; {BOX} cat", ["cat", "cat"]),  # identical boxes stay: the caller decides
        (f"{BOX} cat\n{BOX} dog", ["cat", "dog"]),
        ("no objects at all", []),
        ("", []),
    ],
)
def test_several_objects(text, labels):
    found = boxes(text)
    assert [label for label, _ in found] == labels
    assert all(box == (200, 100, 400, 300) for _, box in found)


@pytest.mark.parametrize(
    "text",
    [
        "<loc0100><loc0200><loc0300> cat",  # three
        "<loc0300><loc0200><loc0100><loc0400> cat",  # y1 < y0
        "<loc0100><loc0200><loc0300><loc0200> cat",  # no width
        "<loc0100><loc0200> <loc0300><loc0400> cat",  # cut by a blank
        "<loc9999><loc0200><loc0300><loc0400> cat",  # no such token
        "<loc100><loc200><loc300><loc400> cat",
        "loc0100 loc0200 loc0300 loc0400",
        SEG,
    ],
)
def test_what_is_no_box_is_passed_over(text):
    assert boxes(text) == []
    assert boxes(f"{text} ; {BOX} dog")[-1] == ("dog", (200, 100, 400, 300))


def test_surplus_locations_are_dropped():
    assert boxes(f"{BOX}<loc0001> cat ; {BOX} dog") == [("cat", (200, 100, 400, 300)), ("dog", (200, 100, 400, 300))]


def test_outlines_need_exactly_sixteen_codes():
    whole, short, long = parse_detections(f"{BOX}{SEG} cat ; {BOX}{SEG[:-8]} dog ; {BOX}{SEG}<seg001> cow", 100, 100)
    assert whole.codes == tuple(range(16)) and short.codes is None and long.codes is None
    assert (whole.label, short.label, long.label) == ("cat", "dog", "cow")
    first, second = parse_detections(f"{BOX}{SEG}{BOX}{SEG} cat", 100, 100)
    assert first.codes == second.codes == tuple(range(16))


def test_scores_are_the_mean_probability_of_the_box():
    pieces = ["<loc0100>", "<loc0200>", "<loc0300>", "<loc0400>", " cat", " ;", " "]
    pieces += ["<loc0001>", "<loc0002>", "<loc0003>", "<loc0004>", " dog"]
    chances = [0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.1, 0.2]
    logprobs = [math.log(p) for p in chances]
    first, second = parse_detections("".join(pieces), 100, 100, pieces=pieces, logprobs=logprobs)
    assert first.score == pytest.approx(0.75) and second.score == pytest.approx(0.4)
    with pytest.raises(ShapeError, match="one of each per token"):
        parse_detections("".join(pieces), 100, 100, pieces=pieces, logprobs=logprobs[:-1])
    with pytest.raises(ShapeError, match="must be the text"):
        parse_detections("else", 100, 100, pieces=pieces, logprobs=logprobs)


def test_time_is_linear():
    """A quadratic parser would need hours for this: half a million characters of worst cases."""
    for text in ("<loc0100>" * 50_000, "<loc01" * 75_000, f"{BOX} ; " * 10_000, SEG * 3000, ";" * 500_000):
        parse_detections(text, 10, 10)


def test_random_text_never_fails():
    rng = random.Random(0)
    parts = [BOX, SEG, "<loc", "<loc0001>", "<seg127>", "<seg128>", ";", " ; ", "\n", "cat", ">", "<eos>", "é😀", " "]
    for _ in range(500):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(0, 12)))
        for found in parse_detections(text, 37, 91):
            x0, y0, x1, y1 = found.box
            assert 0 <= x0 < x1 <= 37 and 0 <= y0 < y1 <= 91


def test_bad_sizes():
    with pytest.raises(ShapeError, match="at least 1 x 1"):
        parse_detections(BOX, 0, 10)


def test_targets_round_trip():
    rng = random.Random(1)
    for _ in range(200):
        width, height = rng.randint(8, 2000), rng.randint(8, 2000)
        x0, x1 = sorted(rng.sample(range(width + 1), 2))
        y0, y1 = sorted(rng.sample(range(height + 1), 2))
        found = parse_detections(encode_box((x0, y0, x1, y1), width, height), width, height)
        if not found:  # thinner than half a bin
            assert min((x1 - x0) / width, (y1 - y0) / height) < 1 / 1023
            continue
        assert np.allclose(found[0].box, (x0, y0, x1, y1), atol=max(width, height) / 1023 / 2 + 1e-6)


def test_targets_are_the_trained_form():
    objects = [Detection("cat", (20, 10, 40, 30)), Detection("dog", (0, 0, 100, 50), codes=tuple(range(16)))]
    text = encode_detections(objects, 100, 50)
    assert text == f"<loc0205><loc0205><loc0614><loc0409> cat ; <loc0000><loc0000><loc1023><loc1023>{SEG} dog"
    assert [d.label for d in parse_detections(text, 100, 50)] == ["cat", "dog"]
    assert encode_box((-5, -5, 500, 500), 100, 50) == "<loc0000><loc0000><loc1023><loc1023>"


@pytest.mark.parametrize("box", [(1, 1, 1, 5), (5, 1, 1, 5), (1, 2, 3), (1, math.nan, 3, 4)])
def test_bad_targets(box):
    with pytest.raises(PromptError, match="x0 < x1"):
        encode_box(box, 10, 10)


def test_bad_codes_and_labels():
    with pytest.raises(PromptError, match="16 numbers"):
        encode_codes([1] * 15)
    with pytest.raises(PromptError, match="16 numbers"):
        encode_codes([128] * 16)
    with pytest.raises(PromptError, match="no ';'"):
        encode_detections([Detection("a;b", (0, 0, 1, 1))], 10, 10)


def test_intersection_over_union():
    assert intersection_over_union((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert intersection_over_union((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert intersection_over_union((0, 0, 2, 2), (2, 0, 3, 2)) == 0
    assert intersection_over_union((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_drawing():
    image = np.full((60, 90, 3), 255, np.uint8)
    mask = np.zeros((60, 90), bool)
    mask[30:40, 30:60] = True
    objects = [
        Detection("cat", (20, 20, 80, 50), 0.93, mask),
        Detection("größer 漢字", (-10, -10, 500, 500)),
        Detection("cat", (5, 5, 6, 6)),
    ]
    drawn = draw(image, objects)
    assert drawn.shape == image.shape and drawn.dtype == np.uint8 and (image == 255).all()
    assert tuple(drawn[50, 50]) == tuple(drawn[35, 80]) == (230, 25, 75)  # the lower and right edge of the first
    inside = drawn[35, 45].astype(int)
    assert abs(inside - np.array([(255 + color) // 2 for color in (230, 25, 75)])).max() <= 1
    assert tuple(drawn[59, 45]) != (255, 255, 255)  # the second is cut to the picture
    assert (draw(image, []) == image).all()
    with pytest.raises(ShapeError, match="mask of 'cat'"):
        draw(image, [Detection("cat", (0, 0, 5, 5), mask=mask[:10])])
