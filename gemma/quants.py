# SPDX-License-Identifier: Apache-2.0
"""Quantized weights as data: the types, one packed matrix, and both directions between it and floats.

A packed matrix keeps the bytes of a GGUF file. Arithmetic on it belongs to the kernels; bytes in and out of files to
`checkpoint.py`. The bit work is in `_quants_decode.py`, `_quants_encode.py` and `_quants_encode_k.py`; which tensor of
a file gets which type is `_quants_mixes.py`. Axes: rows are outputs, columns are inputs (the contracting axis), and
blocks run along the columns.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import enum
import math
import os
from collections.abc import Iterator, Sequence

import ml_dtypes
import numpy as np

from gemma import _quants_decode, _quants_encode, _quants_encode_k
from gemma.errors import CheckpointError, ShapeError

_FLOATS = {"float32", "bfloat16", "float16"}


class QuantType(enum.Enum):
    """How values are stored. Members hold `(name, ggml id or None, block size in elements, block size in bytes)`.

    SFP8 is the 8-bit float of the `.sbs` format with one scale per tensor; INT8 and INT4 are symmetric with one scale
    per output channel, INT4 in the nibble order of Q4_0 (code + 8). These three are not types of GGUF.
    """

    F32 = ("F32", 0, 1, 4)
    F16 = ("F16", 1, 1, 2)
    BF16 = ("BF16", 30, 1, 2)
    Q4_0 = ("Q4_0", 2, 32, 18)
    Q4_1 = ("Q4_1", 3, 32, 20)
    Q5_0 = ("Q5_0", 6, 32, 22)
    Q5_1 = ("Q5_1", 7, 32, 24)
    Q8_0 = ("Q8_0", 8, 32, 34)
    Q2_K = ("Q2_K", 10, 256, 84)
    Q3_K = ("Q3_K", 11, 256, 110)
    Q4_K = ("Q4_K", 12, 256, 144)
    Q5_K = ("Q5_K", 13, 256, 176)
    Q6_K = ("Q6_K", 14, 256, 210)
    SFP8 = ("SFP8", None, 1, 1)
    INT8 = ("INT8", None, 1, 1)
    INT4 = ("INT4", None, 32, 16)

    def __init__(self, title: str, ggml_id: int | None, block_size: int, block_bytes: int):
        self.ggml_id, self.block_size, self.block_bytes = ggml_id, block_size, block_bytes

    @property
    def is_float(self) -> bool:
        """True for the types that are plain floats: F32, F16, BF16."""
        return self.name in ("F32", "F16", "BF16")

    @property
    def has_scale(self) -> bool:
        """True for the types whose scale is kept beside the bytes: SFP8 one, INT8 and INT4 one per row."""
        return self.ggml_id is None

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` elements; a row that is empty or not whole blocks is a ShapeError."""
        if columns % self.block_size or not columns:
            raise ShapeError(
                f"{self.name}: a row must be one or more whole blocks of {self.block_size} elements, got {columns}; "
                f"use a type with smaller blocks"
            )
        return columns // self.block_size * self.block_bytes


