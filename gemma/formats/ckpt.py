# SPDX-License-Identifier: Apache-2.0
"""Reads and writes PyTorch archives: the `.ckpt` of gemma_pytorch, in float or int8, and `.bin`/`.pt` state dicts.

The archive is a zip (`_zip.py`) with one pickle (`_pickle.py`, which runs nothing) and one member per storage. Tensors
are addressed where they lie in the file. Names and layouts are in `gemma.weights`; opening one as a checkpoint is in
`gemma/_checkpoint_kinds.py`.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import BinaryIO

import ml_dtypes
import numpy as np

from gemma.errors import FormatError, ShapeError, UnsupportedError
from gemma.formats import _pickle
from gemma.formats._pickle import TensorRecord
from gemma.formats._source import Source
from gemma.formats._zip import Member, read_member, read_members

STATE = "model_state_dict"  # where gemma_pytorch keeps the weights
SCALER = "_scaler"  # `NAME_scaler` holds one factor per output row of an int8 `NAME`
_MAX_PICKLE = 1 << 23
_ALIGNMENT = 64
_DTYPES = {
    "FloatStorage": ("F32", 4),
    "BFloat16Storage": ("BF16", 2),
    "HalfStorage": ("F16", 2),
    "DoubleStorage": ("F64", 8),
    "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1),
    "ShortStorage": ("I16", 2),
    "IntStorage": ("I32", 4),
    "LongStorage": ("I64", 8),
    "BoolStorage": ("BOOL", 1),
    "ComplexFloatStorage": ("C64", 8),
}
_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.int8): "CharStorage",
}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor: `offset` counts bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_ckpt(source: Source) -> dict[str, StoredTensor]:
    """The tensors of a PyTorch archive by name.

    Raises:
      FormatError: a damaged archive, a pickle that imports anything but tensors, storages that do not fit.
      UnsupportedError: the formats from before 2020, compressed members, or transposed tensors.
    """
    members = read_members(source)
    roots = [name.removesuffix("data.pkl") for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise FormatError(source.path, None, f"expected one data.pkl in the archive, got {len(roots)}")
    root = roots[0]
    _check_byte_order(source, members.get(f"{root}byteorder"))
    member = members[f"{root}data.pkl"]
    if member.nbytes > _MAX_PICKLE:
        raise FormatError(source.path, member.offset, f"a pickle of {member.nbytes} bytes; at most {_MAX_PICKLE}")
    state = _pickle.loads(read_member(source, member).tobytes(), source.path)
    if isinstance(state, dict) and STATE in state:
        state = state[STATE]
    if not isinstance(state, dict) or not state:
        raise FormatError(source.path, member.offset, f"expected a state dict, or one under {STATE!r}")
    tensors = {}
    for name, record in state.items():
        if not isinstance(name, str) or not name.isprintable() or not isinstance(record, TensorRecord):
            raise FormatError(source.path, member.offset, f"{name!r:.200}: expected a name and a tensor")
        tensors[name] = _located(source, members, root, name, record)
    return tensors


def _check_byte_order(source: Source, member: Member | None) -> None:
    if member is not None and (member.nbytes > 16 or read_member(source, member).tobytes() != b"little"):
        raise UnsupportedError(f"{source.path}: written on a big-endian machine; expected little-endian tensors")


def _located(source: Source, members: Mapping[str, Member], root: str, name: str, record: TensorRecord) -> StoredTensor:
    title, width = _DTYPES[record.dtype]
    member = members.get(f"{root}data/{record.storage}")
    if member is None:
        raise FormatError(source.path, None, f"{name}: its storage {record.storage!r:.80} is not in the archive")
    if member.deflated:
        raise UnsupportedError(f"{source.path}: {name} is compressed; save it again with torch.save")
    if member.nbytes != record.storage_size * width:
        raise FormatError(
            source.path,
            member.offset,
            f"{name}: a storage of {record.storage_size} {title} values, but {member.nbytes} bytes are there",
        )
    count = math.prod(record.shape)
    if not count:
        raise FormatError(source.path, member.offset, f"{name}: shape {record.shape} holds no values")
    whole = [math.prod(record.shape[axis + 1 :]) for axis in range(len(record.shape))]
    dense = all(n == 1 or have == want for n, have, want in zip(record.shape, record.stride, whole))
    if not dense:
        raise UnsupportedError(
            f"{source.path}: {name} {record.shape} has strides {record.stride}; save it again after .contiguous()"
        )
    if record.offset + count > record.storage_size:
        raise FormatError(
            source.path,
            member.offset,
            f"{name}: {count} values from {record.offset} on, its storage has {record.storage_size}",
        )
    return StoredTensor(name, title, record.shape, member.offset + record.offset * width, count * width)


def write_ckpt(
    file: BinaryIO,
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    read: Callable[[str], np.ndarray],
    name: str = "model",
) -> None:
    """Writes an archive that `torch.load` and gemma_pytorch read, one tensor in memory at a time.

    Args:
      file: open for writing; making it safe against a crash is the caller's part.
      tensors: dtype (float32, bfloat16, float16 or int8) and shape of each tensor.
      read: gives the values of a tensor when they are to be written.
      name: of the folder inside of the archive.
    """
    records = {}
    for index, (key, (dtype, shape)) in enumerate(tensors.items()):
        if np.dtype(dtype) not in _STORAGES:
            raise ShapeError(f"{key}: expected float32, bfloat16, float16 or int8, got {dtype}")
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        records[key] = TensorRecord(_STORAGES[np.dtype(dtype)], str(index), math.prod(shape), 0, tuple(shape), stride)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, file, f"{name}/data.pkl", _pickle.dumps({STATE: records}))
        _add(archive, file, f"{name}/byteorder", b"little")
        for key, record in records.items():
            array = np.ascontiguousarray(read(key))
            if array.dtype != np.dtype(tensors[key][0]) or array.shape != record.shape:
                raise ShapeError(f"{key}: announced {tensors[key]}, got {array.dtype} {array.shape}")
            _add(archive, file, f"{name}/data/{record.storage}", array.reshape(-1).view(np.uint8).data)
        _add(archive, file, f"{name}/version", b"3\n")


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, data: bytes | memoryview) -> None:
    """A stored member whose bytes begin at a multiple of 64, by an extra field of padding as torch writes it."""
    info = zipfile.ZipInfo(name)
    taken = file.tell() + 30 + len(name.encode()) + 20 + 4  # local header, zip64 field, the padding's own header
    padding = -taken % _ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as member:
        member.write(data)
