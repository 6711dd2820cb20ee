# SPDX-License-Identifier: Apache-2.0
"""Writes a GGUF file, version 3, little-endian: header and metadata first, then tensor by tensor as they are made.

Every size is known and checked before the first byte is written, so that nothing has to be patched afterwards and one
tensor at a time is in memory. Which tensors and keys a model needs is `gguf_metadata.py` and `gemma.saving`; the bytes
of a block are `gemma.quants`; the file appears under its name by `gemma._atomic`. Reading is `gguf.py`.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from gemma.errors import ShapeError
from gemma.formats import gguf as limits
from gemma.quants import QuantType

ALIGNMENT = 32
_MAGIC, _VERSION = b"GGUF", 3
# numpy dtype of an array of numbers to GGUF's type id
_ARRAYS = {"uint8": 0, "int8": 1, "uint16": 2, "int16": 3, "uint32": 4, "int32": 5, "float32": 6, "bool": 7}
_ARRAYS |= {"uint64": 10, "int64": 11, "float64": 12}


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of the file to be: `shape` row-major, rows of whole blocks of `type`."""

    name: str
    type: QuantType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


def write_gguf(
    file: BinaryIO,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorSpec],
    read: Callable[[TensorSpec], Iterable[np.ndarray]],
    *,
    alignment: int = ALIGNMENT,
) -> int:
    """Writes a whole file.

    Args:
      file: open for writing, at its start.
      metadata: key to bool, int (UINT32, or UINT64 and INT32 where it needs to be), float (FLOAT32), str, a numpy
        array of one axis, or a list of strings.
      tensors: in the order in which they are written.
      read: gives the packed bytes of a tensor in one or more arrays, any dtype, C-contiguous, `nbytes` together; called
        once for each, in order, after the header has been written.
      alignment: of the tensors, a power of two; another than 32 is stated in the metadata.

    Returns:
      The number of bytes written.

    Raises:
      ShapeError: a name, value, shape or size that the format or our own reader's limits do not allow; before the first
        byte is written, except for what `read` returns.
    """
    if alignment != ALIGNMENT:
        metadata = {**metadata, "general.alignment": alignment}
    head = _header(metadata, tensors, alignment)
    head += bytes(-len(head) % alignment)
    file.write(head)
    position = len(head)
    for spec in tensors:
        left = spec.nbytes
        for data in read(spec):
            left -= data.nbytes
            if left < 0:
                break
            if not data.flags.c_contiguous:
                raise ShapeError(f"{spec.name}: expected contiguous bytes, got strides {data.strides}")
            file.write(memoryview(data.reshape(-1).view(np.uint8)))
        if left:
            raise ShapeError(
                f"{spec.name}: expected {spec.nbytes} contiguous bytes ({spec.type.name} {spec.shape}), "
                f"got {spec.nbytes - left}"
            )
        padding = -spec.nbytes % alignment
        file.write(bytes(padding))
        position += spec.nbytes + padding
    return position


def _header(metadata: Mapping[str, Any], tensors: Sequence[TensorSpec], alignment: int) -> bytearray:
    """Everything before the data, not yet padded."""
    if alignment & (alignment - 1) or not 8 <= alignment <= limits.MAX_ALIGNMENT:
        raise ShapeError(f"alignment: expected a power of two in 8..{limits.MAX_ALIGNMENT}, got {alignment}")
    if len(metadata) > limits.MAX_PAIRS or len(tensors) > limits.MAX_TENSORS:
        raise ShapeError(
            f"expected at most {limits.MAX_PAIRS} pairs and {limits.MAX_TENSORS} tensors, "
            f"got {len(metadata)} and {len(tensors)}"
        )
    out = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        if not key or len(key.encode()) > limits.MAX_KEY:
            raise ShapeError(f"metadata: expected a key of 1..{limits.MAX_KEY} bytes, got {key[:80]!r}")
        out += _string(key) + _value(key, value)
    offset, seen = 0, set()
    for spec in tensors:
        _check(spec, seen)
        dims = spec.shape[::-1]
        out += _string(spec.name)
        out += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, spec.type.ggml_id, offset)
        offset += spec.nbytes + -spec.nbytes % alignment
    return out


def _check(spec: TensorSpec, seen: set[str]) -> None:
    if not 0 < len(spec.name.encode()) < limits.MAX_TENSOR_NAME or spec.name in seen:
        raise ShapeError(
            f"{spec.name[:80]!r}: expected a new name of 1..{limits.MAX_TENSOR_NAME - 1} bytes for each tensor"
        )
    seen.add(spec.name)
    if not 1 <= len(spec.shape) <= limits.MAX_DIMS or 0 in spec.shape:
        raise ShapeError(f"{spec.name}: expected 1..{limits.MAX_DIMS} axes, none of length 0, got {spec.shape}")
    if spec.type.ggml_id is None:
        raise ShapeError(f"{spec.name}: {spec.type.name} is no type of GGUF")
    try:
        spec.type.row_bytes(spec.shape[-1])
    except ShapeError as error:
        raise ShapeError(f"{spec.name}: {error}") from None


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.name in _ARRAYS:
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        return struct.pack("<IIQ", 9, _ARRAYS[value.dtype.name], len(value)) + np.ascontiguousarray(little).tobytes()
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        for kind, layout, low, high in ((4, "<II", 0, 2**32), (5, "<Ii", -(2**31), 2**31), (10, "<IQ", 0, 2**64)):
            if low <= value < high:
                return struct.pack(layout, kind, value)
    if isinstance(value, float) and (math.isinf(value) or abs(value) < 3.4e38):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    raise ShapeError(
        f"metadata {key}: expected a bool, int, float, str, list of str or array of numbers, got {value!r:.80}"
    )
