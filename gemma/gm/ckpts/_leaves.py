# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as the leaves of a JAX parameter tree, each of which fills a buffer, whole or in part.

Two kinds: a file in somebody else's layout goes through the weight table, several tensors to a leaf; an Orbax folder
has the leaves themselves. What is done with them is `_load.py`'s.

    kv_einsum/w  [2, K, D, H]        [0] <- layers.3.attn.k  (K H) D
                                     [1] <- layers.3.attn.v  (K H) D
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemma import config as configs
from gemma import weights
from gemma.checkpoint import Checkpoint, TensorReader, load_tensors
from gemma.errors import UnsupportedError
from gemma.gm.ckpts import _detect, _orbax

VISION = "vision_encoder"
# Released checkpoints keep what follows the vision tower in float32; the networks expect it so.
_MM = ("mm_input_projection", "mm_soft_embedding_norm")
_ALIGNMENT = 64  # bytes; XLA's CPU client takes buffers that start at a multiple of it as they are


class Leaf(abc.ABC):
    """One leaf of the tree: `name` with slashes, `shape`, and `dtype`, what it becomes if nobody asks for another."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    parts = False  # whether `fill` can read less than everything

    @abc.abstractmethod
    def fill(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        """Writes the leaf, or the part that `index` cuts out, into `out`, in its dtype."""

    def runs(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """The leaf in runs of rows along its first axis; whole where it cannot be read in parts."""
        out = np.empty(self.shape, dtype)
        self.fill(out)
        yield out

    @property
    def is_float(self) -> bool:
        return self.dtype in _orbax.FLOATS

    @property
    def of_vision(self) -> bool:
        """Whether it belongs to the vision tower or to what joins it to the decoder."""
        return any(part in (VISION, *_MM) for part in self.name.split("/"))

    def array(self, dtype: np.dtype, sharding: Any) -> jax.Array:
        """The leaf on its devices; one that is spread over several is read in the parts that each of them holds."""
        spread = self.parts and isinstance(sharding, jax.sharding.Sharding) and not sharding.is_fully_replicated
        if not spread:
            out = aligned_empty(self.shape, dtype)
            self.fill(out)
            return jax.device_put(out, sharding, may_alias=True)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            spans = [axis.indices(size)[:2] for axis, size in zip(index, self.shape, strict=True)]
            out = aligned_empty(tuple(stop - start for start, stop in spans), dtype)
            self.fill(out, tuple(slice(*span) for span in spans))
            return out

        return jax.make_array_from_callback(self.shape, sharding, part)


class TableLeaf(Leaf):
    """Filled slot by slot from the tensors of a file, through the weight table.

    Args:
      name: of the leaf.
      parts: its tensors and their readers.
      as_stored: keep float16, and bfloat16 of the vision tower. False: what the networks of `gm.nn` take, for which both
        become float32: Gemma's activations overflow in float16. Packed types become float32 either way.
    """

    def __init__(self, name: str, parts: Sequence[tuple[weights.Tensor, Any]], as_stored: bool = False):
        self.name, self.slots = name, parts
        self.shape = parts[0][0].slots["flax"].shape
        stored = {reader.dtype for _, reader in parts}
        plain = _orbax.DTYPES.get(stored.pop()) if len(stored) == 1 else None
        kept = plain in _orbax.FLOATS and (as_stored or (plain == ml_dtypes.bfloat16 and not self.of_vision))
        self.dtype = plain if kept else np.dtype(np.float32)

    def fill(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        assert not index, "tensors of this file are read whole"
        for tensor, reader in self.slots:
            slot = tensor.slots["flax"]
            part = out[slot.index] if slot.index else out
            if slot.rows is not None:
                part = part[slice(*slot.rows)]
            if tensor.axes[0] == "V":
                _fill_rows(part, tensor, reader)
            elif slot.axes == tensor.axes and isinstance(reader, TensorReader):
                reader(out=part)
            else:
                part[...] = weights.convert(reader(out.dtype), tensor.axes, slot.axes, tensor.dims)

    def runs(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """A vocabulary table comes in runs: as a whole it would be half of a small model."""
        (tensor, reader), slot = self.slots[0], self.slots[0][0].slots["flax"]
        table = tensor.axes[0] == "V" and slot.axes == tensor.axes and not slot.index and slot.rows is None
        if len(self.slots) > 1 or not table or not isinstance(reader, TensorReader):
            yield from super().runs(dtype)
            return
        rows = min(self.shape[0], tensor.shape[0])
        for start, values in reader.parts(dtype):
            yield values[: max(0, rows - start)]
        if rows < self.shape[0]:
            yield np.zeros((self.shape[0] - rows, *self.shape[1:]), dtype)


def _fill_rows(part: np.ndarray, tensor: weights.Tensor, reader: Any) -> None:
    """A vocabulary table: the JAX one may have more rows than the file's, which are zero, or fewer."""
    rows = min(len(part), tensor.shape[0])
    if rows == tensor.shape[0] and isinstance(reader, TensorReader):
        reader(out=part[:rows])
    elif isinstance(reader, TensorReader):
        for start, values in reader.parts(part.dtype):  # not whole: the largest tensor would be there twice
            part[start : start + len(values)] = values[: max(0, rows - start)]
    else:
        part[:rows] = reader(part.dtype)[:rows]
    part[rows:] = 0


