# SPDX-License-Identifier: Apache-2.0
"""Which parameters are trained: trees of labels and truth values for optax's `multi_transform` and `masked`.

Parameters are chosen by role or by regular expression. Optimizers are optax's; nothing here computes a gradient.

    labels = peft.label_tree(params, {"train": "lora"})
    optimizer = optax.multi_transform({"train": optax.adamw(1e-4), "freeze": optax.set_to_zero()}, labels)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma.errors import ConfigError
from gemma.gm.typing import Params
from gemma.peft._spec import ROLES, compiled

# Besides the roles of layers: what a leaf is.
PARTS: Mapping[str, str] = ROLES | {"lora": r"(^|/)lora/", "norm": r"(norm|norm_\d+|Norm_\d+)/(scale|bias)$", "all": ""}


def label_tree(params: Params, labels: Mapping[str, str | Iterable[str]], default: str = "freeze") -> Any:
    """A tree of strings like `params`.

    Args:
      params: nested arrays, or shapes (`jax.eval_shape`).
      labels: label to what it is given to: roles ("attention", "mlp", "embedder", "vision", "projector", "lora", "norm",
        "all") and regular expressions, searched for in the slash names of leaves. The first label that fits a leaf is
        its label.
      default: of the other leaves.

    Raises:
      ConfigError: (a ValueError) a role or expression that means no leaf, or integers with a label of their own: packed
        weights are not trained.
    """
    wanted = {label: (kinds,) if isinstance(kinds, str) else tuple(kinds) for label, kinds in labels.items()}
    patterns = {kind: compiled(PARTS.get(kind, kind)) for kinds in wanted.values() for kind in kinds}
    met: set[str] = set()

    def label(path: Any, leaf: Any) -> str:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        fits = [(given, kind) for given, kinds in wanted.items() for kind in kinds if patterns[kind].search(name)]
        met.update(kind for _, kind in fits)
        if not fits or fits[0][0] == default:
            return default
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ConfigError(
                f"{name}: is {leaf.dtype}; packed weights cannot be trained, choose 'lora' or other leaves"
            )
        return fits[0][0]

    tree = jax.tree_util.tree_map_with_path(label, params)
    missed = [kind for kind in patterns if kind not in met]
    if missed:
        raise ConfigError(
            f"{', '.join(map(repr, missed))} means no leaf of these parameters; expected {', '.join(PARTS)}, or a "
            f"regular expression that is found in a name such as {_an_example(params)}"
        )
    return tree


def mask_tree(params: Params, select: str | Iterable[str], *, freeze: str | Iterable[str] = ()) -> Any:
    """A tree of truth values like `params`: True for what is trained.

    Args:
      params: nested arrays, or shapes.
      select: what is trained; see `label_tree`.
      freeze: what is not, although `select` means it.
    """
    frozen = (freeze,) if isinstance(freeze, str) else tuple(freeze)
    tree = label_tree(params, {"freeze": frozen, "train": select} if frozen else {"train": select})
    return jax.tree.map(lambda label: label == "train", tree)


def count(params: Params, mask: Any = None) -> int:
    """How many numbers a tree holds; with a mask, how many of them are trained."""
    sizes = jax.tree.map(lambda leaf: leaf.size, params)
    if mask is not None:
        sizes = jax.tree.map(lambda size, kept: size if kept else 0, sizes, mask)
    return sum(jax.tree.leaves(sizes))


def _an_example(params: Params) -> str:
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    return next((name for name in names if re.search(ROLES["attention"], name)), names[0] if names else "(empty)")
