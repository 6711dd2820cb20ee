# SPDX-License-Identifier: Apache-2.0
"""float32 rows to the super-blocks of Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, with or without an importance per input column.

A super-block is 256 values: 8 or 16 sub-blocks, each with a small integer scale (and minimum) that one or two fp16
numbers multiply. The searches are in `_quants_fit.py`; ggml's reference is followed in weights, trials and order, so the
error is its error. Encoders take float32 [n, 256] of finite values and return uint8 [n, block_bytes].
"""

from __future__ import annotations

import numpy as np

from gemma._quants_fit import columns, fit_descending, fit_positive, fit_signed, fit_with_min, rows

_SUPER = 256
_WITH_IMPORTANCE = (-0.9, 0.05, 37)  # trials of the types with a minimum, see fit_with_min
_TRIALS = {15: (-1.0, 0.1, 21), 31: (-0.5, 0.1, 16), 3: (-0.5, 0.1, 16)}  # by largest code


def _half(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounded to fp16: (bytes [n, 2], the rounded values as float32 [n]); what is too large is refused later."""
    with np.errstate(over="ignore"):
        halves = np.ascontiguousarray(values, np.float32).astype("<f2")
    return halves.view(np.uint8).reshape(-1, 2), halves.astype(np.float32)


def _shared(scale: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes 0..top of non-negative scales [n, s] and the float32 [n] that multiplies them; the largest gets `top`."""
    largest = np.maximum(scale.max(axis=1), np.float32(0))
    factor = np.where(largest > 0, np.float32(top) / np.where(largest > 0, largest, 1), np.float32(0))
    codes = np.clip(np.rint(scale * factor[:, None]), 0, np.float32(top))
    return largest / np.float32(top), codes


def _weights(x: np.ndarray, importance: np.ndarray, size: int, times: float) -> np.ndarray:
    """importance * sqrt(times * mean square of the super-block + x**2), in columns of `size`."""
    squares = x * x
    sigma2 = np.float32(times) * squares.mean(axis=1, keepdims=True)
    return columns(importance * np.sqrt(sigma2 + squares), size)


def _scales_and_minima(x, importance, size: int, top: int, shared_top: int, sigma: float):
    """What the types with a minimum share: values in columns, fp16 bytes of d and dmin, integer scales and minima.

    Returns:
      (values [size, m], scale codes [n, s], minimum codes [n, s], bytes of d, bytes of dmin, codes 0..top as rows).
    """
    values, n = columns(x, size), len(x)
    if importance is None:
        magnitude = np.abs(values)
        mean = np.sqrt((values * values).sum(axis=0) / np.float32(size))
        weights = magnitude if top == 3 else magnitude + mean
        scale, low, _ = fit_with_min(values, weights, top, _TRIALS[top], absolute=top == 3)
        d, scales = _shared(scale.reshape(n, -1), shared_top)
        dmin, minima = _shared(-low.reshape(n, -1), shared_top)
    else:
        weights = _weights(x, importance, size, sigma)
        scale, low, _ = fit_with_min(values, weights, top, _WITH_IMPORTANCE)
        total = weights.sum(axis=0).reshape(n, -1).T
        d, scales = fit_positive(scale.reshape(n, -1).T, total, shared_top)
        dmin, minima = fit_positive(-low.reshape(n, -1).T, total, shared_top)
        scales, minima = scales.T, minima.T
    (d_bytes, d), (min_bytes, dmin) = _half(d), _half(dmin)
    step, offset = (d[:, None] * scales).reshape(-1), (dmin[:, None] * minima).reshape(-1)
    codes = values + offset
    codes /= np.where(step == 0, np.float32(np.inf), step)
    codes = rows(np.clip(np.rint(codes, out=codes), 0, np.float32(top), out=codes), n)
    return scales.astype(np.uint8), minima.astype(np.uint8), d_bytes, min_bytes, codes


def _pack_six(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Eight 6-bit scales and minima to 12 bytes [n, 12]: the first four whole, the others split."""
    low_s, high_s, low_m, high_m = scales[:, :4], scales[:, 4:], minima[:, :4], minima[:, 4:]
    first = low_s | ((high_s >> 4) << 6)
    second = low_m | ((high_m >> 4) << 6)
    return np.concatenate([first, second, (high_s & 15) | ((high_m & 15) << 4)], axis=1)


def _nibbles(codes: np.ndarray, width: int) -> np.ndarray:
    """Low four bits: of each 2 * width codes the first half goes to low nibbles, the second to high ones."""
    parts = codes.reshape(len(codes), -1, 2, width) & np.uint8(15)
    return (parts[:, :, 0] | (parts[:, :, 1] << 4)).reshape(len(codes), -1)


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Two bits each, uint8 [n, 64]: byte l of a half of 128 holds elements l, l + 32, l + 64, l + 96."""
    parts = codes.reshape(len(codes), 2, 4, 32)
    return (parts[:, :, 0] | (parts[:, :, 1] << 2) | (parts[:, :, 2] << 4) | (parts[:, :, 3] << 6)).reshape(-1, 64)


def _planes(bits: np.ndarray) -> np.ndarray:
    """One bit each, uint8 [n, 32]: bit g of byte l belongs to element 32 * g + l."""
    return np.packbits(bits.reshape(len(bits), 8, 32), axis=1, bitorder="little").reshape(-1, 32)


def _q4_k(x, importance):
    scales, minima, d, dmin, codes = _scales_and_minima(x, importance, 32, 15, 63, 2.0)
    return np.concatenate([d, dmin, _pack_six(scales, minima), _nibbles(codes, 32)], axis=1)


def _q5_k(x, importance):
    scales, minima, d, dmin, codes = _scales_and_minima(x, importance, 32, 31, 63, 2.0)
    return np.concatenate([d, dmin, _pack_six(scales, minima), _planes(codes >> 4), _nibbles(codes, 32)], axis=1)


def _q2_k(x, importance):
    scales, minima, d, dmin, codes = _scales_and_minima(x, importance, 16, 3, 15, 1.0)
    return np.concatenate([scales | (minima << 4), _pairs(codes), d, dmin], axis=1)


def _signed(x, scale: np.ndarray, divisor: int, top: int, levels: int):
    """What the types without a minimum share, from the scales [n, 16] of the sub-blocks on.

    Returns:
      (integer scales [n, 16], bytes of d, codes as rows with `levels` added).
    """
    n = len(x)
    at = np.abs(scale).argmax(axis=1)[:, None]
    largest = np.take_along_axis(scale, at, axis=1)[:, 0]
    empty = np.abs(largest) < np.float32(1e-15)
    factor = np.where(empty, np.float32(0), np.float32(-divisor) / np.where(empty, 1, largest))
    d_bytes, d = _half(np.where(empty, np.float32(0), 1 / np.where(empty, np.float32(np.inf), factor)))
    scales = np.clip(np.rint(scale * factor[:, None]), np.float32(-divisor), np.float32(top))
    return _requantize(x, scales, d_bytes, d, levels, n)


def _requantize(x, scales, d_bytes, d, levels, n):
    step = (d[:, None] * scales).reshape(-1)
    codes = columns(x, 16)
    codes /= np.where(step == 0, np.float32(np.inf), step)
    codes = np.clip(np.rint(codes, out=codes), np.float32(-levels), np.float32(levels - 1), out=codes)
    codes += np.float32(levels)
    return scales, d_bytes, rows(codes, n)


def _q6_k(x, importance):
    values = columns(x, 16)
    weights = values * values if importance is None else columns(importance, 16)
    scale = fit_signed(values, weights, 32)[0].reshape(len(x), -1)
    scales, d, codes = _signed(x, scale, 128, 127, 32)
    high = _pairs(codes >> 4)
    return np.concatenate([_nibbles(codes, 64), high, scales.astype(np.int8).view(np.uint8), d], axis=1)


def _q3_k(x, importance):
    values, n = columns(x, 16), len(x)
    if importance is None:
        scales, d, codes = _signed(x, fit_descending(values, 4).reshape(n, -1), 32, 31, 4)
    else:
        weights = _weights(x, importance, 16, 2.0)
        scale, total = fit_signed(values, weights, 4)[0], weights.sum(axis=0)
        factor, shared = fit_signed(scale.reshape(n, -1).T, total.reshape(n, -1).T, 32)
        d_bytes, d = _half(factor)
        scales, d, codes = _requantize(x, shared().T - np.float32(32), d_bytes, d, 4, n)
    six = (scales + np.float32(32)).astype(np.uint8)
    top = (six >> 4).reshape(n, 4, 4)  # two bits of scale j: byte j % 4 at bit 2 * (j // 4)
    top = top[:, 0] | (top[:, 1] << 2) | (top[:, 2] << 4) | (top[:, 3] << 6)
    low = (six[:, :8] & 15) | ((six[:, 8:] & 15) << 4)
    return np.concatenate([_planes(codes >> 2), _pairs(codes & 3), low, top, d], axis=1)


ENCODERS_K = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
STEP = 1 << 18  # values encoded at a time: enough to make each numpy call long, few enough for a third-level cache


def encode_k(name: str, x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Super-blocks of float32 [n, 256], uint8 [n, block_bytes]; `importance` is float32 [n, 256] or None."""
    step, parts = STEP // _SUPER, []
    with np.errstate(all="ignore"):  # huge values overflow in sums; the scales are checked by the caller
        for start in range(0, len(x), step):
            part = np.s_[start : start + step]
            parts.append(ENCODERS_K[name](x[part], None if importance is None else importance[part]))
    return np.concatenate(parts)
