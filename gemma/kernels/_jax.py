# SPDX-License-Identifier: Apache-2.0
"""Packed weights in JAX on a CPU: products and rows computed by the native kernels from the bytes of the file.

The functions trace to XLA custom calls, so they run inside `jit`, `scan`, `while_loop`, `vmap`, `grad` and
`checkpoint`; XLA passes pointers, no weight is copied or unpacked. The library behind the calls is opened by
`_shim_jax.py`. On other platforms there is no such call: `gemma/gm/nn/_packed.py` chooses, and decodes through XLA there.
Axis letters: M rows of activations (any leading axes), D inputs, O outputs, W bytes of a row.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import KernelError, ShapeError
from gemma.kernels import _native
from gemma.kernels._shim_jax import status, why_missing
from gemma.quants import QuantType

__all__ = ["available", "packed_matmul", "packed_rows", "status", "why_missing"]

Array = jax.Array


def available() -> bool:
    """Whether `packed_matmul` and `packed_rows` can be called in this process.

    The first call may compile the shim, which takes seconds, once for each version of jaxlib. Where that fails, a
    warning says once why JAX will be slower; not where the user turned the native kernels off.
    """
    return _available()


@functools.cache
def _available() -> bool:
    problem = why_missing()
    if problem is not None and _native.library() is not None:
        warnings.warn(f"{problem}; packed weights run through XLA, slower", RuntimeWarning, stacklevel=3)
    return problem is None


def packed_matmul(x: Array, data: Array, scale: Array | None = None, *, type: QuantType, cols: int) -> Array:
    """`x @ W.T` with a packed weight W [O, D].

    Differentiable in x, any number of times; the weight is a constant (its scale gets a gradient of zero). A batch axis
    of x that `vmap` adds becomes rows of one product; one of the weight is a loop over weights. The bits of a row of
    the result do not depend on the other rows.

    Args:
      x: float32 or bfloat16 [..., D].
      data: uint8 [O, W], the weight's bytes as in `gemma.quants.PackedTensor`.
      scale: float32 [O] of INT8 and INT4, [1] of SFP8; None for the others.
      type: how the weight is stored.
      cols: D.

    Returns:
      [..., O] in x's dtype; bfloat16 is rounded once.

    Raises:
      ShapeError: an operand of the wrong shape or dtype, when the call is traced.
      KernelError: there are no native kernels; see `why_missing`.
    """
    type = _checked(data, scale, type, cols)
    if x.dtype not in (jnp.float32, jnp.bfloat16) or x.ndim < 1 or x.shape[-1] != cols:
        raise ShapeError(f"x: expected float32 or bfloat16 [..., {cols}], got {x.dtype} {tuple(x.shape)}")
    return _functions(type, cols).product(x, data, scale)


def packed_rows(data: Array, scale: Array | None, ids: Array, *, type: QuantType, cols: int) -> Array:
    """`W[ids]` of a packed weight W [O, D] as float32: what an embedding does.

    Args:
      data, scale, type, cols: as in `packed_matmul`.
      ids: integers [...]. As in numpy, negative ids count from the end; those beyond an end give that end's row.

    Returns:
      float32 [..., D], equal to `gemma.quants` bit for bit. No gradient flows through it.

    Raises:
      ShapeError, KernelError: as in `packed_matmul`.
    """
    type = _checked(data, scale, type, cols)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ShapeError(f"ids: expected integers, got {ids.dtype} {tuple(ids.shape)}")
    if data.shape[0] == 0:
        raise ShapeError("data: expected a weight with rows, got none")
    return _functions(type, cols).rows(ids.astype(jnp.int32), data, scale)


def _checked(data: Array, scale: Array | None, type: QuantType, cols: int) -> QuantType:
    """Refuses, while tracing, what does not make a weight."""
    if not isinstance(type, QuantType):
        raise ShapeError(f"type: expected a gemma.quants.QuantType, got {type!r}")
    expected = type.row_bytes(cols)
    if data.dtype != jnp.uint8 or data.ndim != 2 or data.shape[1] != expected:
        raise ShapeError(
            f"data: expected uint8 [rows, {expected}] for rows of {cols} {type.name} values, "
            f"got {data.dtype} {tuple(data.shape)}"
        )
    wanted = None if not type.has_scale else (1,) if type is QuantType.SFP8 else (data.shape[0],)
    got = None if scale is None else (str(scale.dtype), tuple(scale.shape))
    if got != (None if wanted is None else ("float32", wanted)):
        raise ShapeError(f"scale: {type.name} needs {f'float32 {wanted}' if wanted else 'none'}, got {got}")
    if not available():
        raise KernelError(f"packed weights need the native kernels here: {why_missing()}")
    return type


class _Functions(NamedTuple):
    """The three calls over weights of one type and width; each takes (x, dy or ids), data, scale."""

    product: Callable[..., Array]
    gradient: Callable[..., Array]
    rows: Callable[..., Array]


@functools.cache
def _functions(type: QuantType, cols: int) -> _Functions:
    product = _call("gemmakit_matmul", type, cols, lambda x, data: ((*x.shape[:-1], data.shape[0]), x.dtype))
    gradient = _call("gemmakit_matmul_grad", type, cols, lambda dy, data: ((*dy.shape[:-1], cols), jnp.float32))
    rows = _call("gemmakit_rows", type, cols, lambda ids, data: ((*ids.shape, cols), jnp.float32))

    # Each of the two products is linear, and the other one is its transpose.
    def backwards_of_product(weight, dy):
        return functions.gradient(dy.astype(jnp.float32), *weight).astype(dy.dtype), None, None

    def backwards_of_gradient(weight, dx):
        return functions.product(dx, *weight), None, None

    def backwards_of_rows(zeros, out):
        return zeros, None, None

    functions = _Functions(
        _differentiable(product, lambda x, *weight: weight, backwards_of_product),
        _differentiable(gradient, lambda dy, *weight: weight, backwards_of_gradient),
        _differentiable(rows, lambda ids, *weight: np.zeros(ids.shape, jax.dtypes.float0), backwards_of_rows),
    )
    return functions


def _differentiable(function: Callable[..., Array], kept: Callable[..., Any], backwards: Callable[..., Any]):
    wrapped = jax.custom_vjp(function)
    wrapped.defvjp(lambda *args: (wrapped(*args), kept(*args)), backwards)
    return wrapped


def _call(target: str, type: QuantType, cols: int, result: Callable[[Array, Array], tuple]) -> Callable[..., Array]:
    """A custom call as a function of (x, data, scale) that `vmap` understands."""
    attributes = dict(type=np.int32(_native.TYPE_IDS[type]), cols=np.int64(cols))

    @jax.custom_batching.custom_vmap
    def call(x, data, scale):
        out = jax.ShapeDtypeStruct(*result(x, data))
        operands = (x, data) if scale is None else (x, data, scale)
        return jax.ffi.ffi_call(target, out)(*operands, **attributes)

    @call.def_vmap
    def of_batch(axis_size, batched, x, data, scale):
        of_x, of_data, of_scale = batched
        if not of_data and not of_scale:
            return call(x, data, scale), True  # the call takes any leading axes

        def one(index):
            picked = [leaf[index] if many else leaf for leaf, many in ((x, of_x), (data, of_data), (scale, of_scale))]
            return call(*picked)

        return jax.lax.map(one, jnp.arange(axis_size)), True

    return call
