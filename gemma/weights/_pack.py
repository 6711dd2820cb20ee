# SPDX-License-Identifier: Apache-2.0
"""Moves values between the layouts of the table: one tensor out of an array on disk, or a whole model to a format.

Which names a file must have is `_bind.py`; opening files is `gemma.checkpoint`. Framework-free: numpy arrays only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma.errors import ShapeError, WeightsMismatch
from gemma.weights._axes import convert
from gemma.weights._bind import bind
from gemma.weights._table import AnyConfig, Slot, Tensor, check_format, tensors


def _view(array: Any, slot: Slot) -> Any:
    """The part of an array on disk that a slot names, still in the file's axes."""
    part = array[slot.index] if slot.index else array
    return part if slot.rows is None else part[slot.rows[0] : slot.rows[1] : slot.rows[2]]


def _dims(tensor: Tensor, slot: Slot) -> dict[str, int]:
    """The tensor's sizes, with the vocabulary rows of this file: only they may differ between formats."""
    return {**tensor.dims, "V": slot.shape[0]} if tensor.axes[0] == "V" else dict(tensor.dims)


def extract(array: Any, tensor: Tensor, slot: Slot) -> Any:
    """One canonical tensor out of the array on disk that holds it; `offset` is subtracted, in the array's dtype.

    Args:
      array: the whole array called `slot.name`, of shape `slot.shape`, float (dequantized).
      tensor: which tensor.
      slot: its place, as `bind` returned it.

    Returns:
      The tensor in canonical axes: a view of `array` where numpy can make one. A vocabulary table keeps the rows of
      the file (`fit_rows` changes them).
    """
    value = convert(_view(array, slot), slot.axes, tensor.axes, _dims(tensor, slot))
    return value - value.dtype.type(slot.offset) if slot.offset else value


def fit_rows(table: Any, rows: int) -> Any:
    """A vocabulary table [V, D] with `rows` rows: surplus rows are cut, missing ones are zeros.

    Published tables are padded to different multiples (256,000 and 256,128 rows, 262,144 and 262,208, 257,152 and
    257,216); no token has an id in the padding.
    """
    if table.shape[0] >= rows:
        return table[:rows]
    fitted = np.zeros((rows, *table.shape[1:]), table.dtype)
    fitted[: table.shape[0]] = table
    return fitted


def unpack(arrays: Mapping[str, Any], config: AnyConfig, *, format: str, path: str = "arrays") -> dict[str, Any]:
    """A whole model from one format's arrays: canonical name to array, bound strictly, padding rows fitted.

    Raises:
      WeightsMismatch: as `bind`; also when a copy of a tied tensor differs from it.
    """
    places = bind({name: array.shape for name, array in arrays.items()}, config, format=format, path=path)
    values = {}
    for tensor in tensors(config):
        first, *copies = places[tensor.name]
        value = extract(arrays[first.name], tensor, first)
        differ = [copy.name for copy in copies if not np.array_equal(extract(arrays[copy.name], tensor, copy), value)]
        if differ:
            raise WeightsMismatch(path, misshaped=(f"{n}: expected the values of {first.name} (tied)" for n in differ))
        values[tensor.name] = fit_rows(value, tensor.shape[0]) if tensor.axes[0] == "V" else value
    return values


def pack(values: Mapping[str, np.ndarray], config: AnyConfig, *, format: str) -> dict[str, np.ndarray]:
    """A whole model in one format: the inverse of `unpack`.

    Args:
      values: canonical name to array in canonical axes, all of one dtype per fused array.
      config: whose tensors they are.
      format: "hf", "flax", "gguf", "ckpt", "npz" or "sbs".

    Returns:
      Name on disk to array, fused, stacked and padded as that format has it. Arrays are views where numpy can make one.

    Raises:
      WeightsMismatch: a tensor is absent, of the wrong shape, or has no name in this format.
    """
    check_format(format)
    table = tensors(config)
    missing = [t.name for t in table if t.name not in values]
    homeless = [f"{t.name} (no name in {format})" for t in table if format not in t.slots]
    wrong = [
        f"{t.name}: expected {t.shape}, got {tuple(values[t.name].shape)}"
        for t in table
        if t.name in values and tuple(values[t.name].shape) != t.shape
    ]
    surplus = sorted(set(values) - {t.name for t in table})
    if missing or homeless or wrong or surplus:
        raise WeightsMismatch(format, missing=missing + homeless, unexpected=surplus, misshaped=wrong)
    packed: dict[str, np.ndarray] = {}
    for tensor in table:
        slot, value = tensor.slots[format], values[tensor.name]
        if tensor.axes[0] == "V":
            value = fit_rows(value, slot.shape[0])
        value = convert(value, tensor.axes, slot.axes, _dims(tensor, slot))
        if slot.offset:
            value = value + value.dtype.type(slot.offset)
        if not slot.index and slot.rows is None:
            packed[slot.name] = value
            continue
        whole = packed.setdefault(slot.name, np.empty(slot.shape, value.dtype))
        if whole.dtype != value.dtype:
            raise ShapeError(f"{slot.name}: its parts are {whole.dtype} and {value.dtype}; expected one dtype")
        _view(whole, slot)[...] = value
    return packed
