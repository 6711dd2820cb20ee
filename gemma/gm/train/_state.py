# SPDX-License-Identifier: Apache-2.0
"""What changes during a run (`State`), and how the trained leaves of a tree are told from the frozen ones.

    trainable, frozen = split_trainable(params, "lora")
    params = merge_trainable(frozen, trainable)        # inside a compiled step, too: it moves no array

Frozen leaves are arguments of the step beside the state, never part of it: they are neither copied, donated nor saved.
How a state is stepped is `_step.py`, how it is written to disk `_checkpoints.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gemma.errors import ConfigError
from gemma.gm.ckpts._load import insert
from gemma.gm.ckpts._orbax import flatten
from gemma.gm.typing import Array, DType, Params
from gemma.peft import _masks

Trainable = str | Iterable[str] | Callable[[str, Any], bool] | Mapping[str, Any]


@flax.struct.dataclass
class State:
    """Everything that a step replaces. A pytree of arrays: it can be donated, sharded and saved whole.

    Attributes:
      step: int32 []; steps taken, those that were skipped included: the number of batches that were used.
      params: the trained leaves, nested dictionaries without empty branches.
      opt_state: of optax.
      ema: float32, like `params`: their moving average; None without one.
      key: uint32, the data of a `jax.random.key`, which never changes; step n uses `fold_in(key, n)`.
      skipped: int32 []; steps that changed nothing because the loss or a gradient was not finite.
    """

    step: Array
    params: Any
    opt_state: Any
    ema: Any
    key: Array
    skipped: Array


class Split(NamedTuple):
    """Two trees without empty branches that share no leaf."""

    trainable: dict[str, Any]
    frozen: dict[str, Any]


def split_trainable(params: Params, trainable: Trainable) -> Split:
    """Takes the leaves that are trained out of a tree. A packed weight is one leaf.

    Args:
      params: nested dictionaries of arrays.
      trainable: roles and regular expressions as in `gemma.peft.label_tree` ("lora", "all", ("attention", "norm"));
        or a predicate of a leaf's slash name and the leaf; or a tree like `params` of truth values, or of labels of which
        "train" is trained. "all" means every leaf in floats.

    Raises:
      ConfigError: (a ValueError) nothing is left to train, a name that means no leaf, or packed weights among the chosen.
    """
    leaves = flatten(params)
    chosen = _chosen(params, leaves, trainable)
    split = Split({}, {})
    for name, leaf in leaves.items():
        insert(split.trainable if chosen[name] else split.frozen, name, leaf)
    if not split.trainable:
        raise ConfigError(
            f"trainable={trainable!r} chooses none of the {len(leaves)} leaves, such as {next(iter(leaves), '(none)')}"
        )
    return split


def merge_trainable(frozen: Params, trainable: Params) -> dict[str, Any]:
    """The inverse of `split_trainable`; no array is copied."""
    merged = dict(frozen)
    for key, value in trainable.items():
        below = merged.get(key)
        merged[key] = merge_trainable(below, value) if isinstance(below, Mapping) else value
    return merged


def _chosen(params: Params, leaves: Mapping[str, Any], trainable: Trainable) -> dict[str, bool]:
    if isinstance(trainable, Mapping):
        given = flatten(trainable)
        if set(given) != set(leaves):
            wrong = sorted(set(given) ^ set(leaves))
            raise ConfigError(f"trainable: expected a tree like the parameters; {wrong[0]} is in one of them only")
        return {name: value is True or value == "train" for name, value in given.items()}
    if callable(trainable):
        chosen = {name: bool(trainable(name, leaf)) for name, leaf in leaves.items()}
    else:
        shapes: dict[str, Any] = {}
        for name, leaf in leaves.items():
            insert(shapes, name, jax.ShapeDtypeStruct(leaf.shape, _stored(leaf)))
        if trainable in ("all", ("all",), ["all"]):
            return {name: jnp.issubdtype(leaf.dtype, jnp.floating) for name, leaf in flatten(shapes).items()}
        chosen = flatten(_masks.mask_tree(shapes, trainable))
    for name, leaf in leaves.items():
        if chosen[name] and not jnp.issubdtype(_stored(leaf), jnp.floating):
            raise ConfigError(f"{name}: packed weights cannot be trained; choose 'lora' or other leaves")
    return chosen


def _stored(leaf: Any) -> np.dtype:
    """The dtype of what is stored: integers for a packed weight, whose own `dtype` is that of its products."""
    stored = jax.tree.leaves(leaf)
    return jnp.dtype(leaf.dtype if len(stored) == 1 and stored[0] is leaf else stored[0].dtype)


def dtypes_of(tree: Any) -> Any:
    """A tree of dtypes, hashable leaves, like a tree of arrays."""
    return jax.tree.map(lambda leaf: jnp.dtype(leaf.dtype), tree)


def cast(tree: Any, dtypes: Any) -> Any:
    """A tree with other dtypes: one for all, a tree of them, or None: as it is."""
    if dtypes is None:
        return tree
    if not isinstance(dtypes, Mapping):
        dtypes = jax.tree.map(lambda _: jnp.dtype(dtypes), tree)
    return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), tree, dtypes)


def init_state(
    trainable: Params,
    optimizer: optax.GradientTransformation,
    *,
    seed: int = 0,
    ema: bool = False,
    master_dtype: DType | None = None,
) -> State:
    """The state before the first step. Traceable: `jax.eval_shape` of it allocates nothing.

    Args:
      trainable: from `split_trainable`; copied, so that the state may be donated.
      optimizer: of optax. Its state is float32, whatever the dtype of the parameters.
      seed: of everything random in the steps.
      ema: keep a moving average.
      master_dtype: the parameters are kept in it, and rounded to what they were for each step; None: kept as they are.
    """
    params = jax.tree.map(jnp.array, cast(trainable, master_dtype))
    wide = cast(params, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        opt_state = optimizer.init(wide)
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=opt_state,
        ema=jax.tree.map(jnp.array, wide) if ema else None,
        key=jax.random.key_data(jax.random.key(seed)),
        skipped=jnp.zeros((), jnp.int32),
    )
