# SPDX-License-Identifier: Apache-2.0
"""Importance matrices: for each weight the mean square of its inputs over a text, which quantizers weight errors by.

Files: llama.cpp's GGUF (`<tensor>.in_sum2` and `<tensor>.counts`), and a `.npz` of name to mean squares, which is read
only. Collecting one is `gemma/gm/_importance.py`; what a type makes of it is `quants.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma import weights
from gemma._atomic import atomic_file
from gemma.checkpoint import open_checkpoint
from gemma.errors import CheckpointError, FormatError, ShapeError
from gemma.formats.gguf_write import TensorSpec, write_gguf
from gemma.quants import QuantType

_SUMS, _COUNTS = ".in_sum2", ".counts"


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Name, as in the file, to float32 [inputs].

    Raises:
      CheckpointError: a checkpoint, but no importance matrix. FormatError: numbers that are none.
    """
    path = Path(path)
    with open_checkpoint(path) as opened:
        if opened.format == "npz":
            found = {name: opened.read(name, np.float32) for name in opened.tensors}
        else:
            names = [name.removesuffix(_SUMS) for name in opened.tensors if name.endswith(_SUMS)]
            if opened.format != "gguf" or not names:
                raise CheckpointError(
                    f"{path}: expected an importance matrix: a .npz, or a GGUF with *{_SUMS} and *{_COUNTS}"
                )
            found = {}
            for name in names:
                sums, counts = (opened.read(name + end, np.float32).reshape(-1) for end in (_SUMS, _COUNTS))
                found[name] = (sums / max(float(counts[0]), 1.0)).astype(np.float32)
    for name, values in found.items():
        if values.ndim != 1 or not np.isfinite(values).all() or values.min(initial=0) < 0:
            raise FormatError(path, None, f"{name}: expected finite numbers of at least 0 along one axis")
    return found


def canonical(values: Mapping[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """The same under canonical names; names of the GGUF format and canonical ones are known.

    Raises:
      ShapeError: a name or a length of another model.
    """
    table = {tensor.name: tensor for tensor in weights.tensors(config)}
    disk = {tensor.slots["gguf"].name: name for name, tensor in table.items() if "gguf" in tensor.slots}
    found = {disk.get(name, name): np.asarray(array, np.float32) for name, array in values.items()}
    for name, array in found.items():
        if name not in table or array.shape != table[name].shape[-1:]:
            expected = f"float32 {table[name].shape[-1:]}" if name in table else "a tensor of this model"
            raise ShapeError(f"imatrix: {name}: expected {expected}, got {array.dtype} {array.shape}")
    return found


def write(
    path: str | os.PathLike[str],
    values: Mapping[str, np.ndarray],
    config: Any,
    *,
    tokens: int,
    context: int,
    dataset: str = "",
    replace: bool = False,
) -> None:
    """Writes llama.cpp's GGUF form.

    Args:
      path: of the file.
      values: canonical name to float32 [inputs], mean squares.
      config: of the model, whose tensors need names in the GGUF format.
      tokens: how many were seen.
      context: tokens in a window.
      dataset: the name of the text.
      replace: put it in the place of what exists.
    """
    table = {tensor.name: tensor for tensor in weights.tensors(config)}
    arrays: dict[str, np.ndarray] = {}
    for name, mean in canonical(values, config).items():
        if "gguf" not in table[name].slots:
            raise ShapeError(f"{name}: has no name in the GGUF format, whose names an importance matrix uses")
        disk = table[name].slots["gguf"].name
        arrays[disk + _SUMS] = (mean * np.float32(tokens))[None].astype("<f4")
        arrays[disk + _COUNTS] = np.array([[tokens]], "<f4")
    metadata: dict[str, Any] = {"general.type": "imatrix", "imatrix.chunk_size": context}
    metadata |= {"imatrix.chunk_count": -(-tokens // context), "imatrix.datasets": [dataset]}
    specs = [TensorSpec(name, QuantType.F32, array.shape) for name, array in arrays.items()]
    with atomic_file(path, replace=replace) as file:
        write_gguf(file, metadata, specs, lambda spec: [arrays[spec.name]])


def is_file_of(path: Path) -> bool:
    """Whether a file is an importance matrix, or at least no text: it begins as a GGUF or an archive does."""
    with open(path, "rb") as file:
        head = file.read(4)
    return head in (b"GGUF", b"PK\x03\x04")


__all__ = ["canonical", "is_file_of", "read", "write"]
