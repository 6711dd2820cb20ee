# SPDX-License-Identifier: Apache-2.0
"""The methods of quantization-aware training, and what each makes of a weight: the numbers that the file will hold.

`on_grid` rounds a matrix to exactly what `gemma.quants` decodes from its bytes, in float32 bit for bit, inside of a
compiled program. Two traps of XLA are avoided: it may fuse a product and a sum into one rounding, so no product here is
added to; and it turns the division by a constant into a product, so divisors are hidden from it. Which axes are rows
is the weight table's business; raw arrays are `_quantization.py`.
"""

from __future__ import annotations

import enum

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import ConfigError, ShapeError
from gemma.gm.nn import _packed_decode
from gemma.gm.typing import Array
from gemma.quants import QuantType

BLOCK = 32
_SFP8_MAX = 1.875


class QuantizationMethod(enum.StrEnum):
    """How weights are rounded; found by name in any case.

    NONE: not at all. INT4, INT8: symmetric, a scale for each output. Q4_0: 4 bits, a half-precision scale for each 32
    inputs. Q4_0_TRANSPOSE: the same with the last two axes of a raw array swapped; for a model there is no difference.
    SFP8: 8-bit floats with a scale for each tensor.
    """

    NONE = "none"
    INT4 = "int4"
    INT8 = "int8"
    Q4_0 = "q4_0"
    Q4_0_TRANSPOSE = "q4_0_transpose"
    SFP8 = "sfp8"

    @classmethod
    def _missing_(cls, value):
        for member in cls:
            if str(value).lower() == member.value:
                return member
        raise ConfigError(f"method: expected one of {', '.join(cls)}, got {str(value)[:80]!r}")

    @property
    def recipe(self) -> str:
        """What `gemma quantize --to` and `load_params(quantize=...)` call the type of every matrix."""
        return {"q4_0": "q4_0_pure", "q4_0_transpose": "q4_0_pure"}.get(self.value, self.value)

    @property
    def type(self) -> QuantType | None:
        """The type of every matrix; None for NONE."""
        name = self.value.removesuffix("_transpose").upper()
        return QuantType.__members__.get(name)


def on_grid(rows: Array, method: QuantizationMethod, *, scale: Array | None = None, name: str = "weight") -> Array:
    """[outputs, inputs] to the values that its packed form stands for, float32; no gradient of its own.

    Args:
      rows: of any float dtype.
      method: not NONE.
      scale: of SFP8, float32 []; None: that of these rows alone.
      name: for the error.

    Raises:
      ShapeError: the rows are not whole blocks.
    """
    rows = rows.astype(jnp.float32)
    type = method.type
    if rows.shape[-1] % type.block_size:
        raise ShapeError(
            f"{name}: its rows of {rows.shape[-1]} values are not whole blocks of {type.block_size} ({method.value}); "
            f"use int8 or sfp8"
        )
    if type is QuantType.Q4_0:
        return _q4_0(rows.reshape(-1, BLOCK)).reshape(rows.shape)
    if type is QuantType.SFP8:
        return _sfp8(rows, sfp8_scale(peak(rows)) if scale is None else scale)
    return _channels(rows, 7 if type is QuantType.INT4 else 127)


def _hidden(value: float, like: Array) -> Array:
    """A constant that XLA does not know to be one: it depends on an array, in which NaN would spoil everything anyway."""
    return jnp.where(jnp.isnan(like), jnp.float32(1), jnp.float32(value))


def _channels(rows: Array, largest: int) -> Array:
    """Symmetric codes, half to even, with one scale for each row; a row of zeros stays zero."""
    high = jnp.max(jnp.abs(rows), axis=-1, keepdims=True)
    some = high > 0
    factor = jnp.where(some, jnp.float32(largest) / jnp.where(some, high, 1), 1)
    factor = jnp.where(jnp.isfinite(factor), factor, 0)
    scale = jnp.where(some, high / _hidden(largest, high), 1)
    return jnp.clip(jnp.round(rows * factor), -largest, largest) * scale


def _thresholds() -> np.ndarray:
    """float32 [15]: the smallest x for which the float32 sum x + 8.5, cut to an integer, is n = 1..15.

    The sum itself cannot be written down: fused with the product before it, it would round differently. It reaches n
    from half a unit in its last place below n on.
    """
    found = []
    for n in range(1, 16):
        below = np.spacing(np.nextafter(np.float32(n), np.float32(0))) / 2
        exact = np.float64(n) - 8.5 - np.float64(below)
        value = np.float32(exact)
        found.append(value if value >= exact else np.nextafter(value, np.float32(np.inf)))
    return np.array(found, np.float32)


_STEPS = _thresholds()


def _q4_0(blocks: Array) -> Array:
    """float32 [n, 32], one fp16 scale each: the value of largest magnitude, the first of equals, becomes code 0."""
    at = jnp.argmax(jnp.abs(blocks), axis=-1, keepdims=True)
    d = jnp.take_along_axis(blocks, at, axis=-1) * jnp.float32(-1 / 8)
    inverse = jnp.where(d == 0, 0, 1 / jnp.where(d == 0, 1, d))
    scaled = blocks * inverse
    codes = sum((scaled >= step).astype(jnp.float32) for step in _STEPS)
    return (codes - 8) * d.astype(jnp.float16).astype(jnp.float32)


def peak(rows: Array) -> Array:
    """The largest magnitude, float32 []."""
    return jnp.max(jnp.abs(rows.astype(jnp.float32)))


def sfp8_scale(largest: Array) -> Array:
    """The scale of a tensor, float32 []: 1 where its values fit, else what brings the largest to 1.875."""
    return jnp.where(largest <= _SFP8_MAX, 1, largest / _hidden(_SFP8_MAX, largest))


def _sfp8(rows: Array, scale: Array) -> Array:
    fitted = jnp.clip(rows / jnp.broadcast_to(scale, rows.shape), -_SFP8_MAX, _SFP8_MAX)
    bits = jax.lax.bitcast_convert_type(fitted, jnp.uint32)
    size = (bits & 0x7FFFFFFF).astype(jnp.int32)

    def rounded(mantissa_bits: int) -> Array:  # exponent and mantissa as one integer
        drop = 23 - mantissa_bits
        return (size + ((1 << (drop - 1)) - 1) + ((size >> drop) & 1)) >> drop

    large = rounded(3) - ((127 - 15) << 3)
    small = rounded(2) - ((127 - 23) << 2)
    small = jnp.where(small == 0, 1, jnp.maximum(small, 0))
    code = jnp.where(large >= 64, large, small).astype(jnp.uint8)
    sign = (bits >> 24).astype(jnp.uint8) & 0x80
    code = jnp.where(code == 0, jnp.uint8(0), code | sign)
    return _packed_decode.decode(code, QuantType.SFP8) * jnp.broadcast_to(scale, rows.shape)
