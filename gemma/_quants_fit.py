# SPDX-License-Identifier: Apache-2.0
"""The searches behind the quantized types: the scale (and minimum) of many small blocks at once, as ggml picks them.

Every function works on columns: float32 [k, m] holds m blocks of k values, so that each step is one pass over
contiguous memory and a sum over a block is a sum over the first axis. Which bytes come of it is `_quants_encode.py`
and `_quants_encode_k.py`. Rounding is half to even, sums are float32 in another order than ggml's: a block whose two
best candidates are a rounding error apart may end with the other one.
"""

from __future__ import annotations

import numpy as np

_TINY = np.float32(1e-15)  # a block whose largest magnitude is below this is zero


def columns(x: np.ndarray, size: int) -> np.ndarray:
    """float32 [n, c] to contiguous [size, n * c / size], one column for each run of `size` values."""
    return np.ascontiguousarray(x.reshape(-1, size).T)


def rows(codes: np.ndarray, count: int) -> np.ndarray:
    """Codes in columns back to contiguous uint8 [count, values of each]."""
    return np.ascontiguousarray(codes.astype(np.uint8).T).reshape(count, -1)


def _dot(*factors: np.ndarray) -> np.ndarray:
    """Sum over the first axis of a product, float32 [m]."""
    return np.einsum(",".join(["ij"] * len(factors)) + "->j", *factors)


def _safe(divisor: np.ndarray) -> np.ndarray:
    """Infinity in place of zero: what is divided by it becomes zero, which is what a zero scale means."""
    return np.where(divisor == 0, np.float32(np.inf), divisor)


def fit_with_min(x, w, top: int, trials: tuple[float, float, int], absolute: bool = False):
    """Scale and minimum of x ~ scale * code + low with codes 0..top and low <= 0, by weighted least squares.

    Args:
      x, w: float32 [k, m]: values and their weights.
      top: the largest code.
      trials: (first, step, count): the divisors of the range that are tried are top + first + step * i.
      absolute: judge by the weighted sum of absolute errors instead of squares.

    Returns:
      (scale, low, codes): float32 [m], float32 [m] and a function that gives the codes of the fit, float32 [k, m].
    """
    low, high = np.minimum(x.min(axis=0), np.float32(0)), x.max(axis=0)
    flat = high <= low
    sum_w, sum_x, limit = w.sum(axis=0), _dot(w, x), np.float32(top)
    factor = np.where(flat, np.float32(0), limit / np.where(flat, np.float32(1), high - low))
    scale = np.where(flat, np.float32(0), 1 / _safe(factor))
    codes, scratch = np.empty_like(x), np.empty_like(x)
    kept_factor, kept_low = factor, low

    def encode(factor, low):
        np.multiply(x, factor, out=codes)
        np.subtract(codes, low * factor, out=codes)
        np.rint(codes, out=codes)
        return np.clip(codes, np.float32(0), limit, out=codes)

    def error(scale, low):
        np.multiply(codes, scale, out=scratch)
        np.add(scratch, low, out=scratch)
        np.subtract(scratch, x, out=scratch)
        return _dot(w, np.abs(scratch, out=scratch)) if absolute else _dot(w, scratch, scratch)

    encode(factor, low)
    best = error(scale, low)
    first, step, count = trials
    for i in range(count):
        span = high - low
        factor = (np.float32(first) + np.float32(step) * np.float32(i) + limit) / np.where(span > 0, span, np.inf)
        encode(factor, low)
        np.multiply(w, codes, out=scratch)
        sum_l, sum_l2, sum_xl = scratch.sum(axis=0), _dot(scratch, codes), _dot(scratch, x)
        det = sum_w * sum_l2 - sum_l * sum_l
        inverse = 1 / np.where(det > 0, det, np.inf)
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) * inverse
        new_scale = (sum_w * sum_xl - sum_x * sum_l) * inverse
        above = new_low > 0
        new_low = np.where(above, np.float32(0), new_low)
        new_scale = np.where(above, sum_xl / _safe(sum_l2), new_scale)
        new_error = error(new_scale, new_low)
        better = (det > 0) & (new_error < best) & ~flat
        best, scale = np.where(better, new_error, best), np.where(better, new_scale, scale)
        kept_factor, kept_low = np.where(better, factor, kept_factor), np.where(better, low, kept_low)
        low = np.where(better, new_low, low)
    return scale, low, lambda: encode(kept_factor, kept_low)


