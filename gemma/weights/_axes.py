# SPDX-License-Identifier: Apache-2.0
"""Axes as letters: the small language in which the table writes layouts, and `convert`, which moves between them.

"N D H" is an array of three axes; "(N H) D" has two, the first of them N and H merged with H running fastest; "1" is an
axis of length one. The letters are those of docs/axes.md. Names of tensors are not here (that is `_rows.py`).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from gemma.errors import ShapeError

_TOKEN = re.compile(r"\(([A-Za-z](?: [A-Za-z])*)\)|([A-Za-z])|(1)")

# What an axis is called when an array is spread over devices; None: not a thing to split.
SHARDING = {
    "V": "vocab",
    "D": "embed",
    "N": "heads",
    "K": "kv_heads",
    "F": "mlp",
    "Z": "embed",
    "E": "vision_embed",
    "A": "vision_heads",
    "M": "vision_mlp",
    "f": "mlp",
    "e": "experts",
}


@functools.lru_cache(maxsize=1024)
def parse(axes: str) -> tuple[tuple[str, ...], ...]:
    """The letters of each axis: "(N H) D" is (("N", "H"), ("D",)); an axis of length one has none."""
    groups, at = [], 0
    for found in _TOKEN.finditer(axes):
        if axes[at : found.start()].strip():
            break
        merged, letter, _ = found.groups()
        groups.append(tuple(merged.split()) if merged else (letter,) if letter else ())
        at = found.end()
    letters = [letter for group in groups for letter in group]
    if axes[at:].strip() or len(set(letters)) != len(letters):
        raise ShapeError(f'axes {axes!r}: expected distinct letters, 1, or a group such as "(N H) D"')
    return tuple(groups)


def shape_of(axes: str, dims: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an array with these axes: `shape_of("(N H) D", dict(N=4, H=8, D=16)) == (32, 16)`."""
    groups = parse(axes)
    missing = sorted({letter for group in groups for letter in group} - set(dims))
    if missing:
        raise ShapeError(f"axes {axes!r}: no size given for {', '.join(missing)}; sizes are {dict(dims)}")
    return tuple(math.prod(dims[letter] for letter in group) for group in groups)


def sharding_of(axes: str) -> tuple[str | None, ...]:
    """The sharding name of each axis, that of its slowest letter: "(N H) D" is ("heads", "embed")."""
    return tuple(SHARDING.get(group[0]) if group else None for group in parse(axes))


def convert(array: Any, src_axes: str, dst_axes: str, dims: Mapping[str, int]) -> Any:
    """Rearranges an array from one layout to another; both must hold the same letters.

    Args:
      array: a numpy array with the axes `src_axes` (anything with `shape`, `reshape` and `transpose` works).
      src_axes: for example "N D H".
      dst_axes: for example "(N H) D".
      dims: the length of each letter.

    Returns:
      The same values with the axes `dst_axes`: a view where numpy can make one, a copy where it cannot.

    Raises:
      ShapeError: the array's shape is not that of `src_axes`, or the layouts differ in their letters.
    """
    src, dst = parse(src_axes), parse(dst_axes)
    have = [letter for group in src for letter in group]
    want = [letter for group in dst for letter in group]
    if sorted(have) != sorted(want):
        raise ShapeError(f"cannot convert axes {src_axes!r} to {dst_axes!r}: they hold different letters")
    expected = shape_of(src_axes, dims)
    if tuple(array.shape) != expected:
        raise ShapeError(f"axes {src_axes!r}: expected shape {expected}, got {tuple(array.shape)}")
    if src == dst:
        return array
    loose = array.reshape([dims[letter] for letter in have])
    return loose.transpose([have.index(letter) for letter in want]).reshape(shape_of(dst_axes, dims))