def _rows_columns(shape: Sequence[int]) -> tuple[int, int]:
    if not shape:
        raise ShapeError("expected at least one axis, got a scalar")
    return math.prod(shape[:-1]), shape[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class PackedTensor:
    """A weight in packed form.

    Attributes:
      type: how it is stored.
      shape: logical, (out, in); a vector has one axis, and leading axes of outputs may be more than one.
      data: uint8 [rows, row_bytes], GGUF byte order along the contracting axis; rows is the product of all axes but
        the last. May be a read-only view of a file.
      scale: float32, the factor that codes are multiplied by: [rows] for INT8 and INT4, [1] for SFP8, else None.
    """

    type: QuantType
    shape: tuple[int, ...]
    data: np.ndarray
    scale: np.ndarray | None = None

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        rows, columns = _rows_columns(self.shape)
        expected = (rows, self.type.row_bytes(columns))
        if self.data.dtype != np.uint8 or self.data.shape != expected:
            raise ShapeError(
                f"{self.type.name} of shape {self.shape}: expected data uint8 {expected}, "
                f"got {self.data.dtype} {self.data.shape}"
            )
        wanted = None if not self.type.has_scale else (1,) if self.type is QuantType.SFP8 else (rows,)
        got = None if self.scale is None else (self.scale.dtype.name, self.scale.shape)
        if got != (None if wanted is None else ("float32", wanted)):
            raise ShapeError(f"{self.type.name}.scale: expected {wanted and f'float32 {wanted}'}, got {got}")

    @property
    def nbytes(self) -> int:
        """Bytes held: data and scale."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def dequantize(self, dtype=np.float32, out: np.ndarray | None = None) -> np.ndarray:
        """The values, as an array of `shape`.

        Args:
          dtype: float32 (equal to ggml bit for bit), or bfloat16 / float16 (that value rounded once to nearest even).
          out: a C-contiguous array of `shape` to fill; its dtype wins over `dtype`.
        """
        out = _output(self.shape, dtype, out)
        if self.scale is None:
            return dequantize(self.data, self.type, self.shape, out)
        rows, step = out.reshape(-1, self.shape[-1]), max(1, _quants_decode.CHUNK // max(1, self.shape[-1]))
        for start in range(0, len(rows), step):  # in float32, so that a half type is rounded once
            part = np.s_[start : start + step]
            values = dequantize(self.data[part], self.type, rows[part].shape)
            values *= self.scale if self.scale.size == 1 else self.scale[part, None]
            rows[part] = values
        return out


def _output(shape, dtype, out):
    out = np.empty(shape, dtype) if out is None else out
    if out.dtype.name not in _FLOATS or out.shape != tuple(shape) or not out.flags.c_contiguous:
        raise ShapeError(
            f"out: expected a C-contiguous float32, bfloat16 or float16 array of shape {tuple(shape)}, "
            f"got {out.dtype} {out.shape}"
        )
    return out


def dequantize(
    data: np.ndarray, type: QuantType, shape: Sequence[int], out: np.ndarray | None = None, *, dtype=np.float32
) -> np.ndarray:
    """Codes to floats: the blocks of a GGUF type, or the unscaled codes of SFP8, INT8, INT4.

    Args:
      data: uint8, contiguous, the rows of a tensor of `shape` one after the other.
      type: how they are stored.
      shape: logical shape; the last axis is the one blocks run along.
      out: a C-contiguous array to fill; peak memory is its size and a few chunks.
      dtype: of the result where `out` is not given: float32, bfloat16 or float16.

    Returns:
      An array of `shape`, equal to ggml's float32 bit for bit, rounded once for the half types.
    """
    out = _output(tuple(shape), dtype, out)
    rows, columns = _rows_columns(out.shape)
    expected = rows * type.row_bytes(columns)
    if data.dtype != np.uint8 or data.nbytes != expected or not data.flags.c_contiguous:
        raise ShapeError(
            f"{type.name} of shape {out.shape}: expected {expected} contiguous bytes as uint8, "
            f"got {data.dtype} {data.shape} ({data.nbytes} bytes)"
        )
    blocks = out.size // type.block_size
    packed = data.reshape(blocks, type.block_bytes)
    _quants_decode.decode(type.name, type.block_size, lambda start, n: packed[start : start + n], blocks, out)
    return out


def quantize(
    x: np.ndarray, type: QuantType, *, importance: np.ndarray | None = None, threads: int | None = None
) -> PackedTensor:
    """Packs a float matrix [rows, cols] (or a vector).

    Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 equal ggml byte for byte; the K types search as ggml does, with its error; F16 and
    BF16 round to nearest even; SFP8, INT8 and INT4 as their decoders say.

    Args:
      x: float32, float16, bfloat16 or float64, of any layout; it is read in chunks of rows.
      type: how to store it.
      importance: float32 [cols], the mean square of each input (an importance matrix): the search of Q4_x, Q5_x and
        the K types then minimizes the error weighted by it. The other types do not look at it.
      threads: how many to use; None: one for each processor of this process. The result does not depend on it.

    Raises:
      ShapeError: not a float array, rows that are not whole blocks, or an importance that does not fit.
      CheckpointError: NaN or infinite values, or values whose scale does not fit float16.
    """
    if x.dtype.name not in (*_FLOATS, "float64"):
        raise ShapeError(f"quantize: expected a float array, got {x.dtype}")
    rows, columns = _rows_columns(x.shape)
    width = type.row_bytes(columns)
    importance = _checked_importance(importance, columns, type)
    flat = x.reshape(rows, columns)
    scale = np.ones(1 if type is QuantType.SFP8 else rows, np.float32) if type.has_scale else None
    if type is QuantType.SFP8:
        peaks = [np.abs(_finite(flat, part, type)).max(initial=0) for part in _row_chunks(flat)]
        scale[0] = _quants_encode.sfp8_scale(np.asarray(peaks, np.float32))
    data = np.empty((rows, width), np.uint8)

    def encode(part: slice) -> None:
        values = _finite(flat, part, type)
        if type is QuantType.SFP8:
            data[part] = _quants_encode.encode_sfp8(_quants_encode.fit_sfp8(values, scale[0]))
        elif type.has_scale:
            codes, scale[part] = _quants_encode.encode_channels(values, 127 if type is QuantType.INT8 else 7)
            data[part] = codes.view(np.uint8) if type is QuantType.INT8 else _quants_encode.pack_nibbles(codes)
        else:
            packed = _encode_blocks(values, type, importance)
            _check_scales(packed, type, part.start)
            data[part] = packed.reshape(len(values), width)

    parts = list(_row_chunks(flat))
    workers = min(len(parts), _processors() if threads is None else max(1, threads))
    if workers < 2:
        for part in parts:
            encode(part)
    else:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(encode, parts):  # the error of the first rows, if several have one
                pass
    return PackedTensor(type, tuple(x.shape), data, scale)


def quantization_error(x: np.ndarray, packed: PackedTensor) -> tuple[float, float]:
    """(largest absolute difference, root of the mean square difference) of a matrix and its packed form, in x's units.

    Memory: a few chunks of rows.
    """
    if tuple(x.shape) != packed.shape:
        raise ShapeError(f"expected the matrix {packed.shape} that was packed, got {tuple(x.shape)}")
    flat, worst, total = x.reshape(-1, x.shape[-1]), 0.0, 0.0
    for part in _row_chunks(flat):
        scale = packed.scale if packed.scale is None or packed.scale.size == 1 else packed.scale[part]
        values = PackedTensor(packed.type, flat[part].shape, packed.data[part], scale).dequantize()
        values -= flat[part].astype(np.float32, copy=False)
        worst = max(worst, float(np.abs(values).max(initial=0)))
        total += float(np.einsum("ij,ij->", values, values, dtype=np.float64))
    return worst, math.sqrt(total / max(1, flat.size))


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checked_importance(importance: np.ndarray | None, columns: int, type: QuantType) -> np.ndarray | None:
    """float32 [columns], or None where there is none or the type does not use it."""
    if importance is None:
        return None
    importance = np.asarray(importance)
    if importance.shape != (columns,) or importance.dtype.kind != "f":
        raise ShapeError(
            f"importance: expected float32 ({columns},), one for each input, got {importance.dtype} {importance.shape}"
        )
    importance = importance.astype(np.float32, copy=False)
    if not np.isfinite(importance).all() or importance.min() < 0:
        raise ShapeError("importance: expected finite numbers of at least 0; collect the matrix anew")
    if type.name not in _quants_encode.WEIGHTED and type.name not in _quants_encode_k.ENCODERS_K:
        return None
    # An input that was never active still counts a little: a block of such inputs would become zero otherwise.
    return np.maximum(importance, np.float32(1e-9) * importance.max(initial=0) or np.float32(1))


def _encode_blocks(values: np.ndarray, type: QuantType, importance: np.ndarray | None) -> np.ndarray:
    """float32 [rows, columns] to uint8 [blocks, block_bytes]."""
    size = type.block_size
    blocks = values.reshape(-1, size)
    spread = None
    if importance is not None:
        spread = np.broadcast_to(importance, values.shape).reshape(-1, size)
    if type.name in _quants_encode_k.ENCODERS_K:
        return _quants_encode_k.encode_k(type.name, blocks, spread)
    if spread is None:
        return _quants_encode.ENCODERS[type.name](blocks)
    with np.errstate(all="ignore"):  # huge values overflow in sums; the scales are checked afterwards
        squares = values * values
        squares += squares.mean(axis=1, keepdims=True)
        return _quants_encode.WEIGHTED[type.name](blocks, spread * np.sqrt(squares).reshape(-1, size))


def _row_chunks(flat: np.ndarray) -> Iterator[slice]:
    """Slices of rows, about a million values each."""
    step = max(1, (1 << 20) // max(1, flat.shape[1]))
    for start in range(0, len(flat), step):
        yield slice(start, start + step)


def _finite(flat: np.ndarray, part: slice, type: QuantType) -> np.ndarray:
    """Some rows as contiguous float32; rows with NaN or infinity are refused."""
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(flat[part], np.float32)
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = (int(i[0]) for i in np.nonzero(bad))
        raise CheckpointError(
            f"cannot be packed as {type.name}: expected finite float32 values, got {values[row, column]} "
            f"at [{part.start + row}, {column}] and {int(bad.sum()) - 1} more in these rows; repair the weights first"
        )
    return values


# Where the fp16 numbers of a block stand, by type; the block types without a line begin with their only one.
_HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,)}
_HALVES |= {"Q6_K": (208,)}


def _check_scales(packed: np.ndarray, type: QuantType, row: int) -> None:
    if type.is_float and type is not QuantType.F16:
        return
    if type is QuantType.F16:
        halves = packed.view("<u2")
    else:
        places = [i for at in _HALVES.get(type.name, (0,)) for i in (at, at + 1)]
        halves = np.ascontiguousarray(packed[:, places]).view("<u2")
    if ((halves & 0x7C00) == 0x7C00).any():
        raise CheckpointError(
            f"cannot be packed as {type.name}: values from row {row} on are too large for float16 (65504); use BF16"
        )


def float_dtype(type: QuantType) -> np.dtype:
    """The numpy dtype of a plain float type: float32, float16 or ml_dtypes.bfloat16."""
    return np.dtype({"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[type.name])
