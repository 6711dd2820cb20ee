# SPDX-License-Identifier: Apache-2.0
"""`load_params(quantize="int4")`: a checkpoint as a tree whose matrices are packed, one tensor at a time.

Bytes that have the wanted type already are taken as they are, never decoded and encoded again; "keep" takes all of them
so. The float model never exists. Types are `gemma._quants_mixes`, encoding is `gemma._pack_tensors`, the packed leaf is
`gm/nn/_packed.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gemma import _pack_tensors, weights
from gemma._quants_mixes import plan, recipe
from gemma.errors import ConfigError, UnsupportedError
from gemma.gm.ckpts._leaves import Leaf, TableLeaf
from gemma.gm.nn._packed import Packed, PackedArray, PackedParts
from gemma.gm.typing import DType
from gemma.quants import PackedTensor, QuantType
from gemma.saving import ArrayReader
from gemma.weights import Matrix, Tensor

KEEP = "keep"
Importance = Mapping[str, np.ndarray]


def recipe_of(quantize: Any) -> str:
    """The recipe that an argument `quantize` names, in lower case: "keep", a mix, or what a method trains.

    Raises:
      ConfigError: unknown, or a type of plain floats.
    """
    name = getattr(quantize, "recipe", None) or str(quantize).lower()  # a `peft.QuantizationMethod` has one
    if name == KEEP:
        return name
    found = recipe(name)
    if found.base.is_float:
        raise ConfigError(f"quantize={quantize!r}: that is a type of plain floats; pass dtype=... instead")
    return found.name


class Packer:
    """Packs the leaves of one checkpoint.

    Args:
      config: of the model.
      how: of `recipe_of`.
      importance: canonical tensor name to float32 [inputs]; see `gemma.quants.quantize`.
    """

    def __init__(self, config: Any, how: str, importance: Importance | None = None):
        self._how, self._importance = how, importance or {}
        self.matrices = weights.matrices(config)
        self._types: Mapping[str, QuantType] = {}
        if how != KEEP:
            self._types = plan(weights.tensors(config), how, importance=importance is not None)
        table = [tensor for matrix in self.matrices.values() for tensor in matrix.tensors]
        self._groups = {t.name: group for group in _pack_tensors.sfp8_groups(table).values() for t in group}
        self._scales: dict[str, np.float32] = {}
        self._readers: dict[str, Any] = {}

    def open(self, leaves: Mapping[str, Leaf]) -> None:
        """Learns where the tensors of a checkpoint are, before the first is packed."""
        for name, matrix in self.matrices.items():
            if name in leaves:
                self._readers |= dict(_readers(leaves[name], matrix))

    def __call__(self, name: str, dtype: DType) -> Packed | None:
        """One leaf, packed, for activations of `dtype`; None: it stays in floats."""
        matrix = self.matrices.get(name)
        if matrix is None:
            return None
        types = [self._type(tensor) for tensor in matrix.tensors]
        if all(type.is_float for type in types):
            return None
        pairs = zip(matrix.tensors, types, strict=True)
        return joined([self._tensor(tensor, type) for tensor, type in pairs], matrix, dtype)

    def _type(self, tensor: Tensor) -> QuantType:
        if self._how != KEEP:
            return self._types[tensor.name]
        return QuantType.__members__.get(self._readers[tensor.name].dtype, QuantType.F32)

    def _tensor(self, tensor: Tensor, type: QuantType) -> PackedTensor:
        reader = self._readers[tensor.name]
        if self._how == KEEP and not type.is_float:
            return reader.packed()
        scale = self._scale(tensor) if type is QuantType.SFP8 else None
        importance = self._importance.get(tensor.name)
        return _pack_tensors.pack_tensor(tensor, reader, type, importance=importance, sfp8_scale=scale)

    def _scale(self, tensor: Tensor) -> np.float32:
        group = self._groups[tensor.name]
        if group[0].name not in self._scales:
            pairs = [(member, self._readers[member.name]) for member in group]
            self._scales[group[0].name] = _pack_tensors.shared_scale(pairs)
        return self._scales[group[0].name]


def joined(packed: Sequence[PackedTensor], matrix: Matrix, dtype: DType) -> Packed:
    """The tensors of one leaf as that leaf: one array where they are of one type, else a stack."""
    first, count = matrix.summed
    shape = matrix.shape
    alike = len({part.type for part in packed}) == 1
    if packed[0].type is QuantType.SFP8 and alike:
        alike = len({float(part.scale[0]) for part in packed}) == 1
    if not alike:
        parts = (PackedArray.of(part, shape[1:], (first - 1, count), dtype) for part in map(_aligned, packed))
        return PackedParts(tuple(parts))
    whole = packed[0]
    rows = np.prod(shape, dtype=np.int64) // matrix.columns
    if len(packed) > 1 or len(whole.data) != rows:
        data = np.concatenate([part.data for part in packed] + [_empty_rows(whole, int(rows) - _rows(packed))])
        data, scale = data[:rows], whole.scale
        if scale is not None and whole.type is not QuantType.SFP8:
            scale = np.concatenate([part.scale for part in packed] + [np.ones(max(0, int(rows) - _rows(packed)), "f4")])
            scale = scale[:rows]
        whole = PackedTensor(whole.type, (int(rows), matrix.columns), data, scale)
    return PackedArray.of(_aligned(whole), shape, matrix.summed, dtype)


def _rows(packed: Sequence[PackedTensor]) -> int:
    return sum(len(part.data) for part in packed)


def _empty_rows(like: PackedTensor, count: int) -> np.ndarray:
    """Rows of zeros, for ids that a file's table does not have."""
    zero = 0x88 if like.type is QuantType.INT4 else 0  # two codes 0, each stored plus 8
    return np.full((max(0, count), like.data.shape[1]), zero, np.uint8)


