# SPDX-License-Identifier: Apache-2.0
"""Attention masks, compared literally."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from gemma.gm.nn import _plan
from gemma.gm.utils import _attention_mask


def drawing(mask) -> list[str]:
    return ["".join(".1"[int(cell)] for cell in row) for row in np.asarray(mask)]


def bits(text: str):
    return jnp.asarray([[c == "1" for c in text]])


def test_causal_with_padding_on_either_side():
    assert drawing(_attention_mask.make_causal_mask(bits("1110"))[0]) == ["1...", "11..", "111.", "111."]
    assert drawing(_attention_mask.make_causal_mask(bits("0111"))[0]) == ["....", ".1..", ".11.", ".111"]


def test_images_see_themselves_and_not_each_other():
    mask = _attention_mask.make_causal_bidirectional_attention_mask(
        bits("1111111100"), bidirectional_mask=bits("0011011000")
    )
    assert drawing(mask[0]) == [
        "1.........",
        "11........",
        "1111......",
        "1111......",
        "11111.....",
        "1111111...",
        "1111111...",
        "11111111..",
        "11111111..",
        "11111111..",
    ]


def test_one_row_does_not_know_the_other():
    valid = jnp.ones((2, 4), bool)
    images = jnp.asarray([[0, 1, 1, 0], [0, 0, 1, 1]], bool)
    mask = _attention_mask.make_causal_bidirectional_attention_mask(valid, bidirectional_mask=images)
    assert drawing(mask[0]) == ["1...", "111.", "111.", "1111"]
    assert drawing(mask[1]) == ["1...", "11..", "1111", "1111"]


def test_a_window_of_four_holds_four_keys():
    positions = jnp.arange(7)[None]
    mask = _plan.window_mask(positions, positions, 4) & _attention_mask.make_causal_mask(bits("1111111"))
    assert list(np.asarray(mask[0]).sum(-1)) == [1, 2, 3, 4, 4, 4, 4]
    assert drawing(mask[0])[-1] == "...1111"


def test_a_window_is_on_positions_and_not_on_indices():
    queries, keys = jnp.asarray([[10]]), jnp.asarray([[7, 9, 3, 8, 10, 6]])
    assert drawing(_plan.window_mask(queries, keys, 3)[0]) == [".1.11."]


@pytest.mark.parametrize(("window", "reach"), [(6, 3), (5, 2), (512, 256)])
def test_a_bidirectional_window_reaches_half_of_it_each_way(window, reach):
    keys = jnp.arange(2 * window)[None]
    mask = np.asarray(_plan.window_mask(jnp.asarray([[window]]), keys, window, bidirectional=True))[0, 0]
    assert list(np.where(mask)[0]) == list(range(window - reach, window + reach + 1))
