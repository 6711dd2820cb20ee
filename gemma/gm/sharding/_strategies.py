# SPDX-License-Identifier: Apache-2.0
"""Strategies: a tree of parameters in, where each of them lives out.

Meshes are `_mesh.py`'s business. The axes' names ("heads", "mlp", ...) come from `gemma.weights`; a strategy says which
of them are cut along which axis of the mesh.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma import weights
from gemma.config import GemmaConfig
from gemma.errors import ConfigError
from gemma.gm.sharding._mesh import make_mesh, replicated

# What is cut along "tensor". The keys' heads follow the queries' where there are enough of them, else they are copied.
_TENSOR = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor", "embed": "fsdp"}
_TENSOR |= {"vision_heads": "tensor", "vision_mlp": "tensor", "vision_embed": "fsdp"}


class ShardingStrategy(Protocol):
    """Anything that maps a tree of arrays, or of `jax.ShapeDtypeStruct`, to a tree of shardings."""

    def __call__(self, tree: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class ReplicatedSharding:
    """Every device holds everything. `mesh` None: one data axis over all devices."""

    mesh: Mesh | None = None

    def __call__(self, tree: Any) -> Any:
        where = replicated(self.mesh or make_mesh(data=-1))
        return jax.tree.map(lambda _: where, tree)


@dataclasses.dataclass(frozen=True)
class FSDPSharding:
    """Each array is cut along its longest axis that the mesh axis `fsdp` divides; works for any tree.

    Attributes:
      mesh: with an axis `fsdp`; None: all devices are that axis.
      min_size: smaller arrays (values) are copied to all devices: gathering them costs more than it saves.
    """

    mesh: Mesh | None = None
    min_size: int = 2**14

    def __call__(self, tree: Any) -> Any:
        mesh = self.mesh or make_mesh(fsdp=-1)
        return jax.tree.map(lambda leaf: NamedSharding(mesh, self._spec(mesh, leaf.shape)), tree)

    def _spec(self, mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
        parts = mesh.shape["fsdp"]
        able = [axis for axis, size in enumerate(shape) if size % parts == 0]
        if math.prod(shape) < self.min_size or parts == 1 or not able:
            return PartitionSpec()
        longest = max(able, key=lambda axis: shape[axis])
        return PartitionSpec(*("fsdp" if axis == longest else None for axis in range(len(shape))))


@dataclasses.dataclass(frozen=True)
class TensorSharding:
    """Heads, MLP columns and vocabulary rows are cut along `tensor`, the model width along `fsdp` if the mesh has one.

    Attributes:
      config: of the model: a GemmaConfig, or the `config` of a network of `gm.nn`.
      mesh: None: all devices are `tensor`.
    """

    config: Any
    mesh: Mesh | None = None

    def __call__(self, tree: Any) -> Any:
        """Where each parameter lives. A leaf that the table does not know (an adapter's) is copied to all devices.

        Raises:
          ConfigError: the heads of the model cannot be divided among the devices.
        """
        mesh = self.mesh or make_mesh(tensor=-1)
        config = self.config if isinstance(self.config, GemmaConfig) else self.config.gemma
        parts = mesh.shape["tensor"]
        if config.num_attention_heads % parts:
            raise ConfigError(
                f"tensor={parts}: the {config.num_attention_heads} attention heads of the model cannot be divided so; "
                f"expected a divisor of them"
            )
        names = param_axes(config)
        return _map_named(
            lambda name, leaf: NamedSharding(mesh, self._spec(mesh, names.get(name, ()), leaf.shape)), tree
        )

    @staticmethod
    def _spec(mesh: Mesh, names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        if len(names) != len(shape):
            return PartitionSpec()
        used: set[str] = set()
        spec: list[str | None] = []
        for name, size in zip(names, shape):
            axis = _TENSOR.get(name or "")
            cut = axis is not None and axis not in used and mesh.shape.get(axis, 1) > 1 and size % mesh.shape[axis] == 0
            spec.append(axis if cut else None)
            used |= {axis} if cut and axis else set()
        return PartitionSpec(*spec)


def param_axes(config: GemmaConfig) -> dict[str, tuple[str | None, ...]]:
    """For each leaf of the parameter tree (its path joined by "/") the name of each axis, None where it has none."""
    axes: dict[str, tuple[str | None, ...]] = {}
    for tensor in weights.tensors(config):
        slot = tensor.slots.get("flax")
        if slot is not None:
            axes[slot.name] = (None,) * len(slot.index) + weights.sharding_of(slot.axes)
    return axes


def _map_named(function: Callable[[str, Any], Any], tree: Any, prefix: str = "") -> Any:
    if not isinstance(tree, Mapping):
        return function(prefix.rstrip("/"), tree)
    return {key: _map_named(function, value, f"{prefix}{key}/") for key, value in tree.items()}
