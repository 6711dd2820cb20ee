# SPDX-License-Identifier: Apache-2.0
"""Norms, rotary embedding, GELU, soft-cap, exp, tanh and cache stores of every instruction set against the scalar
reference and numpy, over odd sizes and misaligned memory.

Tolerances: a float32 operation is off by EPS of its result; each test counts its operations.
"""

import float_kernels as fk
import ml_dtypes
import numpy as np
import pytest
from float_kernels import EPS, SIZES, Kernels, ulps


@pytest.fixture(scope="module", params=fk.instruction_sets())
def kernels(request):
    return Kernels(request.param)


@pytest.fixture(scope="module")
def reference():
    return Kernels("reference")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def norm_in_double(x, weight, eps):
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x) + eps) * weight


@pytest.mark.parametrize("n", SIZES)
def test_rms_norm(kernels, reference, rng, n):
    x, weight, residual = normal(rng, n) * 3, normal(rng, n) + 1, normal(rng, n)
    eps = np.float32(1e-6)
    exact = norm_in_double(x, weight, eps)
    # A sum of n squares in at least 4 lanes, halved by the root; then mean, eps, root, inverse and two products.
    bound = EPS * (n / 4 / 2 + 10) * np.abs(exact) + 1e-45
    assert np.all(np.abs(kernels.rms_norm(x, weight, eps) - exact) <= bound)
    added = kernels.add_rms_norm(residual, x, weight, eps)
    assert np.all(np.abs(added - (residual + exact)) <= bound + EPS * np.abs(residual + exact) * 1.01)
    assert np.all(np.abs(reference.rms_norm(x, weight, eps) - exact) <= 2 * EPS * np.abs(exact))
    assert np.all(
        np.abs(reference.add_rms_norm(residual, x, weight, eps) - residual - exact)
        <= 2 * EPS * (2 + np.abs(exact) + np.abs(residual))
    )


def test_rms_norm_of_zeros_and_of_what_is_not_finite(kernels):
    zeros, ones = np.zeros(33, np.float32), np.ones(33, np.float32)
    assert np.array_equal(kernels.rms_norm(zeros, ones, 1e-6), zeros)
    x = ones.copy()
    x[32] = np.nan
    assert np.isnan(kernels.rms_norm(x, ones, 1e-6)).all()


@pytest.mark.parametrize("n", SIZES)
def test_sums_and_factors_are_exact(kernels, rng, n):
    x, y = normal(rng, n), normal(rng, n)
    assert np.array_equal(kernels.add(x, y), x + y)
    assert np.array_equal(kernels.scale(x, 0.37), x * np.float32(0.37))


@pytest.mark.parametrize("head_dim", (2, 4, 6, 14, 64, 66, 80, 128, 256))
def test_rope_rotates_halves(kernels, reference, rng, head_dim):
    x, angles = normal(rng, 3, head_dim), rng.uniform(0, 100, head_dim // 2)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    a, b = np.split(x.astype(np.float64), 2, axis=1)
    exact = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)
    size = np.concatenate([np.abs(a * cos) + np.abs(b * sin), np.abs(b * cos) + np.abs(a * sin)], axis=1)
    for each in (kernels, reference):
        assert np.all(np.abs(each.rope(x, cos, sin) - exact) <= 2.01 * EPS * size)  # two products, one sum


# ---- exp, tanh and what is made of them ---------------------------------------------------------------------------


def every_exponent(rng, low, high, n):
    """Floats of both signs whose exponents are spread evenly between those of low and high."""
    return (2.0 ** rng.uniform(np.log2(low), np.log2(high), n) * rng.choice([-1, 1], n)).astype(np.float32)


