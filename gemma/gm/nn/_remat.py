# SPDX-License-Identifier: Apache-2.0
"""`checkpoint`: a layer that is computed a second time in the backward pass instead of being remembered, on CPUs, too.

`jax.checkpoint` keeps the two computations apart by a barrier. XLA's compiler for CPUs drops barriers and then orders
the second computation of every layer before the first gradient, so that all activations are alive at once and nothing
is saved. Here what was kept is made to depend on the gradient that the second computation is for: something that is
zero, but not before the gradient is there, is added to it. Which layers it is put around is `_transformer.py`'s choice.
Axis letters: B batch, T tokens, D width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import lift
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from gemma.gm.typing import Array

Policy = Callable[..., bool]

_NARROW = 128  # products over fewer values than that are those of an adapter's rank: cheap


def products(primitive: Any, *operands: Any, **options: Any) -> bool:
    """A policy: keeps what cost much, products with weights. Adapters' second products and attention are done again."""
    if primitive is not jax.lax.dot_general_p:
        return False
    (contracted, _), (batched, _) = options["dimension_numbers"]
    return not batched and math.prod(operands[0].shape[axis] for axis in contracted) >= _NARROW


def checkpoint(function: Callable[..., Any], policy: Policy | None = None) -> Callable[..., Any]:
    """`function(module, x, *args)`, which keeps little for its backward pass. Only for reverse mode, once.

    Args:
      function: x and the first array in floats that it returns are activations [B, T, ...]. Every argument is a pytree
        of arrays; variables and random keys of the module are handed on.
      policy: what is kept besides the arguments, as for `jax.checkpoint`.
    """
    return nn.transforms.lift_transform(_lifted, function, policy=policy)


def _lifted(function: Callable[..., Any], policy: Policy | None) -> Callable[..., Any]:
    def inner(scope_of: Callable, packed: Callable, variables: Any, keys: Any, *args: Any) -> Any:
        def call(variables: Any, keys: Any, *args: Any) -> Any:
            scope = scope_of(variables, keys)
            return function(scope, *args), packed(scope)

        if jax.default_backend() != "cpu":
            return jax.checkpoint(call, policy=policy)(variables, keys, *args)
        return _again(call, policy, (variables, keys, *args))

    return lift.pack(inner, (True,), (True,), (True,), name="remat")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _again(call: Callable[..., Any], policy: Policy | None, args: Any) -> Any:
    return call(*args)


@flax.struct.dataclass
class _Kept:
    """What the backward pass is given: the function that `jax.vjp` made, a pytree, and which arguments it is about."""

    back: Any
    wanted: tuple[bool, ...] = flax.struct.field(pytree_node=False)
    tree: Any = flax.struct.field(pytree_node=False)


def _forwards(call: Callable[..., Any], policy: Policy | None, args: Any) -> tuple[Any, _Kept]:
    leaves, tree = jax.tree.flatten(args, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal))
    values, wanted = [leaf.value for leaf in leaves], tuple(bool(leaf.perturbed) for leaf in leaves)

    def of(chosen: list[Array]) -> Any:
        rest = iter(chosen)
        return call(*jax.tree.unflatten(tree, [next(rest) if w else value for w, value in zip(wanted, values)]))

    chosen = [value for w, value in zip(wanted, values) if w]
    out, back = jax.vjp(jax.checkpoint(of, policy=policy), chosen)
    return out, _Kept(back, wanted, tree)


def _backwards(call: Callable[..., Any], policy: Policy | None, kept: _Kept, upstream: Any) -> tuple[Any]:
    del call, policy
    upstream = jax.tree.map(_filled, upstream, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    gradient = next(leaf for leaf in jax.tree.leaves(upstream) if jnp.issubdtype(leaf.dtype, jnp.floating))
    # Zero, or NaN where the gradient is, in the axes B and T: in no other is an activation cut over devices for sure.
    first = gradient[(..., *(0,) * (gradient.ndim - 2))]
    late = jnp.where(jnp.isnan(first), first, 0)

    def tied(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # what dropout draws is as large as what it drops
            data = jax.random.key_data(leaf) + jnp.any(jnp.isnan(first)).astype(jnp.uint32)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf  # a mask
        at = next((i for i in range(leaf.ndim - 1) if leaf.shape[i : i + 2] == late.shape), None)
        if at is not None:
            return leaf + late.reshape(*(1,) * at, *late.shape, *(1,) * (leaf.ndim - 2 - at)).astype(leaf.dtype)
        if leaf.ndim and leaf.shape[0] == late.size:  # a product that is kept, with B and T in one axis
            return leaf + late.reshape(-1, *(1,) * (leaf.ndim - 1)).astype(leaf.dtype)
        return leaf  # a weight, which every layer has of its own

    grads = iter(jax.tree.map(tied, kept.back)(upstream)[0])
    return (jax.tree.unflatten(kept.tree, [next(grads) if w else None for w in kept.wanted]),)


def _filled(leaf: Any) -> Any:
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, SymbolicZero) else leaf


_again.defvjp(_forwards, _backwards, symbolic_zeros=True)
