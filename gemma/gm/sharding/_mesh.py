# SPDX-License-Identifier: Apache-2.0
"""Meshes with the axis names that the strategies use, and the two placements that need no table.

Which axis of which parameter goes where is in `_strategies.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma.errors import ConfigError

AXES = ("data", "fsdp", "tensor")


def make_mesh(*, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`.

    Args:
      data: copies of the model, each with its part of the batch.
      fsdp: parts into which parameters are cut, gathered where they are needed; the batch is split over it as well.
      tensor: parts into which each product is cut, along heads, MLP columns and vocabulary.
      devices: all of the process's by default. One of the sizes may be -1: whatever is left.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor)))
    open_axes = [name for name, size in sizes.items() if size == -1]
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) == 1 and given > 0 and len(devices) % given == 0:
        sizes[open_axes[0]] = len(devices) // given
    if any(size < 1 for size in sizes.values()) or math.prod(sizes.values()) != len(devices):
        raise ConfigError(
            f"mesh: data={data}, fsdp={fsdp}, tensor={tensor}: expected sizes of at least 1 (one of them may be -1) "
            f"whose product is the {len(devices)} devices"
        )
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of the array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the copies of the model: tokens [B, T], logits [B, T, V], caches [B, S, K, H]."""
    names = tuple(name for name in ("data", "fsdp") if mesh.shape.get(name, 1) > 1)
    return NamedSharding(mesh, PartitionSpec(names) if names else PartitionSpec())
