# SPDX-License-Identifier: Apache-2.0
"""Scenes of digits: the split, what is drawn where, and that everything follows from the seed."""

import numpy as np
import pytest
from _digits_scenes import INK, SIDE, load_split, make_scenes

pytest.importorskip("sklearn")


def scenes(split="test", count=24, seed=(3,), **options):
    return make_scenes(split, np.arange(count) % 5, seed, **(dict(augment=False) | options))


def test_no_digit_is_in_two_splits():
    parts = {name: load_split(name) for name in ("train", "val", "test")}
    rows = np.concatenate([part.index for part in parts.values()])
    assert len(rows) == len(set(rows.tolist())) == 1797
    assert [len(part.labels) for part in parts.values()] == [1258, 180, 359]
    assert all(set(part.labels.tolist()) == set(range(10)) for part in parts.values())


def test_test_scenes_hold_test_digits_only():
    made = scenes()
    own = dict(zip(load_split("test").index.tolist(), load_split("test").labels.tolist()))
    used = made.labels >= 0
    assert used.any() and [own[row] for row in made.sources[used].tolist()] == made.labels[used].tolist()
    assert (made.sources[~used] == -1).all()


def test_the_seed_decides_everything():
    one, two, other = scenes(augment=True), scenes(augment=True), scenes(augment=True, seed=(4,))
    assert all(
        np.array_equal(getattr(one, name), getattr(two, name)) for name in ("images", "labels", "boxes", "sources")
    )
    assert not np.array_equal(one.images, other.images)


def test_boxes_lie_inside_and_apart():
    made = scenes(count=60, augment=True)
    for b in range(60):
        boxes = [box for _, box in made.digits(b)]
        assert all(0 <= y0 < y1 <= SIDE and 0 <= x0 < x1 <= SIDE for y0, x0, y1, x1 in boxes)
        for i, one in enumerate(boxes):
            for other in boxes[:i]:
                assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_boxes_are_tight_around_the_ink():
    """Beside a box there is nothing of its digit: its ink is far lighter than the ground just outside."""
    made, margin = scenes(count=100), []
    for b in range(100):
        for _, (y0, x0, y1, x1) in made.digits(b):
            grey = made.images[b].astype(float).mean(-1)
            inside = grey[y0:y1, x0:x1]
            ground = np.median(inside[inside < np.quantile(inside, 0.4)])
            rows = [grey[y0, x0:x1].max(), grey[y1 - 1, x0:x1].max(), grey[y0:y1, x0].max(), grey[y0:y1, x1 - 1].max()]
            margin.append(min(rows) - ground)
    # The dimmest ink (0.6) against the lightest ground (0.32), at the threshold, is 25 of 255; noise blurs single ones.
    assert np.quantile(margin, 0.05) > 255 * INK * (0.6 - 0.32)


def test_reading_order():
    made = scenes(count=40)
    for b in range(40):
        upper = [box[:2] for _, box in made.digits(b)]
        assert upper == sorted(upper)
