# SPDX-License-Identifier: Apache-2.0
"""safetensors files, sharded indexes and a writer: the header is checked in full before any tensor is addressed.

The header is taken apart piece by piece (no nesting to follow, so no depth to fear) and every rule of the format is
checked in Python integers: spans inside the data, no overlap, no hole, no byte after the last tensor. Values are not
looked at. One interface over this and GGUF is `gemma.checkpoint`; tensor names are `gemma.weights`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from json.decoder import scanstring
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from gemma._atomic import atomic_file
from gemma.errors import CheckpointNotFound, FormatError, ShapeError, UnsupportedError
from gemma.formats._source import Source

MAX_FORMAT_HEADER = 100_000_000  # bytes; the format's own limit
MAX_HEADER = 1 << 24  # bytes; ours, some forty times the largest header of the family
MAX_TENSORS, MAX_DIMS, MAX_NAME, MAX_SHARDS = 32_768, 8, 1024, 1000
INDEX_NAME = "model.safetensors.index.json"

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_UNREAD = {"U16", "U32", "U64", "C64", "F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
_SPACE = re.compile(r"[ \t\n\r]*")
_FLAT_OBJECT = re.compile(r"\{[^{}]{0,4096}\}")


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """One tensor of a file: `offset` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Safetensors:
    """The parsed header of one file: `tensors` (name to `SafeTensor`, in file order) and `metadata` (str to str)."""

    def __init__(self, source: Source):
        self.source = source
        self.metadata, self.tensors = _Header(source).parse()


class _Header:
    """The JSON header, read from left to right."""

    def __init__(self, source: Source):
        self.path = source.path
        if source.size < 8:
            raise FormatError(self.path, source.size, "expected an 8-byte header length, the file ends before")
        length = int.from_bytes(source.read(0, 8).tobytes(), "little")
        if not 2 <= length <= min(MAX_FORMAT_HEADER, source.size - 8):
            raise FormatError(
                self.path,
                0,
                f"header length {length}: expected 2..{MAX_FORMAT_HEADER} and at most the {source.size - 8} bytes left",
            )
        if length > MAX_HEADER:
            raise FormatError(self.path, 0, f"header length {length}: gemmakit reads at most {MAX_HEADER} bytes")
        raw = source.read(8, length).tobytes()
        if raw[:1] != b"{":
            raise FormatError(self.path, 8, f'the header must begin with "{{", got {raw[:1]!r}')
        try:
            self.text = raw.decode()
        except UnicodeDecodeError as error:
            raise FormatError(self.path, 8 + error.start, "the header is not UTF-8") from None
        self.at, self.data, self.room = 0, 8 + length, source.size - 8 - length

    def fail(self, rule: str, at: int | None = None) -> FormatError:
        at = self.at if at is None else at
        return FormatError(self.path, 8 + len(self.text[:at].encode()), rule)

    def parse(self) -> tuple[dict[str, str], dict[str, SafeTensor]]:
        metadata: dict[str, str] | None = None
        tensors: dict[str, SafeTensor] = {}
        places: dict[str, int] = {}
        for name, start in self.members():
            if name == "__metadata__":
                if metadata is not None:
                    raise self.fail('duplicate key "__metadata__"', start)
                metadata = {}
                for key, at in self.members():
                    if key in metadata:
                        raise self.fail(f"__metadata__: duplicate key {key!r}", at)
                    metadata[key] = self.string("__metadata__ maps strings to strings")
                continue
            if name in tensors:
                raise self.fail(f"duplicate tensor name {name!r}", start)
            if len(tensors) == MAX_TENSORS:
                raise self.fail(f"more than {MAX_TENSORS} tensors", start)
            if not 0 < len(name) <= MAX_NAME or not name.isprintable():
                raise self.fail(
                    f"expected a printable tensor name of 1..{MAX_NAME} characters, got {name!r:.80}", start
                )
            tensors[name], places[name] = self.tensor(name), start
        rest = self.text[self.at :].strip(" \t\n\r")
        if rest:
            raise self.fail(f"unexpected text after the header: {rest[:20]!r}")
        self.check_spans(tensors, places)
        return metadata or {}, tensors

    def skip_space(self) -> str:
        """Moves to the next character and returns it; empty at the end."""
        self.at = _SPACE.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def expect(self, characters: str, what: str) -> str:
        got = self.skip_space()
        if not got or got not in characters:
            raise self.fail(f"{what}: expected one of {' '.join(characters)}, got {got or 'the end of the header'!r}")
        self.at += 1
        return got

    def string(self, what: str) -> str:
        start = self.at
        self.expect('"', what)
        try:
            value, self.at = scanstring(self.text, self.at, True)
            value.encode()  # a lone surrogate is no text
        except ValueError as error:
            raise self.fail(f"{what}: not a JSON string ({type(error).__name__})", start) from None
        return value

    def members(self):
        """(key, its place) of the object that begins here; the caller reads each value before the next step."""
        self.expect("{", "an object")
        if self.skip_space() == "}":
            self.at += 1
            return
        while True:
            self.skip_space()
            start = self.at
            key = self.string("a key")
            self.expect(":", f"after {key!r:.80}")
            yield key, start
            if self.expect(",}", f"after the value of {key!r:.80}") == "}":
                return

    def tensor(self, name: str) -> SafeTensor:
        self.skip_space()
        found = _FLAT_OBJECT.match(self.text, self.at)
        start = self.at
        if found is None:
            raise self.fail(f"{name}: expected an object with dtype, shape and data_offsets")
        try:
            pairs = json.loads(found[0], object_pairs_hook=list, parse_float=str, parse_constant=str)
        except (ValueError, RecursionError) as error:
            raise self.fail(f"{name}: not JSON ({error})") from None
        self.at = found.end()
        entry = dict(pairs)
        if len(pairs) != 3 or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise self.fail(
                f"{name}: expected exactly dtype, shape and data_offsets, got {[k for k, _ in pairs]}", start
            )
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if isinstance(dtype, str) and dtype in _UNREAD:
            raise UnsupportedError(
                f"{self.path}: tensor {name} has dtype {dtype}; expected one of: {', '.join(DTYPES)}"
            )
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self.fail(f"{name}: unknown dtype {dtype!r:.80}", start)
        for what, numbers in (("shape", shape), ("data_offsets", span)):
            if not isinstance(numbers, list) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
                raise self.fail(f"{name}: {what} must be a list of whole numbers, got {numbers!r:.80}", start)
        if len(shape) > MAX_DIMS:
            raise self.fail(f"{name}: at most {MAX_DIMS} dimensions, got {len(shape)}", start)
        if len(span) != 2 or not span[0] <= span[1] <= self.room:
            raise self.fail(f"{name}: data_offsets {span!r:.80} are not a span of the {self.room} bytes of data", start)
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if nbytes != span[1] - span[0]:
            raise self.fail(f"{name}: {dtype} of shape {shape} is {nbytes} bytes, its span {span[1] - span[0]}", start)
        return SafeTensor(name, dtype, tuple(shape), self.data + span[0], nbytes)

    def check_spans(self, tensors: dict[str, SafeTensor], places: dict[str, int]) -> None:
        """The tensors cover the data exactly: no overlap, no hole, nothing after the last."""
        end = self.data
        for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.nbytes)):
            if tensor.offset != end:
                what = "overlap the tensor before them" if tensor.offset < end else f"leave a hole from byte {end}"
                raise self.fail(f"{tensor.name}: its bytes from {tensor.offset} {what}", places[tensor.name])
            end += tensor.nbytes
        if end != self.data + self.room:
            raise FormatError(self.path, end, f"{self.data + self.room - end} bytes after the last tensor")


