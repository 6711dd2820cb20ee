# SPDX-License-Identifier: Apache-2.0
"""`restore_partial`: fills what a checkpoint has into an existing tree, and prints where every parameter came from.

`load_params` demands that everything fits; this is for a model that was changed after it was saved (a new head, another
vocabulary, fewer layers). Nothing is guessed: a leaf is taken if its name, after `rename`, and its shape are the same.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from gemma import hub
from gemma.errors import CheckpointError, WeightsMismatch
from gemma.gm.ckpts._leaves import Leaf, OrbaxLeaf, leaves_of
from gemma.gm.ckpts._load import insert, read, stored_name
from gemma.gm.ckpts._orbax import OrbaxCheckpoint, flatten, open_checkpoint
from gemma.gm.typing import Params


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `restore_partial` did.

    Attributes:
      params: the whole tree: restored leaves, and the arrays of the given tree where nothing was taken.
      taken: leaf of the tree to leaf of the checkpoint.
      kept: leaf of the tree to the reason why the given array stayed.
      unused: leaves of the checkpoint that no leaf of the tree asked for.
    """

    params: dict[str, Any]
    taken: Mapping[str, str]
    kept: Mapping[str, str]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        width = max(map(len, [*self.taken, *self.kept]), default=0)
        lines = [f"{name:<{width}}  <- {source}" for name, source in self.taken.items()]
        lines += [f"{name:<{width}}  kept: {reason}" for name, reason in self.kept.items()]
        lines += [f"{name:<{width}}  in the checkpoint, not used" for name in self.unused]
        counts = f"{len(self.taken)} restored, {len(self.kept)} kept, {len(self.unused)} not used"
        return "\n".join([*lines, counts])


def restore_partial(
    path: str | os.PathLike[str],
    params: Params,
    *,
    select: str | None = None,
    rename: Mapping[str, str] | Callable[[str], str | None] | None = None,
    allow_misshaped: bool = False,
    report: Callable[[str], None] | None = print,
) -> Restored:
    """Reads the leaves that a checkpoint and a tree have in common.

    Args:
      path: as in `load_params`.
      params: the tree to fill, with arrays; their dtypes and shardings are followed. None of them is freed.
      select: a regular expression; only leaves of the tree whose slash name it matches from the start are restored.
      rename: from a leaf of the tree to one of the checkpoint: a dictionary for those that differ, or a function
        (None: do not restore it).
      allow_misshaped: keep the given array where the shapes differ. False: that is an error.
      report: is given the mapping as text; None: nothing is printed.

    Raises:
      CheckpointNotFound, FormatError: nothing there, or broken.
      WeightsMismatch: leaves of different shapes, all of them.
      CheckpointError: nothing at all would be restored, or `params` are no tree of arrays.
    """
    like = flatten(params) if isinstance(params, Mapping) else {}
    shapeless = [name for name, leaf in like.items() if not isinstance(leaf, (jax.Array, np.ndarray))]
    if not like or shapeless:
        raise CheckpointError(
            f"`params`: expected a nested tree of arrays, got {', '.join(shapeless[:4]) or type(params)}"
        )
    path = hub.resolve(path, download=True)
    with open_checkpoint(path) as checkpoint:
        leaves = _all_leaves(checkpoint)
        taken, kept, misshaped = _plan(like, leaves, select, rename)
        if misshaped and not allow_misshaped:
            raise WeightsMismatch(path, misshaped=misshaped, hint="pass allow_misshaped=True to keep the given arrays")
        if not taken:
            near = f"; the checkpoint has {', '.join(list(leaves)[:4])}, ..." if leaves else ""
            raise CheckpointError(f"{path}: none of the {len(like)} leaves would be restored{near}")
        tree: dict[str, Any] = {}
        for name, own in like.items():
            insert(tree, name, read(leaves[taken[name]], name, own, None, None) if name in taken else own)
    restored = Restored(tree, taken, kept, tuple(sorted(set(leaves) - set(taken.values()))))
    if report is not None:
        report(str(restored))
    return restored


def _all_leaves(checkpoint: Any) -> dict[str, Leaf]:
    """Every leaf; of an Orbax folder also when they are not a whole model."""
    if isinstance(checkpoint, OrbaxCheckpoint):
        return {name: OrbaxLeaf(name, checkpoint) for name in checkpoint.tensors}
    return leaves_of(checkpoint, text_only=False)


def _plan(
    like: Mapping[str, Any],
    leaves: Mapping[str, Leaf],
    select: str | None,
    rename: Mapping[str, str] | Callable[[str], str | None] | None,
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """What is taken, what is kept and why, and the lines about shapes that differ."""
    taken: dict[str, str] = {}
    kept: dict[str, str] = {}
    misshaped = []
    for name, own in like.items():
        if select is not None and not re.match(select, name):
            kept[name] = "not selected"
            continue
        wanted = rename(name) if callable(rename) else (rename or {}).get(name, name)
        if wanted is None:
            kept[name] = "not asked for"
            continue
        source = stored_name(wanted, leaves)
        if source not in leaves:
            kept[name] = f"no {wanted} in the checkpoint"
        elif leaves[source].shape != tuple(own.shape):
            line = f"expected {tuple(own.shape)}, got {leaves[source].shape}"
            kept[name] = f"{source} has another shape, {line}"
            misshaped.append(f"{name}: {line}")
        else:
            taken[name] = source
    return taken, kept, misshaped
