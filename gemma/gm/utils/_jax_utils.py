# SPDX-License-Identifier: Apache-2.0
"""Leading batch dimensions: any number of them (none, one, several) is flattened to one and restored afterwards.

It knows shapes only; what the arrays mean is the caller's. The networks call the functions; the decorator, which reads
annotations, is for modules of a user's own.
"""

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

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


def flatten_unflatten_batch_dim() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: a function written for one batch axis takes any number of them, or none.

      @flatten_unflatten_batch_dim()
      def f(x: Float[Array, "*b t d"], mask: Bool[Array, "*b t"], cache: Any): ...

    The batch shape follows from the annotated arguments. Every array of every argument, and of the result, has it.

    Raises:
      ShapeError: (a ValueError, when called) two arguments disagree, or an array does not begin with the batch shape.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            sizes = _get_argname_to_non_batch_dim_size(function)
            named = {name: (array, sizes[name]) for name, array in bound.arguments.items() if name in sizes}
            shape = batch_shape({name: pair for name, pair in named.items() if hasattr(pair[0], "ndim")})

            def flat(path: Any, leaf: Any) -> Any:
                if not hasattr(leaf, "ndim"):
                    return leaf
                if tuple(leaf.shape[: len(shape)]) != shape:
                    where = jax.tree_util.keystr(path)
                    raise ShapeError(
                        f"Inconsistent batch shape for argument {where!r}. Expected batch_shape: {shape}, got the shape "
                        f"{tuple(leaf.shape)}"
                    )
                return flatten_batch(leaf, shape)

            bound.arguments.update(jax.tree_util.tree_map_with_path(flat, dict(bound.arguments)))
            out = function(*bound.args, **bound.kwargs)
            return jax.tree.map(lambda leaf: unflatten_batch(leaf, shape) if hasattr(leaf, "ndim") else leaf, out)

        return wrapped

    return decorate


def _get_argname_to_non_batch_dim_size(function: Callable[..., Any]) -> dict[str, int]:
    """Argument name to the number of its trailing axes, for annotations `"*b ..."` that leave no doubt about it."""
    sizes = {}
    for name, hint in typing.get_type_hints(function).items():
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        found = {_trailing_axes(part) for part in (typing.get_args(hint) if union else (hint,))} - {None}
        if name != "return" and len(found) == 1:
            sizes[name] = found.pop()
    return sizes


def _trailing_axes(hint: Any) -> int | None:
    axes = getattr(hint, "dim_str", "").split()
    return len(axes) - 1 if axes and axes[0].startswith("*") else None
