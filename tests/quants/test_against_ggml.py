# SPDX-License-Identifier: Apache-2.0
"""Quantized blocks against two independent readers of them: the `gguf` package and ggml's own C functions.

Decoding is compared bit for bit, on data that ggml quantized and on random bytes, in which every scale occurs:
negative, zero, subnormal, infinite and not-a-number (a NaN must meet a NaN; its payload is not compared). Encoding is
compared byte for byte for the types without a search (the others: test_k_quants.py). A written-out formula per type
stands beside both.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from gemma.errors import GemmaError
from gemma.quants import PackedTensor, QuantType, dequantize, quantize

# name: (weights per block, bytes per block, ggml id)
BLOCKS = {
    "Q4_0": (32, 18, 2), "Q4_1": (32, 20, 3), "Q5_0": (32, 22, 6), "Q5_1": (32, 24, 7), "Q8_0": (32, 34, 8),
    "Q2_K": (256, 84, 10), "Q3_K": (256, 110, 11), "Q4_K": (256, 144, 12), "Q5_K": (256, 176, 13),
    "Q6_K": (256, 210, 14),
}  # fmt: skip
ENCODED = ["Q4_0", "Q5_0", "Q8_0", "Q4_1", "Q5_1"]


@pytest.fixture(scope="module")
def ggml():
    """The probe of tests/oracles: `ggml_quantize(x, name)`; its library also exports `dequantize_row_*`."""
    path = Path(__file__).parents[1] / "oracles" / "gguf_oracle_probe.py"
    spec = importlib.util.spec_from_file_location("gguf_oracle_probe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def ggml_dequantize(ggml, data: np.ndarray, name: str, columns: int) -> np.ndarray:
    function = getattr(ggml.L, "dequantize_row_" + name.lower().replace("_k", "_K"))
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    data = np.ascontiguousarray(data)
    out = np.empty((data.shape[0], columns), np.float32)
    function(data.ctypes.data, out.ctypes.data, out.size)
    return out


def ours(data: np.ndarray, name: str, columns: int) -> np.ndarray:
    got = dequantize(data, QuantType[name], (data.shape[0], columns))
    assert got.dtype == np.float32 and got.shape == (data.shape[0], columns)
    return got


def same_bits(got: np.ndarray, want: np.ndarray) -> None:
    """Bit equality, the sign of zero included; any NaN equals any NaN."""
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    a, b = np.where(nan, 0, got).view(np.uint32), np.where(nan, 0, want).view(np.uint32)
    wrong = np.argwhere(a != b)
    assert not len(wrong), (
        f"{len(wrong)} differ, first at {wrong[0]}: {got[tuple(wrong[0])]!r} != {want[tuple(wrong[0])]!r}"
    )


def random_bytes(name: str, rows: int, blocks: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * BLOCKS[name][1]), dtype=np.uint8)


def by_gguf(data: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return quants.dequantize(data, GGMLQuantizationType[name])


# --- the enumeration itself


@pytest.mark.parametrize("name", BLOCKS)
def test_ids_and_sizes(name):
    weights, size, ident = BLOCKS[name]
    assert int(GGMLQuantizationType[name]) == ident
    data = np.zeros((2, 3 * size), np.uint8)
    assert ours(data, name, 3 * weights).shape == (2, 3 * weights)
    packed = PackedTensor(QuantType[name], (2, 3 * weights), data, None)
    assert packed.nbytes == data.nbytes
    assert not packed.dequantize().any()


# --- decoding


@pytest.mark.parametrize("name", BLOCKS)
def test_decode_equals_gguf_on_random_bytes(name):
    data = random_bytes(name, 64, 8, seed=sum(name.encode()))
    with np.errstate(all="ignore"):
        got = ours(data, name, 8 * BLOCKS[name][0])
    want = by_gguf(data, name)
    assert np.isnan(want).any() and (np.abs(want[np.isfinite(want)]) > 1e3).any()  # the hard cases are in
    same_bits(got, want)


def contracted(name: str) -> bool:
    """x86 compilers fuse d*q + m in the types with a minimum; then ggml rounds once and numpy twice."""
    return name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")


@pytest.mark.parametrize("name", BLOCKS)
def test_decode_equals_ggml_on_random_bytes(ggml, name):
    data = random_bytes(name, 32, 8, seed=1 + sum(name.encode()))
    columns = 8 * BLOCKS[name][0]
    with np.errstate(all="ignore"):
        got = ours(data, name, columns)
    want = ggml_dequantize(ggml, data, name, columns)
    if not contracted(name):
        same_bits(got, want)
        return
    both = np.isfinite(want) & np.isfinite(got)
    assert (np.isfinite(want) == np.isfinite(got)).mean() > 0.999  # an overflow may round either way
    # |d*q + m| may cancel: the difference is bounded by the rounding of the largest product of the block.
    largest = np.abs(np.where(both, want, 0)).reshape(32, 8, -1).max(-1, keepdims=True)
    error = np.abs(np.where(both, got - want, 0)).reshape(32, 8, -1)
    assert (error <= 2 * 2**-23 * np.maximum(largest, 2**-126)).all()


@pytest.mark.parametrize("name", BLOCKS)
def test_decode_of_what_ggml_quantized(ggml, name):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((16, 1024)).astype(np.float32) * np.float32(0.02)
    x[3] *= 1000
    x[5] = 0
    x[7, ::2] = 0
    data = ggml.ggml_quantize(x, name)
    got = ours(data, name, 1024)
    same_bits(got, by_gguf(data, name))
    same_bits(PackedTensor(QuantType[name], (16, 1024), data, None).dequantize(), got)
    reference = ggml_dequantize(ggml, data, name, 1024)
    # two roundings against one (see `contracted`): half an ulp of the products, which are below twice the row's maximum
    limit = 0 if not contracted(name) else 2**-23 * 2 * np.abs(reference).max(-1, keepdims=True)
    assert (np.abs(got - reference) <= limit).all()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K"])
def test_decode_into_a_given_array_and_dtype(name):
    data = random_bytes(name, 4, 1, seed=3)
    data[:, :4] = 0x1F  # finite scales
    columns = BLOCKS[name][0]
    out = np.empty((4, columns), np.float32)
    assert dequantize(data, QuantType[name], (4, columns), out=out) is out
    assert np.array_equal(out, ours(data, name, columns))
    half = PackedTensor(QuantType[name], (4, columns), data, None).dequantize(dtype=np.float16)
    assert half.dtype == np.float16
    with np.errstate(all="ignore"):
        assert np.array_equal(half, out.astype(np.float16), equal_nan=True)


def test_large_rows_are_decoded_in_the_same_way_as_small_ones():
    """Blocks are independent: a matrix decoded at once equals its rows decoded one by one."""
    for name, (weights, size, _) in BLOCKS.items():
        data = np.random.default_rng(5).integers(0, 256, (37, 5 * size), dtype=np.uint8)
        with np.errstate(all="ignore"):
            whole = ours(data, name, 5 * weights)
            rows = np.concatenate([ours(data[i : i + 1], name, 5 * weights) for i in range(37)])
        same_bits(whole, rows)


# --- decoding by the written formula, one value at a time


def half(data: np.ndarray) -> np.float32:
    return np.float32(np.frombuffer(bytes(data), "<f2")[0])


def formula(name: str, block: np.ndarray) -> np.ndarray:
    """One block by the description of its layout, in float32, element by element."""
    b = [int(v) for v in block]
    if name == "Q8_0":
        return np.array([np.float32(np.int8(np.uint8(q))) * half(block[:2]) for q in b[2:]], np.float32)
    if name in ("Q4_0", "Q5_0", "Q4_1", "Q5_1"):
        five, with_min = name[1] == "5", name[-1] == "1"
        d, m = half(block[:2]), half(block[2:4]) if with_min else None
        at = 4 if with_min else 2
        high = int.from_bytes(bytes(block[at : at + 4]), "little") if five else 0
        qs = b[at + 4 :] if five else b[at:]
        out = []
        for i in range(32):
            q = qs[i] & 15 if i < 16 else qs[i - 16] >> 4
            q |= (high >> i & 1) << 4
            out.append(np.float32(q) * d + m if with_min else np.float32(q - (16 if five else 8)) * d)
        return np.array(out, np.float32)
    if name == "Q6_K":
        ql, qh, scales, d = b[:128], b[128:192], block[192:208].view(np.int8), half(block[208:])
        out = np.empty(256, np.float32)
        for n in range(256):
            part, r = divmod(n, 128)
            quarter, l = divmod(r, 32)
            low = ql[64 * part + l + 32 * (quarter % 2)]
            low = low & 15 if quarter < 2 else low >> 4
            q = low | (qh[32 * part + l] >> 2 * quarter & 3) << 4
            out[n] = d * np.float32(scales[n // 16]) * np.float32(q - 32)
        return out
    if name in ("Q4_K", "Q5_K"):
        d, dmin, s = half(block[:2]), half(block[2:4]), b[4:16]
        qh, qs = (b[16:48], b[48:]) if name == "Q5_K" else (None, b[16:])
        out = np.empty(256, np.float32)
        for n in range(256):
            j, g, l = n // 32, n // 64, n % 32
            scale = s[j] & 63 if j < 4 else (s[j + 4] & 15) | (s[j - 4] >> 6) << 4
            low = s[j + 4] & 63 if j < 4 else (s[j + 4] >> 4) | (s[j] >> 6) << 4
            q = qs[32 * g + l] & 15 if j % 2 == 0 else qs[32 * g + l] >> 4
            if qh is not None:
                q |= (qh[l] >> (2 * g + j % 2) & 1) << 4
            out[n] = d * np.float32(scale) * np.float32(q) - dmin * np.float32(low)
        return out
    if name == "Q2_K":
        s, qs, d, dmin = b[:16], b[16:80], half(block[80:82]), half(block[82:84])
        out = np.empty(256, np.float32)
        for n in range(256):
            part, r = divmod(n, 128)
            q = qs[32 * part + r % 32] >> 2 * (r // 32) & 3
            out[n] = d * np.float32(s[n // 16] & 15) * np.float32(q) - dmin * np.float32(s[n // 16] >> 4)
        return out
    hmask, qs, s, d = b[:32], b[32:96], b[96:108], half(block[108:])  # Q3_K
    out = np.empty(256, np.float32)
    for n in range(256):
        part, r = divmod(n, 128)
        j = n // 16
        scale = (s[j] & 15 if j < 8 else s[j - 8] >> 4) | (s[8 + j % 4] >> 2 * (j // 4) & 3) << 4
        q = (qs[32 * part + r % 32] >> 2 * (r // 32) & 3) + 4 * (hmask[n % 32] >> (n // 32) & 1) - 4
        out[n] = d * np.float32(scale - 32) * np.float32(q)
    return out


@pytest.mark.parametrize("name", BLOCKS)
def test_decode_equals_the_written_formula(name):
    data = random_bytes(name, 12, 1, seed=11)
    with np.errstate(all="ignore"):
        want = np.stack([formula(name, row) for row in data])
        same_bits(ours(data, name, BLOCKS[name][0]), want)


def test_the_types_with_a_minimum_by_hand():
    """Q4_1 is fp16 d, fp16 m, 16 bytes; Q5_1 has a u32 of fifth bits between; x = d*q + m."""
    d, m = np.array([0.5, -3.0], "<f2").view(np.uint8).reshape(2, 2)
    nibbles = np.arange(16, dtype=np.uint8) * 17  # low = high = j
    q4 = np.concatenate([d, m, nibbles])[None]
    want = np.tile(np.arange(16) * 0.5 - 3.0, 2).astype(np.float32)[None]
    assert np.array_equal(ours(q4, "Q4_1", 32), want)
    high = np.frombuffer((0x8000_0001).to_bytes(4, "little"), np.uint8)  # elements 0 and 31
    want = want.copy()
    want[0, [0, 31]] += 8
    assert np.array_equal(ours(np.concatenate([d, m, high, nibbles])[None], "Q5_1", 32), want)


# --- encoding


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(23)
    normal = rng.standard_normal((24, 256)).astype(np.float32)
    ties = (rng.integers(-17, 18, (24, 256)) / np.float32(2)).astype(np.float32)
    ties[:, ::32] = np.float32(-8)  # d = 1 for Q4_0: the quotients are exact halves
    ties127 = (rng.integers(-254, 255, (24, 256)) / np.float32(2)).astype(np.float32)
    ties127[:, ::32] = np.float32(127)  # d = 1 for Q8_0
    ties5 = (rng.integers(-32, 32, (24, 256)) / np.float32(2)).astype(np.float32)
    ties5[:, ::32] = np.float32(-16)  # d = 1 for Q5_0
    equal = np.where(rng.random((24, 256)) < 0.5, np.float32(1.5), np.float32(-1.5))  # |max| reached by both signs
    lone = np.zeros((24, 256), np.float32)
    lone[np.arange(24), rng.integers(0, 256, 24)] = rng.standard_normal(24)
    negative = -np.abs(normal)
    return {
        "normal": normal,
        "weights": normal * np.float32(0.02),
        "tiny": normal * np.float32(1e-7),  # scales are subnormal halves
        "vanishing": normal * np.float32(1e-12),  # scales round to zero
        "float32 subnormals": normal * np.float32(1e-42),
        "huge": normal * np.float32(6e4),
        "zero": np.zeros((4, 256), np.float32),
        "negative zero": np.full((4, 256), -0.0, np.float32),
        "ties of 8": ties,
        "ties of 127": ties127,
        "ties of 16": ties5,
        "both signs reach the maximum": equal,
        "one value per row": lone,
        "only negative": negative,
        "only positive": -negative,
        "constant": np.full((4, 256), 0.3, np.float32),
        "outlier": np.where(rng.random((24, 256)) < 0.01, np.float32(100), normal),
        "ramp": np.linspace(-1, 1, 24 * 256, dtype=np.float32).reshape(24, 256),
        "bf16 values": (normal.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
    }


@pytest.mark.parametrize("case", inputs())
@pytest.mark.parametrize("name", ENCODED)
def test_encode_equals_ggml(ggml, name, case):
    x = inputs()[case]
    kept = x.copy()
    if case == "huge" and name.endswith("_1"):  # a minimum of -1e5 is no half: ggml writes an infinite one
        with pytest.raises(GemmaError, match="65504"):
            quantize(x, QuantType[name])
        return
    with np.errstate(all="ignore"):
        packed = quantize(x, QuantType[name])
    want = ggml.ggml_quantize(x, name)
    assert packed.type is QuantType[name] and packed.shape == x.shape
    assert packed.data.dtype == np.uint8 and packed.data.shape == want.shape
    wrong = np.argwhere(packed.data != want)
    assert not len(wrong), f"{len(wrong)} bytes differ, first at {wrong[0]} of {want.shape}"
    assert np.array_equal(x, kept)  # the input is not written to


@pytest.mark.parametrize("name", ENCODED)
def test_encode_of_many_random_rows(ggml, name):
    """Every magnitude that a half can scale, mixed within and between rows."""
    rng = np.random.default_rng(29)
    x = rng.standard_normal((2048, 64)).astype(np.float32)
    x *= np.exp2(rng.integers(-24, 14, (2048, 1))).astype(np.float32)
    x *= np.exp2(rng.integers(-6, 1, x.shape)).astype(np.float32)
    assert np.array_equal(quantize(x, QuantType[name]).data, ggml.ggml_quantize(x, name))


@pytest.mark.parametrize("name", ENCODED)
def test_encode_ignores_strides(ggml, name):
    x = np.random.default_rng(31).standard_normal((64, 64)).astype(np.float32)
    for view in (x.T, x[::-1, ::-1], np.asfortranarray(x)):
        assert np.array_equal(quantize(view, QuantType[name]).data, ggml.ggml_quantize(view, name))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_types_round_to_nearest_even(name):
    import ml_dtypes

    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[name]
    x = np.concatenate([v.ravel()[:1024] for v in inputs().values() if v.size >= 1024]).reshape(-1, 32)
    x = x[np.abs(x).max(1) < 65504] if name == "F16" else x
    with np.errstate(all="ignore"):
        packed = quantize(x, QuantType[name])
        want = x.astype(dtype)
    assert packed.data.tobytes() == want.tobytes()
    same_bits(packed.dequantize(), want.astype(np.float32))


# Relative root mean square error of these types on 4,096 samples of N(0, 1), seed 0, as ggml has it.
ERRORS = {"Q4_0": 0.0842, "Q5_0": 0.0412, "Q8_0": 0.0053, "Q2_K": 0.293, "Q3_K": 0.151, "Q4_K": 0.0701,
          "Q5_K": 0.0354, "Q6_K": 0.0174}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error_on_normal_data(name):
    x = np.random.default_rng(0).standard_normal((8, 512)).astype(np.float32)
    data = quantize(x, QuantType[name]).data
    error = np.sqrt(((ours(data, name, 512) - x) ** 2).mean() / (x**2).mean())
    digits = len(str(ERRORS[name])) - 2
    assert abs(error - ERRORS[name]) <= 0.6 * 10**-digits  # the same 4,096 samples: only the last digit's rounding


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ENCODED)
def test_encode_refuses_what_is_no_number(name, bad):
    x = np.zeros((2, 64), np.float32)
    x[1, 40] = bad
    with pytest.raises(GemmaError, match=r"finite|NaN|inf"):
        quantize(x, QuantType[name])


@pytest.mark.parametrize("name", ["F16", *ENCODED])
def test_encode_refuses_scales_that_no_half_holds(name):
    """ggml writes an infinite scale there, and the whole block is lost; we say so before anything is written."""
    x = np.full((3, 32), 1.0, np.float32)
    x[1] = 1e9
    with pytest.raises(GemmaError, match=r"65504|float16"):
        quantize(x, QuantType[name])


@pytest.mark.parametrize("name", ENCODED)
def test_encode_refuses_other_shapes(name):
    for shape in ((2, 33), (2, 16), (48,), (), (2, 0)):
        with pytest.raises(GemmaError, match=r"32|shape|axis"):
            quantize(np.zeros(shape, np.float32), QuantType[name])


@pytest.mark.parametrize("name", BLOCKS)
def test_decode_refuses_the_wrong_number_of_bytes(name):
    weights, size, _ = BLOCKS[name]
    for nbytes, shape in (
        (2 * size - 1, (2, weights)),
        (2 * size + 1, (2, weights)),
        (size, (2, weights)),
        (size, (1, weights + 1)),
    ):
        with pytest.raises(GemmaError):
            dequantize(np.zeros(nbytes, np.uint8), QuantType[name], shape)


# --- switching floating point (8 bits)


def sfp8_value(code: int) -> float:
    v, sign = code & 127, -1.0 if code & 128 else 1.0
    if v == 0:
        return 0.0
    if v >= 64:
        return sign * (1 + (v & 7) / 8) * 2.0 ** ((v >> 3) - 15)
    return sign * (1 + (v & 3) / 4) * 2.0 ** ((v >> 2) - 23)


def test_sfp8_all_codes():
    codes = np.array([c for c in range(256) if c != 0x80], np.uint8)
    want = np.array([sfp8_value(int(c)) for c in codes], np.float32)
    got = dequantize(codes[None], QuantType.SFP8, (1, 255))
    assert np.array_equal(got[0], want)
    assert len(set(want.tolist())) == 255 and want.max() == 1.875
    bits = want.view(np.uint32)
    assert not (bits & 0xFFFF).any()  # every value is exact in bfloat16


def test_sfp8_bits_follow_the_other_description():
    """bfloat16 bits straight from the code: small: v<<5 and 0x34 + (v>>3); large: v<<4 and 0x38 + (v>>4)."""
    codes = np.array([c for c in range(256) if c & 127], np.uint8)
    v = (codes & 127).astype(np.uint32)
    large = v >= 64
    low = np.where(large, v << 4, v << 5) & 255
    high = np.where(large, 0x38 + (v >> 4), 0x34 + (v >> 3)) & 255
    bits = (high << 8 | low | (codes.astype(np.uint32) & 128) << 8) << 16
    got = dequantize(codes[None], QuantType.SFP8, (1, codes.size))
    assert np.array_equal(got[0].view(np.uint32), bits)


def test_sfp8_scale():
    codes = np.arange(1, 128, dtype=np.uint8)[None]
    plain = PackedTensor(QuantType.SFP8, (1, 127), codes, np.ones(1, np.float32)).dequantize()
    scaled = PackedTensor(QuantType.SFP8, (1, 127), codes, np.array([3.7], np.float32)).dequantize()
    assert np.array_equal(scaled, plain * np.float32(3.7))


# --- 8-bit integers with a scale per output channel


def test_int8_scale_is_per_output_channel():
    rng = np.random.default_rng(37)
    q = rng.integers(-128, 128, (5, 24)).astype(np.int8)
    scale = rng.random(5).astype(np.float32)
    packed = PackedTensor(QuantType.INT8, (5, 24), q.view(np.uint8), scale)
    assert np.array_equal(packed.dequantize(), q.astype(np.float32) * scale[:, None])