def _largest(x: np.ndarray) -> np.ndarray:
    """The signed value of largest magnitude of each column, the first one where several are; float32 [m]."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]


def fit_signed(x, w, levels: int):
    """Scale of x ~ scale * code with codes -levels .. levels - 1, by weighted least squares over 19 divisors.

    Returns:
      (scale, codes): float32 [m], and a function that gives code + levels, float32 [k, m].
    """
    peak = _largest(x)
    empty = np.abs(peak) < _TINY
    peak = np.where(empty, np.float32(np.inf), peak)
    codes, wx = np.empty_like(x), w * x

    def encode(factor):
        np.multiply(x, factor, out=codes)
        np.rint(codes, out=codes)
        return np.clip(codes, np.float32(-levels), np.float32(levels - 1), out=codes)

    def sums(factor):
        encode(factor)
        return _dot(wx, codes), _dot(w, codes, codes)

    kept = np.float32(-levels) / peak
    sum_xl, sum_l2 = sums(kept)
    scale = sum_xl / _safe(sum_l2)
    best = scale * sum_xl
    for i in (*range(-9, 0), *range(1, 10)):
        factor = -(np.float32(levels) + np.float32(0.1) * np.float32(i)) / peak
        sum_xl, sum_l2 = sums(factor)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        kept, scale = np.where(better, factor, kept), np.where(better, sum_xl / _safe(sum_l2), scale)
        best = np.where(better, scale * sum_xl, best)
    scale = np.where(empty, np.float32(0), scale)
    return scale, lambda: np.where(empty, np.float32(levels), encode(kept) + np.float32(levels))


def _descend(x, w, codes, low: int, high: int, positive: bool) -> tuple[np.ndarray, np.ndarray]:
    """Up to five sweeps that move one code at a time where that raises the fit; codes [k, m] change in place.

    Returns:
      (sum_xl, sum_l2), whose quotient is the scale.
    """
    wx = w * x
    sum_xl, sum_l2 = _dot(wx, codes), _dot(w, codes, codes)
    for _ in range(5):
        changed = False
        for i in range(len(x)):
            rest_xl, rest_l2 = sum_xl - wx[i] * codes[i], sum_l2 - w[i] * codes[i] * codes[i]
            usable = (rest_xl > 0) & (rest_l2 > 0 if positive else True)
            new = np.rint(np.where(usable, x[i] * rest_l2 / np.where(usable, rest_xl, 1), 0))
            new = np.clip(new, np.float32(low), np.float32(high))
            new_xl, new_l2 = rest_xl + wx[i] * new, rest_l2 + w[i] * new * new
            better = usable & (new != codes[i]) & (new_l2 > 0)
            better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            if better.any():
                changed = True
                codes[i] = np.where(better, new, codes[i])
                sum_xl, sum_l2 = np.where(better, new_xl, sum_xl), np.where(better, new_l2, sum_l2)
        if not changed:
            break
    return sum_xl, sum_l2


def fit_descending(x, levels: int) -> np.ndarray:
    """Scale of x ~ scale * code with codes -levels .. levels - 1 and weights x**2, by coordinate descent; [m]."""
    peak = _largest(x)
    empty = np.abs(peak) < _TINY
    factor = np.float32(-levels) / np.where(empty, np.float32(np.inf), peak)
    codes = np.clip(np.rint(x * factor), np.float32(-levels), np.float32(levels - 1))
    sum_xl, sum_l2 = _descend(x, x * x, codes, -levels, levels - 1, positive=False)
    return np.where(empty, np.float32(0), sum_xl / _safe(sum_l2))


def fit_positive(x, w, top: int) -> tuple[np.ndarray, np.ndarray]:
    """(scale [m], codes [k, m] in 0..top) of x ~ scale * code for x >= 0: a search, then coordinate descent."""
    peak = np.maximum(x.max(axis=0), np.float32(0))
    empty = peak < _TINY
    peak = np.where(empty, np.float32(np.inf), peak)
    kept, best = None, None
    for i in (0, -4, -3, -2, -1, 1, 2, 3, 4):
        factor = (np.float32(0.1) * np.float32(i) + np.float32(top)) / peak
        codes = np.clip(np.rint(x * factor), 0, np.float32(top))
        difference = x - codes / _safe(factor)
        error = _dot(w, difference, difference)
        better = True if best is None else error < best
        kept = factor if best is None else np.where(better, factor, kept)
        best = error if best is None else np.where(better, error, best)
    codes = np.clip(np.rint(x * kept), 0, np.float32(top)).astype(np.float32)
    sum_xl, sum_l2 = _descend(x, w, codes, 0, top, positive=True)
    return np.where(empty, np.float32(0), sum_xl / _safe(sum_l2)), codes
