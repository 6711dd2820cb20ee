# SPDX-License-Identifier: Apache-2.0
"""Single operations against formulas written out in float64: what whole-model logits are too coarse, or too short, for.

The epsilon of a norm hides behind inputs of size one, a rounded position behind short prompts, a rounded embedding
scale behind float32.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gemma import gm

EPS32 = 2.0**-24  # half a unit in the last place of float32, relative


def rope64(x: np.ndarray, positions: np.ndarray, base: float, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Half-split rotary embedding in float64: x [B, T, N, H], positions [B, T]; also the angles [B, T, 1, H/2]."""
    half = x.shape[-1] // 2
    angle = positions[..., None, None] / base ** (np.arange(half) / half) / scale
    first, second = x[..., :half].astype(np.float64), x[..., half:].astype(np.float64)
    sin, cos = np.sin(angle), np.cos(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1), angle


@pytest.mark.parametrize(("base", "scale"), [(1e4, 1.0), (1e6, 1.0), (1e6, 8.0)])
@pytest.mark.parametrize("last", [300, 30_000, 131_071])
def test_rope_at_long_positions(base, scale, last):
    rng = np.random.default_rng(0)
    positions = np.array([[0, 1, 255, 256, 257, last - 1, last]])
    x = rng.standard_normal((1, positions.shape[1], 2, 256)).astype(np.float32)
    ours = gm.math.apply_rope(
        jnp.asarray(x), jnp.asarray(positions, jnp.int32), base_frequency=base, scale_factor=scale
    )
    expected, angle = rope64(x, positions, base, scale)
    # An angle in float32 carries the roundings of the power, the division and the scale: 4 half-units, relative. A
    # rotation by a wrong angle moves a pair by its length times the error; the products add 4 half-units of the length.
    length = np.hypot(x[..., :128], x[..., 128:])
    bound = length * (4 * EPS32 * angle + 4 * EPS32)
    assert (np.abs(np.asarray(ours, np.float64) - expected) <= np.concatenate([bound, bound], -1)).all()
    coarse, _ = rope64(x, positions.astype(ml_dtypes.bfloat16).astype(np.float64), base, scale)
    assert (np.abs(coarse - expected) > np.concatenate([bound, bound], -1)).any()  # bfloat16 positions would show


def test_rope_keeps_float32_angles_under_bfloat16():
    x = np.ones((1, 2, 1, 256), ml_dtypes.bfloat16)
    positions = np.array([[256, 257]])  # one bfloat16 number
    ours = gm.math.apply_rope(jnp.asarray(x), jnp.asarray(positions, jnp.int32), base_frequency=10_000)
    assert ours.dtype == jnp.bfloat16
    expected, _ = rope64(x.astype(np.float64), positions, 1e4, 1.0)
    # one rounding to 8 bits of values up to sqrt(2), and one of each factor
    assert np.abs(np.asarray(ours, np.float64) - expected).max() <= 1.5 * 2.0**-8
    assert not np.array_equal(np.asarray(ours[:, 0]), np.asarray(ours[:, 1]))


def rms64(x: np.ndarray, weight: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (1 + weight.astype(np.float64))


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
def test_norm_epsilon_shows_on_small_inputs(size):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((3, 72)) * size).astype(np.float32)
    weight = rng.standard_normal(72).astype(np.float32)
    ours = np.asarray(gm.nn.RMSNorm().apply({"params": {"scale": jnp.asarray(weight)}}, jnp.asarray(x)), np.float64)
    expected = rms64(x, weight)
    assert np.abs(ours - expected).max() <= 1e-6 * np.abs(expected).max()  # a mean of 72 and six roundings in float32
    if size < 1:
        assert np.abs(rms64(x, weight, 1e-5) - expected).max() > 0.1 * np.abs(expected).max()


def test_norm_rounds_once():
    """bfloat16 in, float32 inside, one rounding at the end: the weight's 1e-3 would vanish from 1 + w in bfloat16."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((16, 72)).astype(ml_dtypes.bfloat16)
    weight = (rng.standard_normal(72) * 3e-3).astype(ml_dtypes.bfloat16)
    ours = gm.nn.RMSNorm().apply({"params": {"scale": jnp.asarray(weight)}}, jnp.asarray(x))
    assert ours.dtype == jnp.bfloat16
    expected = rms64(x, weight)
    unit = 2.0 ** (np.floor(np.log2(np.abs(expected))) - 7)  # the spacing of bfloat16 there
    assert (np.abs(np.asarray(ours, np.float64) - expected) <= 0.51 * unit).all()


SCALES = {640: 25.25, 1152: 34.0, 2048: 45.25, 2304: 48.0, 2560: 50.5, 3072: 55.5, 3584: 59.75, 3840: 62.0}
SCALES |= {4608: 68.0, 5376: 73.5}  # square roots of the published widths, rounded to bfloat16


@pytest.mark.parametrize(("width", "scale"), SCALES.items())
def test_embedding_scale(width, scale):
    embedder = gm.nn.Embedder(vocab_size=4, embed_dim=width)
    for dtype, factor in ((jnp.bfloat16, scale), (jnp.float32, np.float32(np.sqrt(width)))):
        params = {"input_embedding": jnp.ones((4, width), dtype)}
        out = embedder.apply({"params": params}, jnp.asarray([[1, 3]], jnp.int32), method="encode")
        assert out.dtype == dtype
        assert (np.asarray(out, np.float64) == np.float64(factor)).all()


def test_the_gate_is_the_tanh_gelu():
    x = 2.699  # where the two forms differ most
    layer = gm.nn.FeedForward(features=1, hidden_dim=1, transpose_gating_einsum=False)
    params = {"gating_einsum": jnp.ones((2, 1, 1)), "linear": jnp.ones((1, 1))}
    ours = float(layer.apply({"params": params}, jnp.full((1, 1, 1), x))[0, 0, 0])
    tanh = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    assert abs(ours - tanh * x) < 1e-6 * x * x  # a handful of roundings of numbers up to x * x
    assert abs(tanh - 0.5 * x * (1 + math.erf(x / math.sqrt(2)))) > 4e-4  # the other form would show


@pytest.mark.parametrize(("kind", "expected"), [("LOCAL_SLIDING", [1, 2, 3, 4, 4, 4, 4]), ("GLOBAL", range(1, 8))])
def test_a_window_of_four_holds_four_keys(kind, expected):
    """Queries of zero attend evenly to whatever they may see: count the keys with weight."""
    layer = gm.nn.Attention(
        num_heads=2,
        num_kv_heads=1,
        features=8,
        head_dim=4,
        attn_type=gm.nn.AttentionType[kind],
        query_pre_attn_scalar=0.5,
        sliding_window_size=4,
    )
    params = {
        "q_einsum": {"w": jnp.zeros((2, 8, 4))},
        "kv_einsum": {"w": jnp.ones((2, 1, 8, 4))},
        "attn_vec_einsum": {"w": jnp.ones((2, 4, 8))},
    }
    causal = jnp.tril(jnp.ones((1, 7, 7), bool))
    _, state = layer.apply(
        {"params": params},
        jnp.ones((1, 7, 8)),
        jnp.arange(7, dtype=jnp.int32)[None],
        None,
        causal,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    weights = np.asarray(state["intermediates"]["attention_weights"]["__call__"][0])  # [B, T, N, S]
    assert weights.shape == (1, 7, 2, 7)
    assert (weights[0] > 0).sum(-1).tolist() == [[n, n] for n in expected]
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
