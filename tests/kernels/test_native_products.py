# SPDX-License-Identifier: Apache-2.0
"""Products over packed weights against float64, for every type and every instruction set that this machine has."""

import ml_dtypes
import numpy as np
import pytest
from native_cases import (
    EPS,
    FLOATS,
    TYPES,
    bound,
    columns,
    fitted_weight,
    gradient_bound,
    magnitudes,
    misaligned,
    raw_weight,
)

from gemma import kernels
from gemma.quants import PackedTensor, QuantType

native = pytest.importorskip("gemma.kernels._native")
pytestmark = pytest.mark.skipif(kernels.library() is None, reason=f"native library: {kernels.why_missing()}")

SETS = kernels.instruction_sets()
COUNTS = (1, 2, 3, 5, 8, 17, 64)  # decode, batched decode, prefill: on both sides of every tile
IDS = dict(ids=lambda value: getattr(value, "name", value))
INTEGERS = [type for type in TYPES if type not in FLOATS]


@pytest.fixture(scope="module", params=SETS)
def context(request):
    with native.Context(threads=1, isa=request.param) as made:
        assert made.isa == request.param
        yield made


def activations(m: int, cols: int, seed: int = 1) -> np.ndarray:
    """Normal rows of very different sizes with a few outliers, as in a residual stream."""
    rng = np.random.default_rng([seed, m, cols])
    x = rng.standard_normal((m, cols)) * np.exp2(rng.integers(-12, 12, (m, 1)))
    x[:, rng.integers(0, cols, 2)] *= 40
    return x.astype(np.float32)


def check(context, packed: PackedTensor, x: np.ndarray) -> np.ndarray:
    got = context.matmul(native.NativeWeight(packed), x)
    exact = x.astype(np.float64) @ packed.dequantize().astype(np.float64).T
    worst = (np.abs(got - exact) / np.maximum(bound(packed, x), 1e-300)).max()
    assert worst <= 1, f"{packed.type.name} {packed.shape}: {worst:.3g} times the bound"
    return got


@pytest.mark.parametrize("type", TYPES, **IDS)
def test_matches_float64_for_every_count_of_rows(context, type):
    packed = raw_weight(type, 37, columns(type, 3))
    x = activations(max(COUNTS), packed.shape[1])
    whole, weight = check(context, packed, x), native.NativeWeight(packed)
    for m in COUNTS:  # the bits of a row do not depend on the rows beside it
        start = (7 * m) % (len(x) - m + 1)
        part = context.matmul(weight, x[start : start + m])
        np.testing.assert_array_equal(part.view(np.uint32), whole[start : start + m].view(np.uint32))


@pytest.mark.parametrize("type", TYPES, **IDS)
def test_odd_sizes(context, type):
    for rows, blocks in ((1, 1), (3, 2), (65, 1), (130, 3), (2, 9)):
        packed = fitted_weight(type, rows, columns(type, blocks))
        x = activations(9, packed.shape[1], seed=rows)
        check(context, packed, x)
    if type.block_size == 1:
        for cols in (1, 2, 7, 31, 33, 63):
            check(context, raw_weight(type, 5, cols), activations(3, cols))


@pytest.mark.parametrize("type", [QuantType.Q8_0, QuantType.Q6_K, QuantType.INT8, QuantType.BF16], **IDS)
def test_long_rows_cross_every_panel(context, type):
    """Columns are unpacked some thousand at a time; where one part ends, sums go on with the same bits."""
    packed = raw_weight(type, 9, columns(type, 17 if type is QuantType.Q6_K else 133))
    x = activations(17, packed.shape[1])
    whole, weight = check(context, packed, x), native.NativeWeight(packed)
    for row in (0, 16):
        np.testing.assert_array_equal(context.matmul(weight, x[row : row + 1])[0], whole[row])


@pytest.mark.parametrize("type", INTEGERS, **IDS)
def test_the_error_is_that_of_15_bits(context, type):
    """Typical, not only worst: the root mean square error is near what rounding to 15 bits predicts, not 8 or 12."""
    packed = fitted_weight(type, 96, columns(type, 3))
    x = activations(16, packed.shape[1])
    error = context.matmul(native.NativeWeight(packed), x) - x.astype(np.float64) @ packed.dequantize().T.astype("f8")
    cols = packed.shape[1]
    peaks = np.abs(np.pad(x, ((0, 0), (0, -cols % 32))).reshape(len(x), -1, 32)).max(2)
    step = np.repeat(peaks, 32, axis=1)[:, :cols].astype(np.float64) / 32767 / np.sqrt(12)
    predicted = np.sqrt(np.square(step) @ np.square(packed.dequantize().astype(np.float64)).T)
    floats = 4 * EPS * np.abs(x).astype(np.float64) @ magnitudes(packed).T
    assert (
        np.sqrt(np.mean(np.square(error), axis=1)) < 1.5 * np.sqrt(np.mean(predicted**2, axis=1)) + floats.mean(1)
    ).all()


@pytest.mark.parametrize("type", TYPES, **IDS)
def test_rows_equal_the_decoder(context, type):
    packed = raw_weight(type, 19, columns(type, 2))
    values, weight = packed.dequantize(), native.NativeWeight(packed)
    ids = np.array([18, 0, 7, 7, 3, 18])
    np.testing.assert_array_equal(context.rows(weight, ids).view(np.uint32), values[ids].view(np.uint32))
    assert context.rows(weight, np.zeros(0, np.int64)).shape == (0, packed.shape[1])


