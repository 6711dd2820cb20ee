# SPDX-License-Identifier: Apache-2.0
"""Between the adapter of a JAX layer that fuses several matrices and the adapters of the single matrices.

Keys and values (and gate and up) are one array in the JAX networks, so their adapter has one `a` and a `b` with a block
for each. That is two adapters with the same `a`. The other way, two independent adapters of rank r become one of rank 2r:

    a = [a1 | a2]        b = | b1  0  |   rows of the rank that belong to the first and to the second matrix
                             | 0   b2 |

As long as those blocks are zero, it is saved as the two adapters of rank r that it came from; once training has filled
them, as two of rank 2r. Axes: r rank, in and out as in the canonical tensors [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from gemma import weights
from gemma.adapters import LowRank
from gemma.errors import CheckpointError
from gemma.peft._tree import Site, flipped


def members(
    site: Site,
    tensors: Sequence[weights.Tensor],
    a: np.ndarray,
    b: np.ndarray,
    scale: float,
    magnitude: np.ndarray | None,
) -> dict[str, LowRank]:
    """The adapters of the single matrices of one layer, by canonical name.

    Args:
      site: the layer, for errors.
      tensors: those in the layer's weight.
      a: [*in, r], as the JAX layer has it.
      b: [r, *out].
      scale: of the product.
      magnitude: [*out] of DoRA, absolute norms.
    """
    rank = a.shape[-1]
    found = {}
    if flipped(tensors[0]):
        tensor = tensors[0]
        low = LowRank(b, weights.fit_rows(a, tensor.shape[0]) if tensor.axes[0] == "V" else a, scale)
        return {tensor.name: _checked(site, tensor, low)}
    inner = a.reshape(-1, rank)
    blocks = {tensor.name: b[(slice(None), *tensor.slots["flax"].index)].reshape(rank, -1) for tensor in tensors}
    used = {name: np.any(block != 0, axis=1) for name, block in blocks.items()}
    split = len(tensors) > 1 and sum(own.sum() for own in used.values()) > 0 and sum(used.values()).max() <= 1
    for tensor in tensors:
        own = np.ones(rank, bool)
        if split:
            if magnitude is None and not used[tensor.name].any():
                continue  # nothing changes this matrix
            own = used[tensor.name] if used[tensor.name].any() else own
        m = None if magnitude is None else magnitude[tensor.slots["flax"].index].reshape(-1)
        low = LowRank(inner[:, own].T, blocks[tensor.name][own].T, scale, m)
        found[tensor.name] = _checked(site, tensor, low)
    return found


def _checked(site: Site, tensor: weights.Tensor, low: LowRank) -> LowRank:
    if low.shape != tensor.shape:
        raise CheckpointError(
            f"{site.path}: changes a weight of {low.shape}, but {tensor.name} is {tensor.shape}: these parameters belong "
            f"to another model"
        )
    return low


def joined(
    tensors: Sequence[weights.Tensor], present: Mapping[str, LowRank]
) -> tuple[np.ndarray, np.ndarray, float, np.ndarray | None]:
    """The adapter of a layer: (a [*in, r], b [r, *out], scale, absolute magnitude [*out]); the inverse of `members`.

    Args:
      tensors: those in the layer's weight.
      present: the adapters of those that have one. The magnitude of the others is NaN: that of the weight itself.
    """
    if flipped(tensors[0]):
        low = present[tensors[0].name]
        rows = tensors[0].slots["flax"].shape[0]
        return (weights.fit_rows(low.b, rows) if tensors[0].axes[0] == "V" else low.b), low.a, low.scale, None
    slot = tensors[0].slots["flax"]
    dims = tensors[0].dims
    inner = [dims[letter] for letter in weights.parse(tensors[0].axes)[-1]]
    first = next(iter(present.values()))
    same = len(present) == len(tensors) and all(_shares(first, low) for low in present.values())
    ranks = [first.rank] if same else [low.rank for low in present.values()]
    rank = sum(ranks)
    a = first.a if same else np.concatenate([low.a for low in present.values()])
    stack = [tensor.slots["flax"].index for tensor in tensors]
    lead = tuple(max(index[axis] for index in stack) + 1 for axis in range(len(slot.index)))
    outer = [dims[letter] for letter in weights.parse(tensors[0].axes)[0]]
    b = np.zeros((rank, *lead, math.prod(outer)), first.b.dtype)
    magnitude = np.full((*lead, math.prod(outer)), np.nan, np.float32)
    start = 0
    for tensor in tensors:
        low = present.get(tensor.name)
        if low is None:
            continue
        block = low.b.T if low.scale == first.scale or not first.scale else low.b.T * (low.scale / first.scale)
        rows = slice(0, rank) if same else slice(start, start + low.rank)
        b[(rows, *tensor.slots["flax"].index)] = block
        if low.magnitude is not None:
            magnitude[tensor.slots["flax"].index] = low.magnitude
        start += low.rank
    dora = first.magnitude is not None
    return (
        a.T.reshape(*inner, rank),
        b.reshape(rank, *lead, *outer),
        first.scale,
        magnitude.reshape(*lead, *outer) if dora else None,
    )


def _shares(one: LowRank, other: LowRank) -> bool:
    return one.scale == other.scale and np.array_equal(one.a, other.a)