def read_index(path: Path) -> dict[str, str]:
    """The `weight_map` of a sharded checkpoint's index: tensor name to file name, a plain name in the same folder."""
    source = Source(path, mmap=False)
    try:
        if source.size > MAX_HEADER:
            raise FormatError(path, None, f"an index of {source.size} bytes: gemmakit reads at most {MAX_HEADER}")
        raw = source.read(0, source.size).tobytes()
    finally:
        source.close()
    # An index has three objects and no list; names may hold a bracket, a hostile file holds millions.
    if raw.count(b"{") + raw.count(b"[") > 1000 or raw.count(b'"') > 8 * MAX_TENSORS:
        raise FormatError(path, None, "too many objects or strings for an index of tensor names")
    try:
        index = json.loads(raw, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(path, getattr(error, "pos", None), f"not JSON ({type(error).__name__}: {error})") from None
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise FormatError(path, None, 'expected an object with a non-empty "weight_map"')
    for tensor, file in names.items():
        plain = isinstance(file, str) and re.fullmatch(r"[\w.+-]+", file) and file not in (".", "..")
        if not plain:
            raise FormatError(path, None, f"{tensor!r:.80}: the shard name must be a plain file name, got {file!r:.80}")
    if len(set(names.values())) > MAX_SHARDS:
        raise FormatError(path, None, f"more than {MAX_SHARDS} shards")
    return names


def _unique(path: Path, pairs: list) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise FormatError(path, None, f"duplicate key {twice!r:.80}")
    return found


def open_shards(index: Path, *, mmap: bool = True) -> list[Safetensors]:
    """Opens every shard of an index and checks that each tensor is in exactly the shard it names."""
    names, shards = read_index(index), []
    with contextlib.ExitStack() as cleanup:
        for file in dict.fromkeys(names.values()):
            path = index.parent / file
            if not path.exists():
                raise CheckpointNotFound(f"{path}: this shard is named by {index.name} but missing; fetch it again")
            source = Source(path, mmap=mmap)
            cleanup.callback(source.close)
            shard = Safetensors(source)
            wanted = {name for name, home in names.items() if home == file}
            absent, extra = sorted(wanted - set(shard.tensors)), sorted(set(shard.tensors) - wanted)
            if absent:
                raise FormatError(
                    path, None, f"{index.name} places {absent[0]!r} here (one of {len(absent)}), but it is absent"
                )
            if extra:
                where = f"places it in {names[extra[0]]}" if extra[0] in names else "does not list it"
                raise FormatError(path, None, f"holds {extra[0]!r} (one of {len(extra)}), but {index.name} {where}")
            shards.append(shard)
        cleanup.pop_all()
    return shards


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file to be: `dtype` is one of `DTYPES`' values."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one safetensors file, atomically: a temporary file beside it, flushed to disk, then renamed.

    A reader or a crash sees the old file or the new one, never a part. Tensors are written one at a time, those with
    the largest items first, so that each is aligned to its items.

    Raises:
      ShapeError: a name, dtype or metadata value that the format cannot hold.
      SaveError: the file cannot be written; what was there before is unchanged.
    """
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    header(specs, metadata)  # refuses what cannot be written before a file appears
    with atomic_file(path, replace=True) as file:
        stream_safetensors(file, specs, lambda spec: [tensors[spec.name]], metadata)


def stream_safetensors(
    file: BinaryIO,
    specs: Sequence[TensorSpec],
    read: Callable[[TensorSpec], Iterable[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes a file whose tensors are made one at a time; returns its size.

    Args:
      file: open for writing, at its start.
      specs: what it will hold.
      read: gives one tensor in one or more runs along its first axis, of the dtype that its spec states; called once
        for each, those with the largest items first.
      metadata: strings.

    Raises:
      ShapeError: what the format cannot hold, or a tensor that is not what its spec says.
    """
    head, ordered = header(specs, metadata)
    file.write(head)
    for spec in ordered:
        rows = 0
        for run in read(spec):
            rows += len(run) if run.ndim else 1
            if run.dtype != spec.dtype or run.shape[1:] != spec.shape[1:] or rows > (spec.shape or (1,))[0]:
                raise ShapeError(f"{spec.name}: expected {spec.dtype} {spec.shape}, got {run.dtype} {run.shape}")
            file.write(np.ascontiguousarray(run).reshape(-1).view(np.uint8).data)
        if rows != (spec.shape or (1,))[0]:
            raise ShapeError(f"{spec.name}: expected {spec.dtype} {spec.shape}, got {rows} rows")
    return len(head) + sum(spec.nbytes for spec in specs)


def header(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[TensorSpec]]:
    """(the bytes before the data, the specs in the order of their data)."""
    values: dict[str, Any] = {}
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ShapeError(f"metadata: expected strings, got {key!r}: {value!r}")
    if metadata:
        values["__metadata__"] = dict(metadata)
    titles, end = {dtype: name for name, dtype in DTYPES.items()}, 0
    # Largest items first keeps each tensor aligned to its own items without holes, which the format forbids.
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    for spec in ordered:
        name, title = spec.name, titles.get(spec.dtype)
        if title is None or not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise ShapeError(
                f"{name!r}: expected a printable name and a dtype of {', '.join(DTYPES)}, got {spec.dtype}"
            )
        if len(spec.shape) > MAX_DIMS or name == "__metadata__" or name in values:
            raise ShapeError(
                f"{name}: at most {MAX_DIMS} dimensions, a new name and not the reserved, got {spec.shape}"
            )
        values[name] = {"dtype": title, "shape": list(spec.shape), "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered


def shard(specs: Sequence[TensorSpec], max_bytes: int) -> list[list[TensorSpec]]:
    """Cuts tensors into files of at most `max_bytes` of data each, in order; a larger tensor has a file of its own."""
    if max_bytes < 1:
        raise ShapeError(f"max_shard_bytes: expected at least 1, got {max_bytes}")
    parts: list[list[TensorSpec]] = []
    room = 0
    for spec in specs:
        if not parts or spec.nbytes > room:
            parts.append([])
            room = max_bytes
        parts[-1].append(spec)
        room -= spec.nbytes
    if len(parts) > MAX_SHARDS:
        raise ShapeError(f"max_shard_bytes: {max_bytes} makes {len(parts)} files; at most {MAX_SHARDS} are read again")
    return parts


def index_text(parts: Sequence[Sequence[TensorSpec]], files: Sequence[str]) -> str:
    """The text of `model.safetensors.index.json` of a sharded checkpoint."""
    where = {spec.name: file for part, file in zip(parts, files, strict=True) for spec in part}
    total = sum(spec.nbytes for part in parts for spec in part)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