def _aligned(packed: PackedTensor) -> PackedTensor:
    """With arrays of its own, so that the tree does not hold on to a mapped file."""
    scale = None if packed.scale is None else np.array(packed.scale, np.float32)
    return PackedTensor(packed.type, packed.shape, np.array(packed.data), scale)


def _readers(leaf: Leaf, matrix: Matrix) -> list[tuple[str, Any]]:
    """The reader of each tensor of a leaf; a leaf of an Orbax folder is read as a whole and cut."""
    if isinstance(leaf, TableLeaf):
        return [(tensor.name, reader) for tensor, reader in leaf.slots]
    whole: list[dict[str, np.ndarray]] = []

    def values(name: str) -> np.ndarray:
        if not whole:
            out = np.empty(leaf.shape, np.float32)
            leaf.fill(out)
            parts = matrix.canonical(matrix.rows_of(out))
            whole.append({t.name: weights.fit_rows(part, t.shape[0]) for t, part in parts})
        return whole[0][name]

    def reader(tensor: Tensor) -> ArrayReader:
        return ArrayReader(lambda: values(tensor.name), np.float32)

    return [(tensor.name, reader(tensor)) for tensor in matrix.tensors]


def place(leaf: Any, sharding: Any) -> Any:
    """A leaf on its devices. `sharding` is that of the float leaf; see `packed_sharding`."""
    if not isinstance(leaf, Packed):
        return jax.device_put(leaf, sharding)
    return jax.device_put(leaf, None if sharding is None else packed_sharding(leaf, sharding))


def packed_sharding(leaf: Packed, sharding: Any) -> Any:
    """The shardings of a packed leaf's arrays, as a leaf of the same structure, from that of the float leaf.

    Rows are cut as the first of the axes that make them up, columns as the first axis that is summed over, where whole
    blocks come out; what cannot be cut so is copied to all devices.
    """
    if isinstance(leaf, PackedParts):
        spec = getattr(sharding, "spec", None)
        inner = sharding if spec is None else NamedSharding(sharding.mesh, PartitionSpec(*spec[1:]))
        return PackedParts(tuple(packed_sharding(part, inner) for part in leaf.parts))
    _, tree = jax.tree.flatten(leaf)
    if not isinstance(sharding, NamedSharding):
        return jax.tree.unflatten(tree, [sharding] * tree.num_leaves)
    first, _ = leaf.summed
    spec = (*sharding.spec, *(None,) * (leaf.ndim - len(sharding.spec)))
    rows = spec[0] if first > 0 else spec[leaf.summed[1]] if leaf.ndim > leaf.summed[1] else None
    columns = spec[first] if _blocks(leaf) % _ways(sharding, spec[first]) == 0 else None
    columns = None if columns == rows else columns
    data = NamedSharding(sharding.mesh, PartitionSpec(rows, columns))
    scale = PartitionSpec(rows) if leaf.scale is not None and leaf.scale.shape[0] == leaf.rows else PartitionSpec()
    places = [data] + ([] if leaf.scale is None else [NamedSharding(sharding.mesh, scale)])
    return jax.tree.unflatten(tree, places)


def _blocks(leaf: PackedArray) -> int:
    return leaf.columns // leaf.type.block_size


def _ways(sharding: NamedSharding, names: Any) -> int:
    names = (names,) if isinstance(names, str) else names or ()
    return int(np.prod([sharding.mesh.shape[name] for name in names], dtype=np.int64))


def packed_leaves(
    leaves: dict[str, Leaf],
    config: Any,
    how: str,
    importance: Importance | None,
    read: Callable[[Leaf, str], tuple[DType, Callable[[], Any], Any]],
) -> dict[str, Any]:
    """Every leaf of a checkpoint, those of matrices packed.

    Args:
      leaves: by name; each is let go when it has been read.
      config: of the model; None: unknown.
      how: of `recipe_of`.
      importance: as in `Packer`.
      read: gives (dtype, how to read it as floats, sharding) of a leaf.

    Raises:
      UnsupportedError: the model's configuration is not known.
    """
    if config is None:
        raise UnsupportedError("quantize: the configuration of these parameters is not known; pass config=...")
    packer = Packer(config, how, importance)
    packer.open(leaves)
    done: dict[str, Any] = {}
    for name in list(leaves):
        dtype, floats, sharding = read(leaves.pop(name), name)
        packed = packer(name, jnp.dtype(dtype))
        done[name] = floats() if packed is None else place(packed, sharding)
    return done
