# SPDX-License-Identifier: Apache-2.0
"""Where the arrays of a sampler live when they are spread over devices: rows by the given sharding, parameters kept.

It places arrays and decides nothing about numbers; which axis of a weight is split is the caller's choice when the
parameters are loaded.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gemma.errors import ShapeError
from gemma.gm.typing import Params


def by_rows(sharding: Any) -> NamedSharding | None:
    """The sharding of arrays whose first axis is rows; what it says of further axes is not looked at.

    Raises:
      ShapeError: (a ValueError) something else came.
    """
    if sharding is None:
        return None
    if isinstance(sharding, SingleDeviceSharding):
        mesh = jax.sharding.Mesh(np.array(list(sharding.device_set)), ("rows",))
        return NamedSharding(mesh, PartitionSpec())
    if not isinstance(sharding, NamedSharding):
        raise ShapeError(
            f"sharding: expected a jax.sharding.NamedSharding whose first axis is the rows of the batch, such as "
            f"NamedSharding(mesh, PartitionSpec('data')), got {type(sharding).__name__}"
        )
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))


def check_rows(sharding: NamedSharding, rows: int) -> None:
    """Refuses a number of rows that cannot be split evenly.

    Raises:
      ShapeError: (a ValueError) with both numbers.
    """
    names = sharding.spec[0] if len(sharding.spec) else None
    names = (names,) if isinstance(names, str) else names or ()
    parts = int(np.prod([sharding.mesh.shape[name] for name in names], dtype=np.int64))
    if rows % parts:
        raise ShapeError(
            f"sharding: {rows} rows cannot be split over {parts} devices: give a multiple of {parts} prompts, or a "
            f"sharding whose PartitionSpec is empty"
        )


def place_params(params: Params, rows: NamedSharding) -> Params:
    """Parameters on the devices of `rows`: those that are there already stay as they are, the others are copied to all."""
    devices, everywhere = rows.device_set, NamedSharding(rows.mesh, PartitionSpec())

    def place(leaf: Any) -> Any:
        there = isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices
        return leaf if there else jax.device_put(leaf, everywhere)

    return jax.tree.map(place, params)
