# SPDX-License-Identifier: Apache-2.0
"""`convert` against hand-written transposes, views where they are possible, and the letters of the alphabet."""

from __future__ import annotations

import doctest
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest

from gemma.errors import ShapeError
from gemma.weights import _axes, convert
from gemma.weights._axes import parse, shape_of, sharding_of
from gemma.weights._rows import Row
from gemma.weights._rows_vision import VISION_LAYER

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs/axes.md"
SIZES = dict(N=4, H=3, D=5, E=12, A=2, U=6, C=3, Y=2, X=7, P=9)


def array(axes: str) -> np.ndarray:
    shape = shape_of(axes, SIZES)
    return np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)


@pytest.mark.parametrize(
    "src, dst, by_hand",
    [
        ("N D H", "(N H) D", lambda w: w.transpose(0, 2, 1).reshape(12, 5)),
        ("(N H) D", "N D H", lambda w: w.reshape(4, 3, 5).transpose(0, 2, 1)),
        ("N H D", "D (N H)", lambda w: w.transpose(2, 0, 1).reshape(5, 12)),
        ("D (N H)", "N H D", lambda w: w.reshape(5, 4, 3).transpose(1, 2, 0)),
        ("D N", "N D", lambda w: w.T),
        ("Y X C E", "E C Y X", lambda w: w.transpose(3, 2, 0, 1)),
        ("1 P E", "P E", lambda w: w[0]),
        ("P E", "1 P E", lambda w: w[None]),
        ("A U", "(A U)", lambda w: w.reshape(12)),
        ("(A U) D", "D A U", lambda w: w.T.reshape(5, 2, 6)),
    ],
)
def test_against_transposes_by_hand(src, dst, by_hand):
    w = array(src)
    got = convert(w, src, dst, SIZES)
    assert np.array_equal(got, by_hand(w))
    assert np.array_equal(convert(got, dst, src, SIZES), w)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.int8, np.float64])
def test_any_dtype_bit_for_bit(dtype):
    w = np.arange(60).astype(dtype).reshape(4, 5, 3)
    there = convert(w, "N D H", "(N H) D", SIZES)
    back = convert(there, "(N H) D", "N D H", SIZES)
    assert there.dtype == w.dtype and back.tobytes() == w.tobytes()


def test_no_copy_where_none_is_needed():
    w = array("(N H) D")
    for dst in ("(N H) D", "N H D", "D N H", "N D H"):
        assert np.shares_memory(convert(w, "(N H) D", dst, SIZES), w)
    assert convert(w, "(N H) D", "(N H) D", SIZES) is w
    w.flags.writeable = False
    assert not convert(w, "(N H) D", "D N H", SIZES).flags.writeable


@pytest.mark.parametrize(
    "shape, src, dst, what",
    [
        ((5, 12), "(N H) D", "N D H", r"axes '\(N H\) D': expected shape \(12, 5\), got \(5, 12\)"),
        ((4, 5, 3), "N D H", "N D", "they hold different letters"),
        ((4, 5, 3), "N D H", "N D H C", "they hold different letters"),
        ((4,), "n", "n", "no size given for n"),
        ((4, 4), "N N", "N N", "expected distinct letters"),
        ((4,), "(N", "(N", "expected distinct letters"),
        ((4,), "N, H", "N, H", "expected distinct letters"),
        ((4,), "Q", "Q", "no size given for Q"),
    ],
)
def test_refusals(shape, src, dst, what):
    with pytest.raises(ShapeError, match=what):
        convert(np.zeros(shape), src, dst, SIZES)


def test_parse_and_sharding():
    assert parse("1 (N H) D") == ((), ("N", "H"), ("D",))
    assert sharding_of("(N H) D") == ("heads", "embed") and sharding_of("H") == (None,)


def every_row() -> list[Row]:
    from gemma.weights import _rows, _rows_newer, _rows_vision

    return [row for module in (_rows, _rows_newer, _rows_vision) for table in vars(module).values() if type(table) is tuple
            for row in table if isinstance(row, Row)]  # fmt: skip


def test_every_letter_is_in_the_alphabet():
    text = PAGE.read_text()
    alphabet = set(re.findall(r"[A-Za-z]", "".join(re.findall(r"^\| ([A-Za-z](?:, [A-Za-z])*) \|", text, re.M))))
    assert {"B", "T", "S", "N", "K", "G", "H", "D", "F", "V"} <= alphabet
    rows = every_row()
    assert len(rows) > 50 and all(row in rows for row in VISION_LAYER)
    used = {letter for row in rows for letter in re.findall(r"[A-Za-z]", row.axes)}
    assert used <= alphabet and set(_axes.SHARDING) <= alphabet


def test_the_example_of_the_page_runs():
    assert doctest.testfile(str(PAGE), module_relative=False).failed == 0
