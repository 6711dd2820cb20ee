# SPDX-License-Identifier: Apache-2.0
"""float32 rows to the blocks of Q8_0, Q5_x, Q4_x (byte-equal to ggml), F16, BF16, SFP8, and INT8 / INT4 per channel.

Encoders take float32 [n, block_size] of finite values and return uint8 [n, block_bytes]; the caller has checked both.
Those of `WEIGHTED` also take weights [n, block_size] and then search, as ggml does with an importance matrix. The
super-blocks (Q4_K and its like) are in `_quants_encode_k.py`. `_quants_decode.py` is the inverse.
"""

from __future__ import annotations

import numpy as np

from gemma._quants_fit import columns, fit_signed, fit_with_min, rows

_SFP8_MAX = np.float32(1.875)


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 where d is 0."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(d == 0, np.float32(0), np.float32(1) / d)


def _int8(x: np.ndarray) -> np.ndarray:
    """Truncation to int8 as the machine does it: what does not fit 32 bits becomes 0.

    Only blocks so small that 1 / d overflows get there; their stored scale is zero, so the codes mean nothing.
    """
    fits = np.abs(x) < 2.0**31  # False for NaN
    return np.where(fits, x, 0).astype(np.int32).astype(np.int8)


def _with_scale(d: np.ndarray, *parts: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        scale = d.astype("<f2").reshape(-1, 1).view(np.uint8)
    return np.concatenate([scale, *parts], axis=1)


def _q8_0(x):
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = x * _inverse(d)
        whole = np.trunc(scaled)
        whole += np.copysign((np.abs(scaled - whole) >= 0.5).astype(np.float32), scaled)  # half away from zero
    return _with_scale(d, _int8(whole).view(np.uint8))


def _signed_codes(x, levels):
    """d and codes 0..2*levels-1: the value of largest magnitude (the first one wins) becomes code 0."""
    at = np.abs(x).argmax(axis=1)[:, None]
    largest = np.take_along_axis(x, at, axis=1) + np.float32(0)  # a block of zeros counts as +0
    d = largest / np.float32(-levels)
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = x * _inverse(d) + np.float32(levels + 0.5)
    return d, np.minimum(_int8(shifted), np.int8(2 * levels - 1)).view(np.uint8)


def _q4_0(x):
    d, codes = _signed_codes(x, 8)
    return _with_scale(d, codes[:, :16] | (codes[:, 16:] << 4))


def _q5_0(x):
    d, codes = _signed_codes(x, 16)
    return _with_scale(d, np.packbits(codes >> 4, axis=1, bitorder="little"), _low_nibbles(codes))


def _codes_from_minimum(x, top):
    """d, minimum and codes 0..top of the types that store both; rounding is half up, of the value as it is."""
    low = x.min(axis=1, keepdims=True)
    d = (x.max(axis=1, keepdims=True) - low) / np.float32(top)
    with np.errstate(invalid="ignore", over="ignore"):
        codes = _int8((x - low) * _inverse(d) + np.float32(0.5))
    return d, low, np.minimum(codes, np.int8(top)).view(np.uint8)


def _q4_1(x):
    return _pack_4_1(*_codes_from_minimum(x, 15))


def _q5_1(x):
    return _pack_5_1(*_codes_from_minimum(x, 31))


def _pack_4_1(d, low, codes):
    with np.errstate(over="ignore"):
        minimum = low.astype("<f2").reshape(-1, 1).view(np.uint8)
    return _with_scale(d, minimum, codes[:, :16] | (codes[:, 16:] << 4))


def _pack_5_1(d, low, codes):
    with np.errstate(over="ignore"):
        minimum = low.astype("<f2").reshape(-1, 1).view(np.uint8)
    return _with_scale(d, minimum, np.packbits(codes >> 4, axis=1, bitorder="little"), _low_nibbles(codes))


def _low_nibbles(codes):
    return (codes[:, :16] & 15) | (codes[:, 16:] << 4)


def _f32(x):
    return x.astype("<f4").view(np.uint8)


def _f16(x):
    with np.errstate(over="ignore"):
        return x.astype("<f2").view(np.uint8)


def _bf16(x):
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype("<u2").view(np.uint8)


ENCODERS = {"F32": _f32, "F16": _f16, "BF16": _bf16, "Q4_0": _q4_0, "Q5_0": _q5_0, "Q8_0": _q8_0}
ENCODERS |= {"Q4_1": _q4_1, "Q5_1": _q5_1}


def _q4_0_weighted(x, w):
    d, codes = fit_signed(columns(x, 32), columns(w, 32), 8)
    return _with_scale(d, _low_nibbles(rows(codes(), len(x))))


def _q5_0_weighted(x, w):
    d, codes = fit_signed(columns(x, 32), columns(w, 32), 16)
    codes = rows(codes(), len(x))
    return _with_scale(d, np.packbits(codes >> 4, axis=1, bitorder="little"), _low_nibbles(codes))


_TRIALS = (-0.9, 0.05, 37)  # see fit_with_min


def _q4_1_weighted(x, w):
    d, low, codes = fit_with_min(columns(x, 32), columns(w, 32), 15, _TRIALS)
    return _pack_4_1(d, low, rows(codes(), len(x)))


def _q5_1_weighted(x, w):
    d, low, codes = fit_with_min(columns(x, 32), columns(w, 32), 31, _TRIALS)
    return _pack_5_1(d, low, rows(codes(), len(x)))


# Types of 32 values that use an importance matrix: the weights are importance * sqrt(mean square of the row + x**2).
WEIGHTED = {"Q4_0": _q4_0_weighted, "Q5_0": _q5_0_weighted, "Q4_1": _q4_1_weighted, "Q5_1": _q5_1_weighted}


def encode_sfp8(x: np.ndarray) -> np.ndarray:
    """uint8 codes of |x| <= 1.875: round to nearest, ties to even, at 3 mantissa bits from 2**-7 up and 2 below it.

    The top of the small range, from 1.875 * 2**-8, rounds up into the large one. What rounds below 2**-23 is zero;
    2**-23 itself has no code and takes the next, 1.25 * 2**-23.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    size = (bits & np.uint32(0x7FFFFFFF)).astype(np.int32)

    def rounded(mantissa_bits: int) -> np.ndarray:  # exponent and mantissa as one integer
        drop = 23 - mantissa_bits
        return (size + ((1 << (drop - 1)) - 1) + ((size >> drop) & 1)) >> drop

    large = rounded(3) - ((127 - 15) << 3)
    small = rounded(2) - ((127 - 23) << 2)
    small = np.where(small == 0, 1, np.maximum(small, 0))
    code = np.where(large >= 64, large, small).astype(np.uint8)
    return np.where(code == 0, np.uint8(0), code | (bits >> np.uint32(24)).astype(np.uint8) & np.uint8(0x80))


def sfp8_scale(x: np.ndarray) -> np.float32:
    """The scale of a whole tensor: 1 where its values fit the code, else what brings the largest to 1.875."""
    largest = np.float32(np.abs(x).max(initial=0))
    return np.float32(1) if largest <= _SFP8_MAX else largest / _SFP8_MAX


def fit_sfp8(x: np.ndarray, scale: np.float32) -> np.ndarray:
    """x / scale, never beyond the largest code by a rounding error of the division."""
    return np.clip(x / scale, -_SFP8_MAX, _SFP8_MAX)


def encode_channels(x: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric codes per row, int8 [rows, cols], and float32 [rows] with x ~ codes * scale; half to even.

    A row of zeros gets scale 1. `largest` is 127 or 7; the code below -largest is never produced.
    """
    peak = np.abs(x).max(axis=1, initial=0)
    with np.errstate(over="ignore", divide="ignore"):
        factor = np.where(peak > 0, np.float32(largest) / peak, np.float32(1))
    scale = np.where(peak > 0, peak / np.float32(largest), np.float32(1)).astype(np.float32)
    factor = np.where(np.isfinite(factor), factor, np.float32(0)).astype(np.float32)  # a row of denormals is zero
    codes = np.rint(x * factor[:, None])
    return np.clip(codes, -largest, largest).astype(np.int8), scale


def pack_nibbles(codes: np.ndarray) -> np.ndarray:
    """int8 codes [rows, cols] in -8..7 to uint8 [rows, cols / 2]: code + 8, in the order of Q4_0 within 32."""
    halves = (codes + np.int8(8)).view(np.uint8).reshape(len(codes), -1, 2, 16)
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(len(codes), -1)