def test_exp_is_within_a_unit_and_a_half(kernels, rng):
    x = np.concatenate([rng.uniform(-104, 88.7, 40000), every_exponent(rng, 1e-40, 88, 10000)]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    error = ulps(kernels.exp(x), exact)
    assert error.max() <= 1.5, x[error.argmax()]
    assert (exact < 2.0**-126).sum() > 1000  # subnormal results were among them


def test_exp_at_the_ends(kernels, reference):
    x = np.array([0, -0.0, np.inf, -np.inf, 88.8, 1e30, -104.1, -1e30, 1e-45, -1e-45], np.float32)
    y = np.array([1, 1, np.inf, 0, np.inf, np.inf, 0, 0, 1, 1], np.float32)
    for each in (kernels, reference):
        assert np.array_equal(each.exp(x), y)
        assert np.isnan(each.exp(np.array([np.nan, -np.nan], np.float32))).all()


def test_tanh_is_within_two_units(kernels, rng):
    x = np.concatenate([rng.uniform(-11, 11, 40000), every_exponent(rng, 1e-37, 100, 20000)]).astype(np.float32)
    error = ulps(kernels.softcap(x, 1.0), np.tanh(x.astype(np.float64)))
    assert error.max() <= 2.0, x[error.argmax()]
    x = np.array([0.0, -0.0, 1e-45, -1e-40, np.inf, -np.inf, 3e38, -30], np.float32)
    y = kernels.softcap(x, 1.0)
    assert np.array_equal(y, np.array([0.0, -0.0, 1e-45, -1e-40, 1, -1, 1, -1], np.float32))
    assert np.array_equal(np.signbit(y), np.signbit(x))
    assert np.isnan(kernels.softcap(np.array([np.nan], np.float32), 1.0)).all()


@pytest.mark.parametrize("n", SIZES)
def test_softcap(kernels, reference, rng, n):
    x = normal(rng, n) * 40
    exact = np.tanh(x.astype(np.float64) / 30) * 30
    for each in (kernels, reference):
        # The quotient is off by EPS, which tanh passes on at most; tanh by 2 units, that is 4 EPS; the product by EPS.
        assert np.all(np.abs(each.softcap(x, 30.0) - exact) <= 6.1 * EPS * np.abs(exact))


@pytest.mark.parametrize("n", (*SIZES, 20000))
def test_gelu_mul(kernels, reference, rng, n):
    gate, up = normal(rng, n) * 4, normal(rng, n)
    x = gate.astype(np.float64)
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    exact = x / (1 + np.exp(-2 * u)) * up
    assert np.allclose(exact, 0.5 * x * (1 + np.tanh(u)) * up, rtol=1e-6, atol=1e-12)  # the usual formula
    # u is off by 4 EPS of itself, which the exponential turns into 2 |u| times that; then exp, sum, quotient, product.
    # Where the exponential overflows, from 2**128 on, the quotient is zero, not |x| 2**-128.
    bound = EPS * (8.1 * np.abs(u) + 7) * np.abs(exact) + np.abs(x * up) * 2.0**-128 + 2.0**-148
    assert np.all(np.abs(kernels.gelu_mul(gate, up) - exact) <= bound)
    assert np.all(np.abs(reference.gelu_mul(gate, up) - exact) <= 1.01 * EPS * np.abs(exact) + 2.0**-148)


def test_gelu_of_large_numbers(kernels):
    gate = np.array([50, 1e18, 1e30, -50, -1e18, -1e30, 0, np.inf], np.float32)
    ones = np.ones(8, np.float32)
    assert np.array_equal(kernels.gelu_mul(gate, ones), np.array([50, 1e18, 1e30, 0, 0, 0, 0, np.inf], np.float32))
    assert np.isnan(kernels.gelu_mul(np.array([-np.inf, np.nan], np.float32), ones[:2])).all()


# ---- stored types -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
def test_bf16_to_nearest_even(kernels, reference, rng, n):
    bits = rng.integers(0, 2**32, n, np.uint32)
    bits[::3] = bits[::3] & 0xFFFF0000 | 0x8000  # halfway
    x = bits.view(np.float32)
    with np.errstate(invalid="ignore"):
        expected = np.where(np.isnan(x), (bits >> 16) & 0x8000 | 0x7FC0, x.astype(ml_dtypes.bfloat16).view(np.uint16))
    for each in (kernels, reference):
        assert np.array_equal(each.f32_to_bf16(x), expected)
        assert np.array_equal(each.store(x, 1)[0], expected)
        assert np.array_equal(each.store(x, 0)[0].view(np.uint32), bits)
        half = bits.astype(np.uint16)
        assert np.array_equal(each.bf16_to_f32(half).view(np.uint32), half.astype(np.uint32) << 16)


@pytest.mark.parametrize("n", SIZES)
def test_int8_of_a_vector(kernels, reference, rng, n):
    for x in (normal(rng, n), normal(rng, n) * np.float32(1e-38), normal(rng, n) * np.float32(1e37)):
        scale = np.float32(np.abs(x).max()) / np.float32(127)
        codes, got = kernels.store(x, 2)
        assert got == scale
        assert np.array_equal(codes, np.clip(np.rint(x / scale), -127, 127))
        again, same = reference.store(x, 2)
        assert same == scale and np.array_equal(again, codes)


def test_int8_of_zeros_of_the_tiny_and_of_what_is_not_finite(kernels, reference):
    for each in (kernels, reference):
        for x in (np.zeros(9, np.float32), np.full(9, 1e-45, np.float32)):
            codes, scale = each.store(x, 2)
            assert scale == 0 and not codes.any()
        for bad in (np.nan, np.inf, -np.inf):
            x = np.ones(9, np.float32)
            x[8] = bad
            codes, scale = each.store(x, 2)
            assert np.isnan(scale) and not codes.any()
