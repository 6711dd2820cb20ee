# SPDX-License-Identifier: Apache-2.0
"""The layers that hold one parameter each: a weight with its einsum, and the norm. Blocks of them are in `_modules.py`.

Activations keep the dtype of the weights. `dtype` is always the dtype in which a parameter is created, float32 unless
given; a parameter that is passed in keeps its own. Axis letters are those of docs/axes.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gemma.errors import ShapeError
from gemma.gm.nn import _equation
from gemma.gm.nn._packed import Packed
from gemma.gm.typing import Array, DType, Float


def common_dtype(x: Array, w: Array) -> jnp.dtype:
    """The dtype in which activations `x` meet weights `w`: the wider float of the two; integers take the weight's."""
    if x.dtype == w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        return w.dtype
    if x.dtype.itemsize == w.dtype.itemsize:  # bfloat16 and float16: neither holds the other
        return jnp.dtype(jnp.float32)
    return max(x.dtype, w.dtype, key=lambda dtype: dtype.itemsize)


def along_last(vector: Float[Array, " D"], x: Float[Array, "*B D"]) -> Array:
    """A vector with the axes of `x`, of length one but for the last, in the dtype of `x`."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def weight_einsum(eqn: str, x: Array, w: Array | Packed, *, accumulate: DType | None = None) -> Array:
    """`jnp.einsum(eqn, x, w)`; every product with a weight goes through here.

    The weight is only reshaped, never transposed: XLA would otherwise copy the whole of it in every decoding step.

    Args:
      eqn: the equation, activations first.
      x: activations.
      w: weight, an array or packed.
      accumulate: dtype of the sum and of the result; None: the dtype of the operands.

    Raises:
      ShapeError: (a ValueError) the axes that are summed over differ in size.
    """
    if isinstance(w, Packed):
        return w.einsum(eqn, x, accumulate=accumulate)
    dtype = common_dtype(x, w)
    x, w = x.astype(dtype), w.astype(dtype)
    roles = _equation.roles(eqn)
    if roles is None:
        return jnp.einsum(eqn, x, w, preferred_element_type=accumulate)
    lead, contracted, ahead = roles
    rows, summed = x.shape[: x.ndim - contracted], x.shape[x.ndim - contracted :]
    tail = w.shape[lead + contracted :]
    if summed != w.shape[lead : lead + contracted]:
        raise ShapeError(f"einsum {eqn!r}: activations {x.shape} do not fit the weight {w.shape}")
    size = math.prod(summed)
    x = x.reshape(-1, size)
    if lead and tail:
        if x.shape[0] > _FEW_ROWS:
            return jnp.einsum(eqn, x.reshape(*rows, *summed), w, preferred_element_type=accumulate)
        w3 = w.reshape(-1, size, math.prod(tail))
        x3 = jnp.broadcast_to(x[None], (w3.shape[0], *x.shape))
        y = jax.lax.dot_general(x3, w3, (((2,), (1,)), ((0,), (0,))), preferred_element_type=accumulate)
        y = jnp.swapaxes(y, 0, 1)
    else:
        w2 = w.reshape(-1, size) if lead else w.reshape(size, -1)
        y = _product(x, w2, 1 if lead else 0, accumulate)
    y = y.reshape(*rows, *w.shape[:lead], *tail)
    return jnp.moveaxis(y, range(len(rows), len(rows) + ahead), range(ahead)) if ahead else y


# Up to so many rows, a weight whose summed axis is in its middle is multiplied once per leading index; for more rows,
# one transposed copy of the weight costs less than the copies of the activations.
_FEW_ROWS = 64


# On a CPU, for 2 to so many rows, XLA's product is 1.5 to 3 times as fast with the weight as its left operand, and with
# a summed last axis if the weight is given in blocks that stay in the second-level cache.
_SWAP_ROWS = 32
_BLOCK = 2048


def _product(x: Float[Array, "R D"], w: Array, axis: int, accumulate: DType | None) -> Float[Array, "R E"]:
    """`x` times a weight with two axes, of which `axis` is summed over."""
    few = 1 < x.shape[0] <= _SWAP_ROWS and jax.default_backend() == "cpu"
    if few and axis == 0:
        return jax.lax.dot_general(w, x, (((0,), (1,)), ((), ())), preferred_element_type=accumulate).T
    if few and w.shape[0] % _BLOCK == 0:
        blocks = w.reshape(-1, _BLOCK, w.shape[1])
        columns = jnp.broadcast_to(x.T[None], (blocks.shape[0], *x.T.shape))
        y = jax.lax.dot_general(blocks, columns, (((2,), (1,)), ((0,), (0,))), preferred_element_type=accumulate)
        return jnp.moveaxis(y, 2, 0).reshape(x.shape[0], -1)
    return jax.lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=accumulate)


def parameter(
    module: nn.Module, name: str, initializer: Callable[..., Array], shape: tuple[int, ...], dtype: DType
) -> Any:
    """`module.param`, for a weight that may be packed: what stands in its place is checked by the shape it stands for."""
    if module.has_variable("params", name):
        value = module.get_variable("params", name)
        if isinstance(value, Packed):
            if value.shape != tuple(shape):
                path = "/".join((*module.path, name))
                raise ShapeError(f"{path}: expected a weight of shape {tuple(shape)}, got {value!r}")
            return value
    return module.param(name, initializer, shape, dtype)


class Einsum(nn.Module):
    """A weight, and the einsum of activations with it.

    Attributes:
      shape: of the weight.
      weight_name: of the parameter.
      initializer: `f(key, shape, dtype)`.
      dtype: in which the parameter is created; None: float32.
    """

    shape: tuple[int, ...]
    weight_name: str = "w"
    initializer: Callable[..., Array] = nn.initializers.normal()
    dtype: DType | None = None

    @nn.compact
    def __call__(self, eqn: str, x: Array) -> Array:
        w = parameter(self, self.weight_name, self.initializer, self.shape, self.dtype or jnp.float32)
        return weight_einsum(eqn, x, w)


class RMSNorm(nn.Module):
    """Root-mean-square norm, `x / sqrt(mean(x**2) + eps) * (1 + scale)` over the last axis.

    Computed in float32 whatever the dtype of x, and returned in that dtype. Equivalent to Gemma3RMSNorm of Hugging
    Face transformers, with `plus_one=False` to Gemma3nRMSNorm.

    Attributes:
      eps: added to the mean square.
      dtype: in which the scale is created; None: float32.
      plus_one: False: the factor is `scale` itself, created as ones.
      with_scale: False: there is no scale.
    """

    eps: float = 1e-6
    dtype: DType | None = None
    plus_one: bool = True
    with_scale: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if not self.with_scale:
            return (wide * inverse).astype(x.dtype)
        initializer = nn.initializers.zeros_init() if self.plus_one else nn.initializers.ones_init()
        scale = self.param("scale", initializer, (x.shape[-1],), self.dtype or jnp.float32).astype(jnp.float32)
        scale = (1 + scale if self.plus_one else scale).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * inverse * scale).astype(x.dtype)
