# SPDX-License-Identifier: Apache-2.0
"""Reads and writes `.npz` files, the form in which big_vision publishes PaliGemma and SigLIP.

Only headers are parsed here; nothing is unpickled, whatever a header says. Names and layouts are in `gemma.weights`,
the archive around the arrays is `_zip.py`'s business. bfloat16 has no name of its own in this format: it is written as
two raw bytes (`V2`), and any `V2` is read as bfloat16.
"""

from __future__ import annotations

import dataclasses
import math
import re
import zipfile
from collections.abc import Iterable
from typing import BinaryIO

import ml_dtypes
import numpy as np

from gemma.errors import FormatError, ShapeError, UnsupportedError
from gemma.formats._source import Source
from gemma.formats._zip import Inflated, Member, Verified, read_members, read_start
from gemma.formats.safetensors import DTYPES, MAX_DIMS

_MAX_HEADER = 4096  # bytes; an array of this family needs about 120
_HEADER = re.compile(
    rb"\{ ?'descr': '([<>|=]?[a-zA-Z]\d{0,3})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}, ?){0,32}(?:\d{1,18})?)\),? ?\}[ \n]*"  # a number without a comma is the last
)
_TITLES = {dtype: title for title, dtype in DTYPES.items()} | {np.dtype("V2"): "BF16"}


@dataclasses.dataclass(frozen=True)
class NpzArray:
    """One array: where its values start in `source` (the file itself, or the inflated member)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Verified | Inflated
    offset: int
    nbytes: int


def read_npz(source: Source) -> dict[str, NpzArray]:
    """The arrays of an archive by name, the names without `.npy`.

    Raises:
      FormatError: a member that is no array, or whose size is not that of its header.
      UnsupportedError: Python objects, big-endian or column-major arrays, or another type than the family has.
    """
    arrays, members = {}, read_members(source)
    whole = Verified(source, members.values())
    for member in members.values():
        if member.name.endswith("/"):
            continue
        if not member.name.endswith(".npy"):
            raise FormatError(source.path, member.offset, f"member {member.name}: expected only .npy arrays")
        name = member.name.removesuffix(".npy")
        arrays[name] = _array(source, member, name, whole)
    if not arrays:
        raise FormatError(source.path, None, "an archive without arrays")
    return arrays


def _array(source: Source, member: Member, name: str, whole: Verified) -> NpzArray:
    where = Inflated(source, member) if member.deflated else whole
    start = 0 if member.deflated else member.offset
    head = read_start(source, member, _MAX_HEADER).tobytes()
    dtype, fortran, shape, offset = _header(source, member, name, head)
    title = _TITLES.get(dtype)
    if title is None:
        raise UnsupportedError(f"{source.path}: {name} holds {dtype}; expected one of {', '.join(DTYPES)}")
    if fortran and len(shape) > 1:
        raise UnsupportedError(f"{source.path}: {name} is stored column by column; save it with order='C'")
    if len(shape) > MAX_DIMS:
        raise FormatError(source.path, member.offset, f"{name}: at most {MAX_DIMS} dimensions, got {len(shape)}")
    if 0 in shape:
        raise FormatError(source.path, member.offset, f"{name}: shape {shape} holds no values")
    nbytes = math.prod(shape) * dtype.itemsize
    if offset + nbytes != member.nbytes:
        raise FormatError(
            source.path,
            member.offset,
            f"{name}: {title} {shape} is {nbytes} bytes, the member has {member.nbytes - offset}",
        )
    return NpzArray(name, title, tuple(shape), where, start + offset, nbytes)


def _header(source: Source, member: Member, name: str, head: bytes) -> tuple[np.dtype, bool, tuple[int, ...], int]:
    """(dtype, whether column by column, shape, where the values start) of a `.npy`.

    numpy's own parser evaluates the header as Python literals and repairs those of Python 2; ours knows the one form
    that is ever written.
    """
    width = 2 if head[6:7] == b"\x01" else 4
    offset = 8 + width + int.from_bytes(head[8 : 8 + width], "little")
    found = _HEADER.fullmatch(head[8 + width : offset]) if offset <= len(head) else None
    if head[:6] != b"\x93NUMPY" or head[6:7] not in (b"\x01", b"\x02", b"\x03") or found is None:
        raise FormatError(source.path, member.offset, f"{name}: not the header of a .npy array of plain numbers")
    try:
        dtype = np.dtype(found[1].decode())
    except TypeError:
        raise FormatError(source.path, member.offset, f"{name}: unknown type {found[1][:40]!r}") from None
    shape = tuple(int(n) for n in found[3].split(b",") if n.strip())
    return dtype, found[2] == b"True", shape, offset


def write_npz(file: BinaryIO, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes arrays one after the other, uncompressed, so that a reader can map them.

    Args:
      file: open for writing; making it safe against a crash is the caller's part.
      arrays: names without `.npy`, each used once.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays:
            if array.dtype not in _TITLES:
                raise ShapeError(f"{name}: expected one of {', '.join(DTYPES)}, got {array.dtype}")
            plain = array.view("V2") if array.dtype == ml_dtypes.bfloat16 else array
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(plain), version=(1, 0), allow_pickle=False)
