# SPDX-License-Identifier: Apache-2.0
"""One array of a file out of the tensors that it holds: the piece of `pack` that a writer needs, one array at a time.

Which tensors share an array (fused rows, stacked layers) is `groups`; moving a whole model at once is `_pack.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gemma.errors import ShapeError
from gemma.weights._axes import convert
from gemma.weights._pack import _dims, _view, fit_rows
from gemma.weights._table import Tensor, check_format


def groups(table: Iterable[Tensor], format: str) -> dict[str, tuple[Tensor, ...]]:
    """Name on disk to the tensors in that array, in the order of `table`; tensors without a place are left out."""
    check_format(format)
    found: dict[str, list[Tensor]] = {}
    for tensor in table:
        if format in tensor.slots:
            found.setdefault(tensor.slots[format].name, []).append(tensor)
    return {name: tuple(members) for name, members in found.items()}


def assemble(parts: Sequence[tuple[Tensor, Any]], format: str, rows: int | None = None) -> np.ndarray:
    """The array on disk that holds these tensors.

    Args:
      parts: (tensor, its values in canonical axes), all that share one array, all of one dtype.
      format: "hf", "flax", "gguf", "ckpt", "npz" or "sbs".
      rows: of a vocabulary table, where the file has another count than the table's: cut, or filled with zeros.

    Returns:
      An array of `slot.shape` (with `rows`): a view of the values where numpy can make one. An offset (the 1 of a
      GGUF's norms) is added in the values' dtype.

    Raises:
      ShapeError: values of the wrong shape, or of several dtypes.
    """
    whole = None
    for tensor, value in parts:
        slot = tensor.slots[format]
        if tuple(value.shape) != tensor.shape:
            raise ShapeError(f"{tensor.name}: expected shape {tensor.shape}, got {tuple(value.shape)}")
        dims = _dims(tensor, slot)
        if tensor.axes[0] == "V":
            dims["V"] = slot.shape[0] if rows is None else rows
            value = fit_rows(value, dims["V"])
        value = convert(value, tensor.axes, slot.axes, dims)
        if slot.offset:
            value = value + value.dtype.type(slot.offset)
        if not slot.index and slot.rows is None:
            return value
        if whole is None:
            whole = np.empty(slot.shape, value.dtype)
        if whole.dtype != value.dtype:
            raise ShapeError(f"{slot.name}: its parts are {whole.dtype} and {value.dtype}; expected one dtype")
        _view(whole, slot)[...] = value
    return whole
