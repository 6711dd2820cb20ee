# SPDX-License-Identifier: Apache-2.0
"""Einsum equations of activations with a weight, read: which axes of the weight are summed over, and where they stand.

Products are in `_layers.py` (floats) and `_packed.py` (packed weights).
"""

from __future__ import annotations

import functools
import re


@functools.lru_cache(maxsize=256)
def roles(eqn: str) -> tuple[int, int, int] | None:
    """How the axes of a weight are used, or None where the equation is of another kind.

    Returns:
      The number of axes of the weight before the summed ones, of the summed ones, and of those that the result names
      before the rows: "BTD,CKDH->CBTKH" gives (2, 1, 1).
    """
    found = re.fullmatch(r"([A-Za-z.]+),([A-Za-z]+)->([A-Za-z.]+)", eqn.replace(" ", ""))
    if found is None:
        return None
    x_axes, w_axes, out_axes = found.groups()
    summed = "".join(axis for axis in w_axes if axis not in out_axes)
    rows = x_axes.removesuffix(summed)
    if not summed or not rows or rows == x_axes or summed not in w_axes or rows not in out_axes:
        return None
    lead, _, tail = w_axes.partition(summed)
    ahead, _, behind = out_axes.partition(rows)
    return (len(lead), len(summed), len(ahead)) if ahead + behind == lead + tail else None


def without_first(eqn: str) -> tuple[str, int] | None:
    """The equation of one slice of a weight along its first axis, and where that axis stands in the result.

    "BTD,CKDH->CBTKH" gives ("BTD,KDH->BTKH", 0). The place counts from the end where an ellipsis comes before it. None:
    the first axis is summed over, or the equation is of another kind.
    """
    found = re.fullmatch(r"([A-Za-z.]+),([A-Za-z])([A-Za-z]+)->([A-Za-z.]+)", eqn.replace(" ", ""))
    if found is None or found[2] not in found[4] or found[2] in found[1]:
        return None
    x_axes, first, rest, out_axes = found.groups()
    before, _, behind = out_axes.partition(first)
    place = -1 - len(behind) if "." in before else len(before)
    return f"{x_axes},{rest}->{before}{behind}", place