@pytest.mark.parametrize("type", TYPES, **IDS)
def test_gradient_matches_float64(context, type):
    packed = raw_weight(type, 37, columns(type, 3))
    weight, values = native.NativeWeight(packed), packed.dequantize().astype(np.float64)
    dy = activations(17, 37)
    got = context.matmul_grad(weight, dy)
    assert (np.abs(got - dy.astype(np.float64) @ values) <= gradient_bound(packed, dy)).all()
    for m in (1, 5):
        np.testing.assert_array_equal(context.matmul_grad(weight, dy[:m]), got[:m])


@pytest.mark.parametrize("type", TYPES, **IDS)
def test_bfloat16_is_the_float32_product_rounded_once(context, type):
    packed = raw_weight(type, 37, columns(type, 2))
    weight = native.NativeWeight(packed)
    for m in (1, 17):
        x = activations(m, packed.shape[1]).astype(ml_dtypes.bfloat16)
        got = context.matmul(weight, x)
        assert got.dtype == ml_dtypes.bfloat16
        wide = context.matmul(weight, x.astype(np.float32)).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(got.view(np.uint16), wide.view(np.uint16))


@pytest.mark.parametrize("type", TYPES, **IDS)
def test_misaligned_and_strided_bytes(context, type):
    packed = raw_weight(type, 35, columns(type, 2))
    x = activations(9, packed.shape[1])
    expected = context.matmul(native.NativeWeight(packed), x)
    for offset in (1, 3, 18, 33):
        moved = PackedTensor(type, packed.shape, misaligned(packed.data, offset), packed.scale)
        np.testing.assert_array_equal(context.matmul(native.NativeWeight(moved), x), expected)
    apart = np.full((35, packed.data.shape[1] + 11), 0xA5, np.uint8)  # between rows stand bytes that must not count
    apart[:, :-11] = packed.data
    strided = PackedTensor(type, packed.shape, apart[:, :-11], packed.scale)
    wide_x, wide_out = np.full((9, x.shape[1] + 3), np.nan, np.float32), np.full((9, 40), 7, np.float32)
    wide_x[:, : x.shape[1]] = x
    weight = native.NativeWeight(strided)
    context.matmul(weight, wide_x[:, : x.shape[1]], out=wide_out[:, :35])
    np.testing.assert_array_equal(wide_out[:, :35], expected)
    assert (wide_out[:, 35:] == 7).all()
    np.testing.assert_array_equal(context.rows(weight, [34, 1]), packed.dequantize()[[34, 1]])


@pytest.mark.parametrize("type", TYPES, **IDS)
@pytest.mark.parametrize("m", [1, 17])
def test_a_row_that_is_not_finite_spoils_only_itself(context, type, m):
    packed = fitted_weight(type, 37, columns(type, 2))
    weight, x = native.NativeWeight(packed), activations(m + 2, packed.shape[1])
    clean = context.matmul(weight, x)
    for bad in (np.nan, np.inf, -np.inf):
        x[1, packed.shape[1] - 2] = bad
        got = context.matmul(weight, x)
        if type in INTEGERS:
            assert np.isnan(got[1]).all()
        else:  # a weight of zero keeps an infinity out of nothing: 0 * inf is NaN
            assert not np.isfinite(got[1]).any()
        others = np.arange(m + 2) != 1
        np.testing.assert_array_equal(got[others], clean[others])


@pytest.mark.parametrize("type", TYPES, **IDS)
def test_zeros_and_extremes(context, type):
    packed = fitted_weight(type, 37, columns(type, 2))
    weight, cols = native.NativeWeight(packed), packed.shape[1]
    for m in (1, 17):
        assert (context.matmul(weight, np.zeros((m, cols), np.float32)) == 0).all()
    for size in (1e-38, 1e-30, 1e30, 3e35):
        x = (activations(9, cols) / 4096 * size).astype(np.float32)
        check(context, packed, x)
    zero = PackedTensor(type, packed.shape, np.zeros_like(packed.data), packed.scale)
    if type is not QuantType.INT4:  # whose zero byte is the code -8
        assert (context.matmul(native.NativeWeight(zero), activations(3, cols)) == 0).all()


@pytest.mark.parametrize("isa", SETS)
def test_threads_change_no_bit(isa):
    counts = range(1, native.processors() + 1)
    for type in (QuantType.Q4_K, QuantType.Q8_0, QuantType.INT4, QuantType.F32, QuantType.SFP8):
        packed = raw_weight(type, 301, columns(type, 2))
        weight, results = native.NativeWeight(packed), []
        for threads in {1, 2, counts[-1]} & set(counts):
            with native.Context(threads, isa) as context:
                x, dy = activations(19, packed.shape[1]), activations(5, 301)
                products = context.matmul(weight, x), context.matmul(weight, x[:1]), context.matmul_grad(weight, dy)
                results.append([*products, context.rows(weight, np.arange(300, -1, -1))])
        for other in results[1:]:
            for a, b in zip(results[0], other):
                np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_row_bytes_are_those_of_the_types():
    lib = native.library()
    for type, number in native.TYPE_IDS.items():
        for cols in (32, 256, 768):
            if cols % type.block_size == 0:
                assert lib.gk_row_bytes(number, cols) == type.row_bytes(cols)
        assert lib.gk_row_bytes(number, 33) == (
            type.row_bytes(33) if type.block_size == 1 else lib.gk_row_bytes(number, 1)
        )
        assert type.block_size == 1 or lib.gk_row_bytes(number, 33) < 0
    assert lib.gk_row_bytes(9999, 32) < 0
