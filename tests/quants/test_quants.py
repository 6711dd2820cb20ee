# SPDX-License-Identifier: Apache-2.0
"""`gemma.quants` against the `gguf` package bit for bit, against independent formulas, and at its edges."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import gguf
import ml_dtypes
import numpy as np
import pytest

from gemma import _quants_decode, quants
from gemma.errors import CheckpointError, ShapeError
from gemma.quants import PackedTensor, QuantType, dequantize, quantize

GGUF_TYPES = [t for t in QuantType if t.ggml_id is not None]
BLOCK_TYPES = [t for t in GGUF_TYPES if not t.is_float]
ENCODED = [QuantType.Q4_0, QuantType.Q5_0, QuantType.Q8_0]


def random_blocks(type: QuantType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Any bytes at all, so every code and every scale occurs, infinite and NaN ones too."""
    return np.random.default_rng(seed).integers(0, 256, (rows, type.row_bytes(columns)), dtype=np.uint8)


def reference(data: np.ndarray, type: QuantType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type.name])


def bits(values: np.ndarray) -> np.ndarray:
    """The bit patterns, all NaN alike: which NaN an operation yields is not defined."""
    return np.where(np.isnan(values), np.float32(np.nan), values).astype(np.float32).view(np.uint32)


@pytest.mark.parametrize("type", GGUF_TYPES, ids=lambda t: t.name)
def test_sizes_are_those_of_the_format(type):
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type.ggml_id)] == (type.block_size, type.block_bytes)
    assert gguf.GGMLQuantizationType(type.ggml_id).name == type.name


@pytest.mark.parametrize("type", GGUF_TYPES, ids=lambda t: t.name)
def test_dequantize_equals_the_reference_bit_for_bit(type):
    # 3 x 256 columns: an odd number of blocks; 400 rows: more than one chunk
    data = random_blocks(type, 400, 768)
    got = dequantize(data, type, (400, 768))
    assert got.dtype == np.float32 and got.shape == (400, 768)
    np.testing.assert_array_equal(bits(got), bits(reference(data, type)))
    assert _quants_decode.CHUNK < 400 * 768, "the test must cross a chunk"


@pytest.mark.parametrize("type", BLOCK_TYPES, ids=lambda t: t.name)
def test_one_block(type):
    data = random_blocks(type, 1, type.block_size, seed=3)
    np.testing.assert_array_equal(bits(dequantize(data, type, (type.block_size,))), bits(reference(data, type)[0]))


