# SPDX-License-Identifier: Apache-2.0
"""Blocks of every quantized type to float32 in JAX: the same bits as `gemma.quants`, inside of a compiled program.

Each decoder takes uint8 [..., blocks, block_bytes] and gives float32 [..., blocks, block_size]. XLA may fuse a product
and a sum into one rounding; no result depends on that, because every product that is added to is exact in float32 (a
half times a 6-bit scale times a 5-bit code has 22 bits). Which weight is packed how is `_packed.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from gemma.gm.typing import Array
from gemma.quants import QuantType


def decode(data: Array, type: QuantType) -> Array:
    """Rows of codes, uint8 [*R, row_bytes], to unscaled float32 [*R, columns]; INT8, INT4, SFP8 still lack their scale."""
    raw = data.reshape(*data.shape[:-1], -1, type.block_bytes)
    return _DECODERS[type.name](raw).reshape(*data.shape[:-1], -1)


def _half(raw: Array, at: int) -> Array:
    """The fp16 number at byte `at` of each block, float32 [..., 1]."""
    return jax.lax.bitcast_convert_type(raw[..., at : at + 2], jnp.float16).astype(jnp.float32)[..., None]


def _signed(raw: Array) -> Array:
    return jax.lax.bitcast_convert_type(raw, jnp.int8)


def _floats(codes: Array) -> Array:
    return codes.astype(jnp.float32)


def _planes(raw: Array, shifts: tuple[int, ...], mask: int) -> Array:
    """`(byte >> shift) & mask` for each shift in turn: [..., w] to [..., shifts, w]."""
    return jnp.stack([(raw >> shift) & mask for shift in shifts], axis=-2)


def _flat(array: Array) -> Array:
    """[..., n, w] to [..., n * w]."""
    return array.reshape(*array.shape[:-2], -1)


def _nibbles(raw: Array) -> Array:
    """16 bytes of two codes each, in the order of Q4_0: first all low nibbles, then all high ones."""
    return _flat(_planes(raw, (0, 4), 15))


def _bits(raw: Array) -> Array:
    """[..., w] bytes to [..., 8 * w] bits, lowest first."""
    return _flat(jnp.stack([(raw >> bit) & 1 for bit in range(8)], axis=-1))


def _spread(scale: Array, width: int) -> Array:
    """One number for each `width` elements: [..., n] to [..., n * width]."""
    return jnp.repeat(scale, width, axis=-1)


def _f32(raw: Array) -> Array:
    return jax.lax.bitcast_convert_type(raw, jnp.float32)[..., None]


def _f16(raw: Array) -> Array:
    return _half(raw, 0)


def _bf16(raw: Array) -> Array:
    return jax.lax.bitcast_convert_type(raw, jnp.bfloat16).astype(jnp.float32)[..., None]


def _q8_0(raw: Array) -> Array:
    return _floats(_signed(raw[..., 2:])) * _half(raw, 0)


def _q4_0(raw: Array) -> Array:
    return (_floats(_nibbles(raw[..., 2:])) - 8) * _half(raw, 0)


def _q4_1(raw: Array) -> Array:
    return _floats(_nibbles(raw[..., 4:])) * _half(raw, 0) + _half(raw, 2)


def _q5_0(raw: Array) -> Array:
    codes = _nibbles(raw[..., 6:]) | (_bits(raw[..., 2:6]) << 4)
    return (_floats(codes) - 16) * _half(raw, 0)


def _q5_1(raw: Array) -> Array:
    codes = _nibbles(raw[..., 8:]) | (_bits(raw[..., 4:8]) << 4)
    return _floats(codes) * _half(raw, 0) + _half(raw, 2)


def _scale_min(raw: Array) -> tuple[Array, Array]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K."""
    low, mid, high = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scale = jnp.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1)
    return scale, jnp.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=-1)


def _affine(codes: Array, width: int, scale: Array, minimum: Array) -> Array:
    return _floats(codes) * _spread(scale, width) - _spread(minimum, width)


def _q4_k(raw: Array) -> Array:
    codes = _planes(raw[..., 16:].reshape(*raw.shape[:-1], 4, 32), (0, 4), 15)
    scale, minimum = _scale_min(raw)
    codes = _flat(_flat(codes))
    return _affine(codes, 32, _half(raw, 0) * _floats(scale), _half(raw, 2) * _floats(minimum))


def _q5_k(raw: Array) -> Array:
    codes = _planes(raw[..., 48:].reshape(*raw.shape[:-1], 4, 32), (0, 4), 15)
    codes = _flat(_flat(codes)) | (_flat(_planes(raw[..., 16:48], tuple(range(8)), 1)) << 4)
    scale, minimum = _scale_min(raw)
    return _affine(codes, 32, _half(raw, 0) * _floats(scale), _half(raw, 2) * _floats(minimum))


def _q2_k(raw: Array) -> Array:
    codes = _planes(raw[..., 16:80].reshape(*raw.shape[:-1], 2, 32), (0, 2, 4, 6), 3)
    scale, minimum = raw[..., :16] & 15, raw[..., :16] >> 4
    codes = _flat(_flat(codes))
    return _affine(codes, 16, _half(raw, 80) * _floats(scale), _half(raw, 82) * _floats(minimum))


def _q3_k(raw: Array) -> Array:
    low = _flat(_flat(_planes(raw[..., 32:96].reshape(*raw.shape[:-1], 2, 32), (0, 2, 4, 6), 3)))
    high = _flat(_planes(raw[..., :32], tuple(range(8)), 1))
    codes = _floats(low | (high << 2)) - 4
    packed = raw[..., 96:108]
    scale = _flat(_planes(packed[..., :8], (0, 4), 15)) | (_flat(_planes(packed[..., 8:], (0, 2, 4, 6), 3)) << 4)
    return codes * _spread(_half(raw, 108) * (_floats(scale) - 32), 16)


def _q6_k(raw: Array) -> Array:
    low = _planes(raw[..., :128].reshape(*raw.shape[:-1], 2, 64), (0, 4), 15)
    high = _planes(raw[..., 128:192].reshape(*raw.shape[:-1], 2, 32), (0, 2, 4, 6), 3)
    codes = _flat(_flat(low)) | (_flat(_flat(high)) << 4)
    scale = _half(raw, 208) * _floats(_signed(raw[..., 192:208]))
    return (_floats(codes) - 32) * _spread(scale, 16)


def _sfp8(raw: Array) -> Array:
    """The top half of a float32, put together from the bits of the code."""
    code = raw.astype(jnp.uint32)
    value = code & 127
    small, large = (value << 5) + (0x34 << 8), (value << 4) + (0x38 << 8)
    bits = jnp.where(value >= 64, large, small) | ((code >> 7) << 15)
    return jax.lax.bitcast_convert_type(jnp.where(value == 0, jnp.uint32(0), bits << 16), jnp.float32)


def _int8(raw: Array) -> Array:
    return _floats(_signed(raw))


def _int4(raw: Array) -> Array:
    return _floats(_nibbles(raw)) - 8


_DECODERS: dict[str, Callable[[Array], Array]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "SFP8": _sfp8,
    "INT8": _int8,
    "INT4": _int4,
}
