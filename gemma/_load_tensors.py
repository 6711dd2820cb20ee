# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's tensors under canonical names and axes: bound strictly first, then read one by one.

`gemma.checkpoint` opens files and shows `load_tensors` to the world; names, axes and offsets come from
`gemma.weights`. Putting arrays on devices is the frameworks' part.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma import weights
from gemma.errors import CheckpointError, UnsupportedError, WeightsMismatch
from gemma.quants import PackedTensor, QuantType

if TYPE_CHECKING:
    from gemma.checkpoint import Checkpoint
    from gemma.weights import Slot, Tensor

_CHUNK = 1 << 18  # elements looked at together, or bytes of 16 of them compared
_EXPONENT = {"bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00), "float32": (np.uint32, 0x7F800000)}


class NonFiniteWarning(UserWarning):
    """A checkpoint holds NaN or infinite weights. Raised once for each `load_tensors`."""


class TensorReader:
    """Reads one canonical tensor; call it with a dtype.

    Attributes:
      slot: where it is in the file (`slot.name` on disk, `slot.axes` there).
      dtype: how it is stored, "F32", "Q4_K", ...
    """

    def __init__(self, checkpoint: Checkpoint, tensor: Tensor, slots: Sequence[Slot], values: _ValueCheck):
        self.slot, *self._copies = slots
        self.dtype = checkpoint.info(self.slot.name).dtype
        self._checkpoint, self._tensor, self._values = checkpoint, tensor, values

    def __call__(self, dtype=None, out: np.ndarray | None = None) -> np.ndarray:
        """The tensor in canonical axes (`Tensor.axes`, `Tensor.shape`); padding rows of a vocabulary are fitted.

        Args:
          dtype: float32, bfloat16 or float16; None keeps plain floats as stored and makes packed ones float32.
          out: an array of the tensor's shape to fill and return; its dtype wins. Where file and tensor have the same
            layout it is filled from the file directly, so that nothing exists twice.

        Returns:
          A read-only view of the file where nothing changes, else a fresh array (or `out`). Norms have the GGUF's 1 removed, in
          float32 and rounded once.

        Raises:
          CheckpointError: NaN or infinite values under `strict_values`.
          WeightsMismatch: a stored copy of a tied tensor differs from it.
        """
        slot, tensor = self.slot, self._tensor
        for copy in self._copies:
            _check_copy(self._checkpoint, slot.name, copy.name)
        dtype = dtype if out is None else out.dtype
        direct = out is not None and out.flags.c_contiguous and self._stored_as_is()
        stored = np.float32 if slot.offset else dtype
        array = self._checkpoint.read(slot.name, stored, out=out if direct else None)
        self._values.look_at(slot.name, array)
        if direct:
            return array
        array = weights.extract(array, tensor, slot)
        if slot.offset and dtype is not None:
            array = array.astype(dtype, copy=False)
        array = weights.fit_rows(array, tensor.shape[0]) if tensor.axes[0] == "V" else array
        if out is None:
            return array
        out[...] = array
        return out

    def parts(self, dtype=np.float32, values: int = 1 << 20) -> Iterator[tuple[int, np.ndarray]]:
        """The tensor in runs of rows, for looking at large ones: (first row, fresh array or view [rows, ...]).

        Args:
          dtype: as in a call.
          values: of a run, about; a tensor that is laid out differently in the file comes whole.
        """
        tensor, info = self._tensor, self._checkpoint.info(self.slot.name)
        if not self._stored_as_is() or len(info.shape) < 2:
            yield 0, self(dtype)
            return
        for copy in self._copies:
            _check_copy(self._checkpoint, self.slot.name, copy.name)
        step = max(1, values // max(1, math.prod(info.shape[1:])))
        for start in range(0, tensor.shape[0], step):
            part = self._checkpoint.read_rows(self.slot.name, start, min(start + step, tensor.shape[0]), dtype)
            self._values.look_at(self.slot.name, part)
            yield start, part

    def same_bytes(self, other: TensorReader) -> bool:
        """Whether the other one reads the very same bytes, stored in the same way."""
        mine, theirs = self._checkpoint.info(self.slot.name), other._checkpoint.info(other.slot.name)
        layout = [(slot.axes, slot.index, slot.rows, slot.offset, slot.shape) for slot in (self.slot, other.slot)]
        if layout[0] != layout[1] or (mine.dtype, mine.nbytes) != (theirs.dtype, theirs.nbytes):
            return False
        if mine.dtype not in QuantType.__members__ or QuantType[mine.dtype].has_scale:
            return False
        return _same_raw(self._checkpoint.raw(mine.name), other._checkpoint.raw(theirs.name))

    def _stored_as_is(self) -> bool:
        """Whether the array in the file is the tensor, number by number."""
        slot = self.slot
        plain = not slot.index and slot.rows is None and not slot.offset and slot.axes == self._tensor.axes
        return plain and slot.shape == self._tensor.shape

    def packed(self) -> PackedTensor:
        """The tensor in its stored type. UnsupportedError where the file's axes are not the canonical ones.

        INT8 and SFP8, whose values are one byte each, are brought into canonical axes.
        """
        slot = self.slot
        if not self._stored_as_is() and self.dtype in ("INT8", "SFP8"):
            return self._rearranged(self._checkpoint.packed(slot.name))
        if not self._stored_as_is():
            raise UnsupportedError(
                f"{self._checkpoint.path}: {slot.name} {slot.shape} is not stored as {self._tensor.axes!r} "
                f"{self._tensor.shape}; read it as floats"
            )
        return self._checkpoint.packed(slot.name)

    def _rearranged(self, whole: PackedTensor) -> PackedTensor:
        """A tensor out of an array of one byte per value: the rows of a fused array, or other axes."""
        slot, tensor, scale = self.slot, self._tensor, whole.scale
        if len(tensor.shape) < 2 or slot.offset:
            raise UnsupportedError(f"{self._checkpoint.path}: {slot.name} is packed, but not a matrix")
        codes = weights.extract(whole.data.reshape(whole.shape), tensor, slot)
        codes = weights.fit_rows(codes, tensor.shape[0]) if tensor.axes[0] == "V" else codes
        if whole.type is QuantType.INT8:
            if slot.index or (slot.axes != tensor.axes):
                raise UnsupportedError(f"{self._checkpoint.path}: {slot.name}: its scales are not those of outputs")
            scale = scale if slot.rows is None else scale[slice(*slot.rows)]
            scale = np.concatenate([scale, np.ones(max(0, len(codes) - len(scale)), np.float32)])[: len(codes)]
        return PackedTensor(whole.type, tensor.shape, np.ascontiguousarray(codes), np.ascontiguousarray(scale))

    def release(self) -> None:
        """Lets the mapped pages of the tensor leave memory once its values have been copied elsewhere."""
        self._checkpoint.release(self.slot.name)


class _ValueCheck:
    """Counts NaN and infinity in what is read: a warning for the first tensor that has some, or an error."""

    def __init__(self, path: Any, strict: bool):
        self._path, self._strict, self._warned = path, strict, False

    def look_at(self, name: str, array: np.ndarray) -> None:
        count = count_nonfinite(array)
        if not count:
            return
        found = f"{self._path}: {name} holds {count} NaN or infinite values of {array.size} (as {array.dtype})"
        if self._strict:
            raise CheckpointError(f"{found}; strict_values refuses them: get an undamaged file")
        if not self._warned:
            self._warned = True
            warnings.warn(f"{found}; later tensors are not reported", NonFiniteWarning, stacklevel=4)


def count_nonfinite(array: np.ndarray) -> int:
    """How many values of a float array are NaN or infinite; 0 for other dtypes. Memory: one chunk."""
    if array.dtype.name not in _EXPONENT:
        return 0 if array.dtype.kind in "iub" else int(np.count_nonzero(~np.isfinite(array.astype(np.float64))))
    word, mask = _EXPONENT[array.dtype.name]
    flat = array.reshape(-1) if array.flags.c_contiguous else np.ascontiguousarray(array).reshape(-1)
    count = 0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if word is np.uint32:
            with np.errstate(over="ignore", invalid="ignore"):
                if np.isfinite(np.add.reduce(part)):  # one quick pass; a sum that overflows is looked at properly
                    continue
        count += int(np.count_nonzero((part.view(word) & word(mask)) == word(mask)))
    return count


def _check_copy(checkpoint: Checkpoint, name: str, copy: str) -> None:
    """A tied tensor stored twice must hold the same values twice."""
    first, second = checkpoint.info(name), checkpoint.info(copy)
    same = first.shape == second.shape
    if same and first.dtype == second.dtype:
        same = _same_raw(checkpoint.raw(name), checkpoint.raw(copy))
    elif same:
        same = np.array_equal(checkpoint.read(name, np.float32), checkpoint.read(copy, np.float32))
    if not same:
        raise WeightsMismatch(
            checkpoint.path,
            unexpected=[copy],
            hint=f"{copy} differs from {name}, but the configuration ties them: if the model was trained with its own "
            f"output head, set tie_word_embeddings to false in the configuration",
        )


def _same_raw(a: np.ndarray, b: np.ndarray) -> bool:
    step = 16 * _CHUNK
    return all(np.array_equal(a[i : i + step], b[i : i + step]) for i in range(0, a.size, step))


def _check_layers(checkpoint: Checkpoint, config: Any) -> None:
    """A file that claims more layers than it has tensors is refused before thousands of names are made up for it."""
    sides = (config, *(getattr(config, side, None) for side in ("text_config", "encoder", "decoder")))
    layers = max(getattr(side, "num_hidden_layers", 0) for side in sides)
    held = len(checkpoint.tensors)
    if layers > held:
        raise WeightsMismatch(
            checkpoint.path,
            missing=[f"most of {layers} layers: the checkpoint has {held} tensors in all"],
            hint="the configuration is not that of this file",
        )


def load_tensors(
    checkpoint: Checkpoint, config=None, *, text_only: bool = False, strict_values: bool = False
) -> Iterator[tuple[Tensor, TensorReader]]:
    """Binds a checkpoint to a configuration, strictly, and gives a reader for each tensor, in the table's order.

    Binding happens at the call, before the first tensor is taken; reading happens when a reader is called.

    Args:
      checkpoint: open; it must stay open while readers are used.
      config: of the model; None takes the checkpoint's own.
      text_only: leave the vision tower and its projector in the file.
      strict_values: refuse NaN and infinite values, instead of one NonFiniteWarning.

    Raises:
      WeightsMismatch: names that are missing, unexpected or of the wrong shape, all of them at once.
    """
    config = checkpoint.config() if config is None else config
    _check_layers(checkpoint, config)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    bound = weights.bind(shapes, config, format=checkpoint.format, path=checkpoint.path, text_only=text_only)
    values = _ValueCheck(checkpoint.path, strict_values)
    wanted = [tensor for tensor in weights.tensors(config) if tensor.name in bound]
    return iter([(tensor, TensorReader(checkpoint, tensor, bound[tensor.name], values)) for tensor in wanted])
