# SPDX-License-Identifier: Apache-2.0
"""Tensors of a checkpoint, or arrays in memory, in packed form: bytes that are of the wanted type already stay as they
are, everything else is quantized, a large table in runs of rows.

The encoders are `quants.py`, the choice of types `_quants_mixes.py`; which reader gives what is `_load_tensors.py`.
SFP8 has one scale for a tensor of the `.sbs` format, which fuses some: those share a scale here, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gemma import _quants_encode
from gemma.errors import CheckpointError, ShapeError, UnsupportedError
from gemma.quants import PackedTensor, QuantType, quantize
from gemma.weights import Tensor

_RUN = 1 << 22  # values quantized together


def pack_tensor(
    tensor: Tensor,
    reader: Any,
    type: QuantType,
    *,
    importance: np.ndarray | None = None,
    sfp8_scale: np.float32 | None = None,
) -> PackedTensor:
    """One matrix in a type.

    Args:
      tensor: which one it is.
      reader: of `gemma.saving`'s kind: called with a dtype it gives the values; `packed`, `parts` are used if there.
      type: wanted.
      importance: as in `quants.quantize`.
      sfp8_scale: of the tensors that share one; None: that of the tensor alone.

    Raises:
      CheckpointError: NaN, infinity, values out of range; with the tensor's name.
      ShapeError: rows that are not whole blocks; with the tensor's name.
    """
    stored = as_stored(reader, type)
    if stored is not None:
        return stored
    columns = tensor.shape[-1]
    if type is QuantType.SFP8 and sfp8_scale is None:
        sfp8_scale = shared_scale([(tensor, reader)])
    try:
        data = np.empty((tensor.shape[0], type.row_bytes(columns)), np.uint8)
        scales, start = [], 0
        for values in runs(tensor, reader):
            if type is QuantType.SFP8:
                codes = _quants_encode.encode_sfp8(_quants_encode.fit_sfp8(_finite(values), sfp8_scale))
            else:
                packed = quantize(values, type, importance=importance)
                codes = packed.data
                scales += [] if packed.scale is None else [packed.scale]
            data[start : start + len(codes)] = codes
            start += len(codes)
    except (CheckpointError, ShapeError) as error:
        raise error.__class__(f"{tensor.name}: {error}") from None
    if type is QuantType.SFP8:
        return PackedTensor(type, tensor.shape, data, np.array([sfp8_scale], np.float32))
    return PackedTensor(type, tensor.shape, data, np.concatenate(scales) if scales else None)


def as_stored(reader: Any, type: QuantType) -> PackedTensor | None:
    """The tensor's own bytes, where they are of the type: quantizing twice would lose twice."""
    if type.is_float or reader.dtype != type.name or not hasattr(reader, "packed"):
        return None
    try:
        return reader.packed()
    except UnsupportedError:  # stored in other axes than the canonical ones
        return None


def runs(tensor: Tensor, reader: Any) -> Iterator[np.ndarray]:
    """The values as float32, in runs of rows where the reader can, so that a table is never whole in memory."""
    if hasattr(reader, "parts"):
        for _, values in reader.parts(np.float32, _RUN):
            yield values
        return
    values = reader(np.float32)
    step = max(1, _RUN // max(1, tensor.shape[-1]))
    for start in range(0, len(values), step):
        yield values[start : start + step]


def shared_scale(pairs: Sequence[tuple[Tensor, Any]]) -> np.float32:
    """The SFP8 scale of tensors that share one."""
    peaks = []
    for tensor, reader in pairs:
        try:
            peaks += [np.abs(_finite(values)).max(initial=0) for values in runs(tensor, reader)]
        except CheckpointError as error:
            raise CheckpointError(f"{tensor.name}: {error}") from None
    return _quants_encode.sfp8_scale(np.asarray(peaks, np.float32))


def sfp8_groups(tensors: Sequence[Tensor]) -> Mapping[str, list[Tensor]]:
    """Tensors that share an SFP8 scale, by the name of the first: those that an `.sbs` file holds as one."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        slot = tensor.slots.get("sbs")
        groups.setdefault(tensor.name if slot is None else slot.name, []).append(tensor)
    return {members[0].name: members for members in groups.values()}


def _finite(values: np.ndarray) -> np.ndarray:
    bad = ~np.isfinite(values)
    if bad.any():
        raise CheckpointError(
            f"cannot be packed as SFP8: expected finite values, got {int(bad.sum())} NaN or infinite ones; repair the "
            f"weights first"
        )
    return np.asarray(values, np.float32)
