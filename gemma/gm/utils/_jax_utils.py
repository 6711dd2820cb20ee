# SPDX-License-Identifier: Apache-2.0
"""Leading batch dimensions: any number of them (none, one, several) is flattened to one and restored afterwards.

It knows shapes only; what the arrays mean is the caller's.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gemma.errors import ShapeError


def batch_shape(arrays: Mapping[str, tuple[jax.Array | None, int]]) -> tuple[int, ...]:
    """The batch shape that all given arrays share.

    Args:
      arrays: argument name to the array (or None, which is skipped) and the number of its trailing, non-batch axes.

    Raises:
      ShapeError (a ValueError): an array has too few axes, or the shapes differ.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, (array, trailing) in arrays.items():
        if array is None:
            continue
        if array.ndim < trailing:
            raise ShapeError(f"{name}: expected at least {trailing} axes, got the shape {tuple(array.shape)}")
        found[name] = tuple(array.shape[: array.ndim - trailing])
    if len(set(found.values())) != 1:
        raise ShapeError(f"Could not infer batch shape. Got conflicting values: {found}")
    return next(iter(found.values()))


def flatten_batch(array: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """`[*shape, ...]` to `[B, ...]` with B the product of `shape` (1 for no batch dimension)."""
    return None if array is None else jnp.reshape(array, (math.prod(shape), *array.shape[len(shape) :]))


def unflatten_batch(array: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """`[B, ...]` back to `[*shape, ...]`."""
    return None if array is None else jnp.reshape(array, (*shape, *array.shape[1:]))
