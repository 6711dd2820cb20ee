# SPDX-License-Identifier: Apache-2.0
"""The four layouts in which JAX checkpoints of the family are stored, and how each maps to the NESTED tree.

Names only: which array of a file is which leaf. Reading is `_orbax.py`, writing `_orbax_write.py`.

    NESTED    layer_3 / mlp / linear                                                   what `model.init` returns
    FLAT      transformer/layer_3/mlp/linear  / w                                      the published Gemma 2 and 3
    STACKED   transformer/stacked_layers/attention_type_1/mlp/linear / w  [slices, ..] layer = slice * types + type
    KAULDRON  params / layer_3 / mlp / linear, beside collections, opt_state, step     the trainer's state

FLAT is one level of slash paths over dictionaries of leaves; kernels of the MLP, leaves themselves in NESTED, have a
`w` there, and the vision tower has a root of its own.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable, Mapping

from gemma.errors import CheckpointError

Keys = tuple[str, ...]
_MOST_LAYERS = 4096

_TEXT, _VISION = "transformer", "SigLiPFromPatches_0"
_NESTED_VISION = "vision_encoder"
_STACK = f"{_TEXT}/stacked_layers"
_STACKED = re.compile(rf"{_STACK}/attention_type_(\d{{1,4}})/(.+)")
_LAYER = re.compile(r"layer_(\d{1,5})/(.+)")
_STATE = frozenset({"collections", "opt_state", "params", "step"})
_MLP_KERNEL = re.compile(r"(.*/)?mlp/(linear|gating_einsum)")


class Layout(enum.StrEnum):
    """How the leaves of a tree are arranged in a file."""

    NESTED = "nested"
    FLAT = "flat"
    STACKED = "stacked"
    KAULDRON = "kauldron"

    @classmethod
    def of(cls, name: str | Layout) -> Layout:
        """A layout by its name, in any case."""
        try:
            return cls(str(name).lower())
        except ValueError:
            raise CheckpointError(f"layout: expected one of {', '.join(cls)}, got {name!r}") from None


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf is: the keys that lead to its array, and its index on the leading axis of a stacked one."""

    keys: Keys
    index: int | None = None


def layout_of(tops: Iterable[str]) -> Layout:
    """The layout of a tree with these keys on top."""
    tops = set(tops)
    if any(key.startswith(_STACK) for key in tops):
        return Layout.STACKED
    if tops and all(key.startswith((f"{_TEXT}/", f"{_VISION}/")) for key in tops):
        return Layout.FLAT
    return Layout.KAULDRON if tops == _STATE else Layout.NESTED


def nested_places(arrays: Mapping[Keys, tuple[int, ...]], layout: Layout, where: str) -> dict[str, Place]:
    """The leaves of the NESTED tree, by slash name, and where each is among the arrays of a file.

    Args:
      arrays: keys of each array in the file, and its shape.
      layout: of the file.
      where: the file, for errors.

    Raises:
      CheckpointError: two arrays are the same leaf, or a stacked one has no axis to take layers from.
    """
    places: dict[str, Place] = {}
    types = _attention_types(arrays) if layout is Layout.STACKED else 0
    for keys, shape in arrays.items():
        if layout is Layout.KAULDRON:
            found = {"/".join(keys[1:]): Place(keys)} if keys[0] == "params" else {}
        elif layout is Layout.NESTED:
            found = {"/".join(keys): Place(keys)}
        else:
            found = _from_flat(keys, shape, types, where)
        for name, place in found.items():
            if name in places:
                both = " and ".join(repr("/".join(p.keys)) for p in (places[name], place))
                raise CheckpointError(f"{where}: {both} are both the leaf {name}; expected each leaf once")
            places[name] = place
    return places


def _attention_types(arrays: Mapping[Keys, tuple[int, ...]]) -> int:
    return 1 + max(int(match[1]) for keys in arrays if (match := _STACKED.fullmatch(keys[0])))


def _from_flat(keys: Keys, shape: tuple[int, ...], types: int, where: str) -> dict[str, Place]:
    stacked = _STACKED.fullmatch(keys[0]) if types else None
    if stacked is None:
        return {_leaf(keys[0], keys[1:]): Place(keys)}
    if not shape or shape[0] > _MOST_LAYERS:
        raise CheckpointError(
            f"{where}: {'/'.join(keys)} has the shape {shape}; expected at most {_MOST_LAYERS} layers on its first axis"
        )
    kind, rest = int(stacked[1]), stacked[2]
    return {_leaf(f"{_TEXT}/layer_{row * types + kind}/{rest}", keys[1:]): Place(keys, row) for row in range(shape[0])}


def _leaf(path: str, rest: Keys) -> str:
    root, _, path = path.partition("/")
    if _MLP_KERNEL.fullmatch(path) and rest == ("w",):
        rest = ()
    head = (_NESTED_VISION,) if root == _VISION else ()
    return "/".join((*head, *((path,) if path else ()), *rest))


def stored_keys(name: str, layout: Layout) -> Keys:
    """The keys of a leaf in a file of a layout; STACKED is FLAT until `stack` groups its layers."""
    parts = tuple(name.split("/"))
    if layout is Layout.NESTED:
        return parts
    if layout is Layout.KAULDRON:
        return ("params", *parts)
    if _MLP_KERNEL.fullmatch(name):
        parts = (*parts, "w")
    parts = (_VISION, *parts[1:]) if parts[0] == _NESTED_VISION else (_TEXT, *parts)
    return ("/".join(parts[:-1]), parts[-1])


def stack(names: Iterable[str], types: int) -> dict[Keys, list[str]]:
    """The arrays of a STACKED file, each with the leaves that it stacks, in order; a leaf alone is not stacked.

    Raises:
      CheckpointError: layers that are not numbered from 0 without a gap.
    """
    arrays: dict[Keys, dict[int, str]] = {}
    for name in names:
        layer = _LAYER.fullmatch(name)
        if layer is None:
            arrays[stored_keys(name, Layout.STACKED)] = {-1: name}
            continue
        row, kind = divmod(int(layer[1]), types)
        path, last = stored_keys(layer[2], Layout.FLAT)
        keys = (f"{_STACK}/attention_type_{kind}/{path.removeprefix(_TEXT).lstrip('/')}", last)
        arrays.setdefault(keys, {})[row] = name
    for keys, rows in arrays.items():
        if -1 not in rows and sorted(rows) != list(range(len(rows))):
            raise CheckpointError(
                f"{'/'.join(keys)}: layers {', '.join(rows.values())} leave a gap and cannot be stacked; expected "
                f"layers numbered from 0"
            )
    return {keys: [rows[row] for row in sorted(rows)] for keys, rows in arrays.items()}


def is_stacked(keys: Keys) -> bool:
    """Whether the array of these keys has layers on its first axis."""
    return _STACKED.fullmatch(keys[0]) is not None