class OrbaxLeaf(Leaf):
    """An array of an Orbax folder."""

    parts = True

    def __init__(self, name: str, checkpoint: _orbax.OrbaxCheckpoint):
        info = checkpoint.info(name)
        self.name, self.shape, self._checkpoint = name, info.shape, checkpoint
        self.dtype = _orbax.DTYPES[info.dtype]
        if self.is_float and any(part in _MM for part in name.split("/")):
            self.dtype = np.dtype(np.float32)

    def fill(self, out: np.ndarray, index: tuple[slice, ...] = ()) -> None:
        self._checkpoint.read_part(self.name, index, out)


def leaves_of(checkpoint: Checkpoint, *, text_only: bool) -> dict[str, Leaf]:
    """Every leaf of a checkpoint, strictly checked against its configuration.

    Raises:
      WeightsMismatch: leaves that the model has no place for, or lacks, or of the wrong shape.
      UnsupportedError: a model without a JAX tree in this format.
    """
    if not isinstance(checkpoint, _orbax.OrbaxCheckpoint):
        config = gemma_config(checkpoint)
        return grouped(load_tensors(checkpoint, config, text_only=text_only))
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    _detect.check(shapes, checkpoint.detected(), checkpoint.path, text_only=text_only)
    leaves = {name: OrbaxLeaf(name, checkpoint) for name in checkpoint.tensors}
    return {name: leaf for name, leaf in leaves.items() if not (text_only and leaf.of_vision)}


def grouped(tensors: Iterable[tuple[weights.Tensor, Any]], *, as_stored: bool = False) -> dict[str, Leaf]:
    """The leaves that tensors make up, by slash name; readers are those of `gemma.saving`.

    Raises:
      UnsupportedError: a tensor has no place in a JAX tree.
    """
    parts: dict[str, list[tuple[weights.Tensor, Any]]] = {}
    for tensor, reader in tensors:
        if "flax" not in tensor.slots:
            raise UnsupportedError(f"{tensor.name}: has no place in a JAX parameter tree")
        parts.setdefault(tensor.slots["flax"].name, []).append((tensor, reader))
    return {name: TableLeaf(name, found, as_stored) for name, found in parts.items()}


def gemma_config(checkpoint: Checkpoint) -> configs.GemmaConfig | configs.T5GemmaConfig:
    """The configuration of a checkpoint that goes through the table."""
    config = checkpoint.config()
    if not isinstance(config, (configs.GemmaConfig, configs.T5GemmaConfig)):
        raise UnsupportedError(
            f"{checkpoint.path}: holds a {type(config).__name__.removesuffix('Config')} model; gm.ckpts reads Gemma "
            f"text models, Gemma 3 and T5Gemma"
        )
    return config


def known_config(checkpoint: Checkpoint) -> _detect.AnyConfig | None:
    """The configuration as far as it is known, for checks that need one."""
    if isinstance(checkpoint, _orbax.OrbaxCheckpoint):
        return checkpoint.detected().config
    return gemma_config(checkpoint)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised C-contiguous array that JAX can take over without copying."""
    dtype = jnp.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
