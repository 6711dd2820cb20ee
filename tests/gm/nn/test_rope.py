# SPDX-License-Identifier: Apache-2.0
"""Rotary angles: their order of operations, long positions, and the rotation itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma import gm
from gemma.gm.math import _misc, _pos_utils, _positional_embeddings

PUBLISHED = pytest.mark.parametrize(("base", "scale"), [(1e4, 1.0), (1e6, 1.0), (1e6, 8.0)])


def test_official_example():
    inputs, positions = jnp.ones((2, 1, 2, 4)), jnp.asarray([[1], [0]])
    row = [-0.30116868, 0.89517075, 1.3817732, 1.0948375]
    expected = np.asarray([[[row, row]], np.ones((1, 2, 4))])
    np.testing.assert_array_almost_equal(gm.math.apply_rope(inputs, positions, base_frequency=100), expected)


@PUBLISHED
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "compiled"])
def test_angles_are_float32_divisions_in_order(base, scale, jit):
    """Bit-equal to numpy's position / base**(2j/H) / scale; with reciprocals, angles near 30,000 move by 2e-3."""
    H, positions = 64, np.asarray([[0, 1, 255, 256, 257, 4095, 30_000, 131_071]], np.int32)
    wrap = jax.jit if jit else lambda f: f
    angles = wrap(lambda p: _positional_embeddings.rope_angles(p, head_dim=H, base=base, scale=scale))
    table = wrap(lambda p: _positional_embeddings.rope_table(p, head_dim=H, base_frequency=base, scale_factor=scale))
    timescale = (np.float64(base) ** (2 * np.arange(H // 2) / H)).astype(np.float32)
    expected = positions[..., None].astype(np.float32) / timescale / np.float32(scale)
    np.testing.assert_array_equal(angles(jnp.asarray(positions)), expected)
    sin, cos = table(jnp.asarray(positions))
    np.testing.assert_allclose(sin, np.sin(expected.astype(np.float64)), rtol=0, atol=1e-7)
    np.testing.assert_allclose(cos, np.cos(expected.astype(np.float64)), rtol=0, atol=1e-7)


@PUBLISHED
def test_position_30000_against_a_float64_table(base, scale):
    H = 256
    positions = jnp.asarray([[29_999, 30_000]])
    sin, _ = _positional_embeddings.rope_table(positions, head_dim=H, base_frequency=base, scale_factor=scale)
    exact = np.asarray(positions)[..., None] / base ** (2 * np.arange(H // 2) / H) / scale
    # Three roundings of an angle below 30,000, each at most half a unit in its last place (2^-10).
    np.testing.assert_allclose(sin, np.sin(exact), rtol=0, atol=1.5 * 2.0**-9)
    small = exact < 8  # where the angle is small, so is its rounding
    np.testing.assert_allclose(np.asarray(sin)[small], np.sin(exact[small]), rtol=0, atol=2e-6)


def test_neighbouring_positions_differ_in_a_bfloat16_network():
    x = jnp.ones((1, 2, 1, 8), jnp.bfloat16)
    out = gm.math.apply_rope(x, jnp.asarray([[256, 257]]), base_frequency=1e4)
    assert out.dtype == jnp.bfloat16
    assert not np.array_equal(out[0, 0], out[0, 1])  # as bfloat16 both positions would be 256


def test_dot_products_depend_on_the_distance_only():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def at(x, p):
        return np.asarray(gm.math.apply_rope(jnp.asarray(x), jnp.asarray([[p]]), base_frequency=1e4))

    def dot(a, b):
        return float(np.sum(at(q, a) * at(k, b)))

    assert dot(7, 3) == pytest.approx(dot(104, 100), abs=1e-4)
    assert abs(dot(7, 3) - dot(7, 2)) > 1e-3


def test_share_of_rotating_pairs():
    x = np.random.default_rng(0).normal(size=(1, 1, 1, 16)).astype(np.float32)
    full = gm.math.apply_rope(jnp.asarray(x), jnp.asarray([[5]]), base_frequency=1e4)
    part = gm.math.apply_rope(jnp.asarray(x), jnp.asarray([[5]]), base_frequency=1e4, rope_proportion=0.25)
    turned = np.asarray([0, 1, 8, 9])  # pairs (0, 8) and (1, 9)
    still = np.setdiff1d(np.arange(16), turned)
    np.testing.assert_array_equal(np.asarray(part)[..., turned], np.asarray(full)[..., turned])
    np.testing.assert_array_equal(np.asarray(part)[..., still], x[..., still])


def test_a_scale_below_one_is_refused():
    with pytest.raises(ValueError, match=r"scale_factor must be >= 1.0, got 0.5"):
        gm.math.apply_rope(jnp.ones((1, 1, 1, 4)), jnp.zeros((1, 1), jnp.int32), base_frequency=10, scale_factor=0.5)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([1, 1, 1, 1], [0, 1, 2, 3]),
        ([0, 0, 1, 1, 1], [0, 0, 0, 1, 2]),
        ([0, 0, 0], [0, 0, 0]),
        ([[1, 1, 1, 0], [0, 1, 1, 1]], [[0, 1, 2, 2], [0, 0, 1, 2]]),
    ],
)
def test_positions_from_mask(mask, expected):
    positions = _pos_utils.build_positions_from_mask(jnp.asarray(mask, bool))
    assert positions.dtype == jnp.int32
    np.testing.assert_array_equal(positions, expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([], ()), ([1], ((1, 1),)), ([1, 1, 2, 3, 1, 1], ((1, 2), (2, 1), (3, 1), (1, 2)))],
)
def test_count_consecutive(values, expected):
    assert gm.math.count_consecutive(values) == expected
    assert _misc.count_consecutive(np.asarray(values)) == expected