def test_several_threads_at_once():
    data = random_blocks(QuantType.Q5_K, 300, 512, seed=1)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(dequantize, data, QuantType.Q5_K, (300, 512)) for _ in range(8)]
        for job in jobs:
            np.testing.assert_array_equal(bits(job.result()), bits(reference(data, QuantType.Q5_K)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("type", [QuantType.Q8_0, QuantType.Q6_K, QuantType.F32], ids=lambda t: t.name)
def test_half_types_are_rounded_once(type, dtype):
    x = np.random.default_rng(0).standard_normal((300, 512)).astype(np.float32)
    data = x.view(np.uint8) if type is QuantType.F32 else random_blocks(type, 300, 512)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = dequantize(data, type, (300, 512)).astype(dtype)
    got = dequantize(data, type, (300, 512), dtype=dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.view(np.uint16), expected.view(np.uint16))


def test_unaligned_and_read_only_data():
    data = random_blocks(QuantType.Q5_0, 7, 96)
    buffer = b"x" + data.tobytes()
    view = np.frombuffer(buffer, np.uint8, data.size, 1)
    np.testing.assert_array_equal(
        bits(dequantize(view, QuantType.Q5_0, (7, 96))), bits(reference(data, QuantType.Q5_0))
    )


def test_out_is_filled_and_checked():
    data = random_blocks(QuantType.Q4_0, 4, 64)
    out = np.zeros((4, 64), np.float32)
    assert dequantize(data, QuantType.Q4_0, (4, 64), out) is out
    np.testing.assert_array_equal(bits(out), bits(reference(data, QuantType.Q4_0)))
    for bad in (np.zeros((4, 63), np.float32), np.zeros((4, 64), np.int32), np.zeros((64, 4), np.float32).T):
        with pytest.raises(ShapeError, match="out: expected"):
            dequantize(data, QuantType.Q4_0, (4, 64), bad)
    with pytest.raises(ShapeError, match="expected 144 contiguous bytes"):
        dequantize(data[:3], QuantType.Q4_0, (4, 64))
    with pytest.raises(ShapeError, match="whole blocks of 32"):
        dequantize(data, QuantType.Q4_0, (4, 63))


def naive(block: bytes, name: str) -> list[float]:
    """One block by the letter of the format, element by element."""
    d = float(np.frombuffer(block[:2], "<f2")[0])
    if name == "Q8_0":
        return [d * q for q in np.frombuffer(block[2:], "i1").tolist()]
    m, start = 0.0, 2
    if name in ("Q4_1", "Q5_1"):
        m, start = float(np.frombuffer(block[2:4], "<f2")[0]), 4
    fifth = 0
    if name.startswith("Q5"):
        fifth, start = int.from_bytes(block[start : start + 4], "little"), start + 4
    out = []
    for i in range(32):
        byte = block[start + i % 16]
        q = (byte & 15 if i < 16 else byte >> 4) | ((fifth >> i) & 1) << 4
        q -= {"Q4_0": 8, "Q5_0": 16}.get(name, 0)
        out.append(d * q + m)
    return out


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_of_32_by_hand(name):
    type = QuantType[name]
    data = random_blocks(type, 50, 32, seed=5)
    data[:, 1] &= 0x3F  # positive finite scales
    data[:, 3] &= 0x3F
    got = dequantize(data, type, (50, 32))
    expected = np.array([naive(row.tobytes(), name) for row in data])
    # d * q is exact in float32 (11 + 8 bits); adding m rounds once: half a unit in the last place of the largest term
    np.testing.assert_allclose(got, expected, rtol=2**-23, atol=2**-23 * np.abs(expected).max())


# --- encoders


def test_q8_0_rounds_half_away_from_zero():
    x = np.zeros((1, 32), np.float32)
    x[0, :5] = [127, 2.5, -2.5, 3.49, -0.5]
    assert quantize(x, QuantType.Q8_0).data[0, 2:7].view(np.int8).tolist() == [127, 3, -3, 3, -1]


@pytest.mark.parametrize(("type", "low"), [(QuantType.Q4_0, -8), (QuantType.Q5_0, -16)], ids=["Q4_0", "Q5_0"])
def test_the_first_of_the_largest_values_becomes_the_lowest_code(type, low):
    x = np.zeros((1, 32), np.float32)
    x[0, 3], x[0, 4] = -4.0, 4.0
    packed = quantize(x, type)
    values = packed.dequantize()[0]
    assert values[3] == -4.0 and values[4] == pytest.approx(4.0 * (-low - 1) / -low)
    x[0, 3], x[0, 4] = 4.0, -4.0
    assert quantize(x, type).dequantize()[0, 3] == 4.0


@pytest.mark.parametrize("type", ENCODED, ids=lambda t: t.name)
def test_zeros_of_either_sign_stay_zero(type):
    for zero in (0.0, -0.0):
        packed = quantize(np.full((2, 64), zero, np.float32), type)
        assert not packed.dequantize().any()
    np.testing.assert_array_equal(
        quantize(np.zeros((2, 64), np.float32), type).data, quantize(np.full((2, 64), -0.0, np.float32), type).data
    )


@pytest.mark.parametrize("type", ENCODED, ids=lambda t: t.name)
def test_values_too_small_for_a_scale_become_zero(type):
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32) * np.float32(1e-42)
    assert not quantize(x, type).dequantize().any()


# Relative root mean square errors that ggml has on these very values.
RMSE = {"Q4_0": 0.0842, "Q5_0": 0.0412, "Q8_0": 0.0053, "BF16": 0.00166, "F16": 0.000208, "F32": 0.0}


@pytest.mark.parametrize("name", RMSE)
def test_round_trip_error(name):
    x = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    y = quantize(x, QuantType[name]).dequantize()
    assert np.sqrt(((y - x) ** 2).mean() / (x**2).mean()) == pytest.approx(RMSE[name], rel=0.01, abs=1e-9)


@pytest.mark.parametrize("type", ENCODED, ids=lambda t: t.name)
def test_encoding_what_was_decoded_is_stable(type):
    first = quantize(np.random.default_rng(0).standard_normal((40, 512)).astype(np.float32), type)
    values = first.dequantize()
    np.testing.assert_allclose(quantize(values, type).dequantize(), values, rtol=1e-3, atol=1e-6)  # fp16 scale again


@pytest.mark.parametrize("type", [*ENCODED, QuantType.SFP8, QuantType.INT8, QuantType.INT4, QuantType.BF16], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(type, value):
    x = np.ones((5, 64), np.float32)
    x[3, 17] = value
    with pytest.raises(CheckpointError, match=r"finite.*\[3, 17\]"):
        quantize(x, type)


def test_values_too_large_for_the_scale_are_refused():
    x = np.full((2, 32), 1e9, np.float32)
    for type in (*ENCODED, QuantType.F16):
        with pytest.raises(CheckpointError, match="float16"):
            quantize(x, type)
    assert quantize(x, QuantType.BF16).dequantize()[0, 0] == pytest.approx(1e9, rel=2**-8)


def test_wrong_dtypes_and_rows():
    with pytest.raises(ShapeError, match="float array"):
        quantize(np.ones((1, 32), np.int32), QuantType.Q8_0)
    with pytest.raises(ShapeError, match="whole blocks"):
        quantize(np.ones((1, 33), np.float32), QuantType.Q8_0)


def test_half_inputs_are_taken():
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(quantize(x, QuantType.Q8_0).data, quantize(x.astype(np.float32), QuantType.Q8_0).data)


# --- SFP8


def test_sfp8_has_255_values_all_exact_in_bfloat16():
    codes = np.arange(256, dtype=np.uint8)
    values = dequantize(codes, QuantType.SFP8, (256,))
    assert len(np.unique(values)) == 255 and values[0x80] == 0.0 and not np.signbit(values[0x80])
    # the format's own recipe: the two bytes of a bfloat16 straight from the code
    v = codes.astype(np.int64) & 127
    low = np.where(v < 64, v << 5, v << 4) & 0xFF
    high = np.where(v < 64, 0x34 + (v >> 3), 0x38 + (v >> 4)) & 0xFF
    word = np.where(v == 0, 0, high << 8 | low | (codes.astype(np.int64) & 128) << 8).astype(np.uint16)
    np.testing.assert_array_equal(values, word.view(ml_dtypes.bfloat16).astype(np.float32))
    assert values[127] == 1.875 and values[64] == 2.0**-7 and values[1] == 1.25 * 2.0**-23
    assert values[63] == 0.875 * 2.0**-7


def test_sfp8_encodes_its_own_values():
    codes = np.delete(np.arange(256, dtype=np.uint8), 0x80)
    values = dequantize(codes, QuantType.SFP8, (255,))
    packed = quantize(values, QuantType.SFP8)
    np.testing.assert_array_equal(packed.data[0], codes)
    assert packed.scale.tolist() == [1.0]


def test_sfp8_rounds_to_the_nearest_and_ties_to_even():
    table = np.sort(_quants_decode.SFP8_VALUES[:128])  # the values that are not negative
    x = np.exp(np.random.default_rng(0).uniform(np.log(2.0**-22), np.log(1.87), 20_000)).astype(np.float32)
    got = quantize(x, QuantType.SFP8).dequantize().astype(np.float64)
    nearest = np.abs(table[None] - x[:, None].astype(np.float64)).min(axis=1)
    np.testing.assert_array_equal(np.abs(got - x), nearest)
    ties = {1.0625: 1.0, 1.1875: 1.25, 1.3125: 1.25, 1.5 * 2.0**-8 + 2.0**-11: 1.5 * 2.0**-8}
    ties |= {1.875 * 2.0**-8: 2.0**-7, 1.9 * 2.0**-8: 2.0**-7, 1.99 * 2.0**-8: 2.0**-7, 2.0**-23: 1.25 * 2.0**-23}
    ties |= {0.8 * 2.0**-23: 0.0, 1e-30: 0.0, -1e-30: 0.0, -1.0625: -1.0}
    for value, expected in ties.items():
        packed = quantize(np.array([value], np.float32), QuantType.SFP8)
        assert packed.dequantize()[0] == expected, value
        assert packed.data[0, 0] != 0x80, value


def test_sfp8_at_every_code_and_on_both_sides_of_every_midpoint():
    values = dequantize(np.arange(128, dtype=np.uint8), QuantType.SFP8, (128,))
    codes = np.arange(1, 127)
    middle = (values[1:127] + values[2:128]) / 2  # exact: one more bit
    below, above = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(2))
    x = np.concatenate([middle, below, above])
    expected = np.concatenate([codes + codes % 2, codes, codes + 1])  # ties: the even code
    # A value that would become 2**-23, which no code stands for, becomes the next; what rounds below that, zero.
    least = np.float32(0.9375 * 2.0**-23)
    x = np.append(x, [least, np.nextafter(least, np.float32(0)), np.float32(2.0**-23), np.float32(1e-45)])
    expected = np.append(expected, [1, 0, 1, 0])
    for sign, bit in ((1, 0), (-1, 0x80)):
        packed = quantize((sign * x).astype(np.float32), QuantType.SFP8)
        assert packed.scale.tolist() == [1.0]
        np.testing.assert_array_equal(packed.data[0], np.where(expected, expected | bit, 0))


def test_sfp8_scales_what_is_too_large():
    x = np.random.default_rng(0).standard_normal((20, 70)).astype(np.float32) * 10
    packed = quantize(x, QuantType.SFP8)
    assert packed.scale[0] == np.abs(x).max() / np.float32(1.875)
    got = packed.dequantize()
    assert np.abs(got).max() == pytest.approx(np.abs(x).max(), rel=1e-6)
    # 3 mantissa bits from 2**-7 up: half a step is 1/16 of the binade
    large = np.abs(x) > packed.scale[0] * 2.0**-7
    np.testing.assert_allclose(got[large], x[large], rtol=1 / 16 + 1e-6)


# --- one scale per output channel


@pytest.mark.parametrize(("type", "top"), [(QuantType.INT8, 127), (QuantType.INT4, 7)], ids=["INT8", "INT4"])
def test_channel_types(type, top):
    x = np.random.default_rng(0).standard_normal((33, 96)).astype(np.float32)
    x *= np.logspace(-20, 20, 33, dtype=np.float32)[:, None]
    x[5] = 0
    packed = quantize(x, type)
    assert packed.scale.shape == (33,) and packed.scale[5] == 1.0
    assert packed.nbytes == 33 * (96 if top == 127 else 48) + 33 * 4
    got = packed.dequantize()
    peak = np.abs(x).max(axis=1, keepdims=True)
    # half a step of peak / top, and float32 rounding
    assert (np.abs(got - x) <= peak / top * 0.5 * (1 + 1e-5)).all()
    np.testing.assert_allclose(np.abs(got).max(axis=1), peak[:, 0], rtol=1e-6)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(packed.dequantize(ml_dtypes.bfloat16), got.astype(ml_dtypes.bfloat16))


def test_int4_nibbles_are_in_the_order_of_q4_0():
    x = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    packed = quantize(x, QuantType.INT4)
    with_scale = np.zeros((6, 2, 18), np.uint8)
    with_scale[..., :2] = np.array([1.0], "<f2").view(np.uint8)
    with_scale[..., 2:] = packed.data.reshape(6, 2, 16)
    codes = reference(with_scale.reshape(6, 36), QuantType.Q4_0)
    np.testing.assert_array_equal(codes * packed.scale[:, None], packed.dequantize())


# --- the container


def test_packed_tensor_checks_itself():
    data = np.zeros((4, 34), np.uint8)
    packed = PackedTensor(QuantType.Q8_0, (4, 32), data)
    assert packed.nbytes == 136 and packed.dequantize(np.float16).dtype == np.float16
    assert PackedTensor(QuantType.Q8_0, (2, 2, 32), data).dequantize().shape == (2, 2, 32)
    with pytest.raises(ShapeError, match=r"expected data uint8 \(4, 34\)"):
        PackedTensor(QuantType.Q8_0, (4, 32), data[:, :33])
    with pytest.raises(ShapeError, match="expected data uint8"):
        PackedTensor(QuantType.Q8_0, (4, 32), data.astype(np.int8))
    with pytest.raises(ShapeError, match="scale: expected None"):
        PackedTensor(QuantType.Q8_0, (4, 32), data, np.ones(4, np.float32))
    with pytest.raises(ShapeError, match=r"scale: expected float32 \(4,\), got None"):
        PackedTensor(QuantType.INT8, (4, 34), data)
    with pytest.raises(ShapeError, match="at least one axis"):
        PackedTensor(QuantType.F32, (), np.zeros((1, 4), np.uint8))


def test_float_dtype():
    assert quants.float_dtype(QuantType.BF16) == ml_dtypes.bfloat16
