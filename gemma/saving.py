# SPDX-License-Identifier: Apache-2.0
"""Writes a model into a file or folder of any format, tensor by tensor, and reports what was written.

`save` checks everything that can be checked before the first byte (names, shapes, the tokenizer, the destination, the
room on the disk), then streams: one array of the file is in memory at a time. What appears under the destination's name
is complete (`gemma._atomic`). Each format is a module with a function `write(job)`; this module knows no format's bytes.
Reading is `gemma.checkpoint`; a JAX tree becomes an iterable of tensors in `gemma.gm.ckpts`.

    with open_checkpoint("gemma-3-1b") as source:
        report = save("gemma.gguf", load_tensors(source), source.config(), format="gguf",
                      tokenizer=source.tokenizer_source(), quantize="q4_k_m")
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np

from gemma import weights
from gemma._atomic import check_destination, latest_valid, verify_manifest
from gemma._load_tensors import count_nonfinite
from gemma.errors import CheckpointError, ConfigError, SaveError, ShapeError, WeightsMismatch

if TYPE_CHECKING:
    from gemma.checkpoint import TokenizerSource
    from gemma.weights import Tensor

__all__ = [
    "FORMATS",
    "ArrayReader",
    "Format",
    "Job",
    "Reader",
    "SaveReport",
    "SavedTensor",
    "from_arrays",
    "latest_valid",
    "save",
    "verify_manifest",
]

MAX_SHARD_BYTES = 5_000_000_000
_FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_DTYPES = {dtype.name: dtype for dtype in _FLOATS.values()}


@dataclasses.dataclass(frozen=True)
class Format:
    """One format that can be written.

    Attributes:
      column: of the weight table that has its names.
      module: whose function writes it, imported when it is needed.
      function: its name; it takes a Job and returns a SaveReport.
      folder: whether the destination is a folder.
      quantizes: whether `quantize=` means something for it.
    """

    column: str
    module: str
    folder: bool = False
    quantizes: bool = False
    function: str = "write"


FORMATS: dict[str, Format] = {
    "safetensors": Format("hf", "gemma._save_safetensors", folder=True, quantizes=True),
    "gguf": Format("gguf", "gemma._save_gguf", quantizes=True),
    "ckpt": Format("ckpt", "gemma._save_folder", folder=True, quantizes=True, function="write_ckpt"),
    "npz": Format("npz", "gemma._save_folder", folder=True, function="write_npz"),
    "sbs": Format("sbs", "gemma._save_folder", folder=True, quantizes=True, function="write_sbs"),
}


class Reader(Protocol):
    """Gives one tensor in canonical axes. `gemma.checkpoint.TensorReader` and `ArrayReader` are readers.

    `dtype` is how it is stored, as in `TensorInfo`. A reader may also have `packed() -> PackedTensor` (the bytes of a
    quantized type as they are), `parts(dtype)` (runs of rows with their first row) and `release()` (its memory may go).
    """

    dtype: str

    def __call__(self, dtype: Any = None) -> np.ndarray: ...


class ArrayReader:
    """A Reader of an array in canonical axes, or of a function that gives one: float32, float16 or bfloat16.

    Args:
      values: the array, or a function without arguments, called once each time the tensor is read.
      dtype: of what the function gives; None: that of the array.
    """

    def __init__(self, values: np.ndarray | Callable[[], np.ndarray], dtype: Any = None):
        self._values = values
        name = np.dtype(values.dtype if dtype is None else dtype).name
        names = {dtype.name: title for title, dtype in _FLOATS.items()}
        if name not in names:
            raise ShapeError(f"expected an array of {', '.join(names)}, got {name}; cast it first")
        self.dtype = names[name]

    def __call__(self, dtype: Any = None) -> np.ndarray:
        array = np.asarray(self._values() if callable(self._values) else self._values)
        with np.errstate(over="ignore"):  # what leaves the range is counted by the job
            return array if dtype is None else array.astype(dtype, copy=False)


def from_arrays(values: Mapping[str, np.ndarray], config: Any) -> list[tuple[Tensor, Reader]]:
    """What `save` takes, from canonical name to array (`gemma.testing.random_tensors`, `weights.unpack`)."""
    table = weights.tensors(config)
    unknown = sorted(set(values) - {tensor.name for tensor in table})
    missing = [tensor.name for tensor in table if tensor.name not in values]
    if unknown or missing:
        raise WeightsMismatch("arrays", missing=missing, unexpected=unknown)
    return [(tensor, ArrayReader(values[tensor.name])) for tensor in table]


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """One array of the file: `type` as "F32", "BF16", "Q4_K"; the errors are None where no value was changed.

    `max_error` and `rmse` compare what was quantized with what it became, in the units of the weights; an array that
    keeps the bytes of its source has none.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    max_error: float | None = None
    rmse: float | None = None


@dataclasses.dataclass(frozen=True)
class SaveReport:
    """What `save` wrote. `bytes` is the size of all files; `notes` are things that a person should know."""

    format: str
    path: Path
    files: tuple[Path, ...]
    bytes: int
    tensors: tuple[SavedTensor, ...]
    notes: tuple[str, ...] = ()

    @property
    def types(self) -> dict[str, int]:
        """How many arrays of each type, most frequent first."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.type] = counts.get(tensor.type, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


@dataclasses.dataclass
class Job:
    """What a format's `write` gets: checked arguments, and the arrays of the file one at a time.

    Attributes:
      path: the destination; the writer opens it with `gemma._atomic`.
      config: of the model.
      arrays: name on disk to the (tensor, reader) pairs in it, in the order of the table.
      column: of the weight table.
      dtype: of all floats, or None: as they are stored, packed ones as float32.
      quantize, imatrix, max_shard_bytes, replace, tokenizer, metadata: as in `save`.
      notes: the writer may add to them.
    """

    path: Path
    config: Any
    arrays: dict[str, tuple[tuple[Tensor, Reader], ...]]
    column: str
    dtype: np.dtype | None
    quantize: str | None
    imatrix: Mapping[str, np.ndarray] | None
    max_shard_bytes: int
    replace: bool
    tokenizer: TokenizerSource | None
    allow_nonfinite: bool
    progress: Callable[[int, int], None] | None
    metadata: Mapping[str, Any]
    notes: list[str] = dataclasses.field(default_factory=list)
    done: int = 0
    total: int = 0

    def stored_dtype(self, name: str) -> np.dtype:
        """The dtype in which an array is written as floats: the one asked for, or that of its tensors."""
        found = {_FLOATS.get(reader.dtype, _FLOATS["F32"]) for _, reader in self.arrays[name]}
        return self.dtype if self.dtype is not None else found.pop() if len(found) == 1 else _FLOATS["F32"]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole array on disk."""
        return self.arrays[name][0][0].slots[self.column].shape

    def read(self, name: str, dtype: Any, rows: int | None = None) -> np.ndarray:
        """One array of the file, checked for NaN, infinity and values that the dtype cannot hold.

        Args:
          name: on disk.
          dtype: float32, float16 or bfloat16.
          rows: of a vocabulary table, where the file shall have another number of them.
        """
        parts = []
        for tensor, reader in self.arrays[name]:
            value = reader(dtype)
            if tuple(value.shape) != tensor.shape:
                raise ShapeError(f"{tensor.name}: expected shape {tensor.shape}, got {tuple(value.shape)}")
            self._check(tensor, reader, value)
            parts.append((tensor, value))
        array = weights.assemble(parts, self.column, rows)
        return array if array.dtype == dtype else array.astype(dtype)

    def runs(self, name: str, dtype: Any, rows: int | None = None) -> Iterator[np.ndarray]:
        """The same in runs of rows, one after the other, where tensor and reader allow it; else in one piece.

        A large table of a quantized file is thus never whole in memory as floats.
        """
        (tensor, reader), *others = self.arrays[name]
        slot, parts = tensor.slots[self.column], getattr(reader, "parts", None)
        plain = not slot.index and slot.rows is None and not slot.offset and slot.axes == tensor.axes
        count = slot.shape[0] if rows is None or tensor.axes[0] != "V" else rows
        if others or parts is None or not plain or count > tensor.shape[0] or slot.shape != tensor.shape:
            yield self.read(name, dtype, rows)
            return
        for start, run in parts(dtype):
            run = run[: max(0, count - start)]
            if len(run):
                self._check(tensor, reader, run)
                yield run if run.dtype == dtype else run.astype(dtype)

    def _check(self, tensor: Tensor, reader: Reader, value: np.ndarray) -> None:
        count = count_nonfinite(value)
        if not count:
            return
        original = count_nonfinite(reader(np.float32)) if value.dtype != np.float32 else count
        if original < count:
            raise CheckpointError(
                f"{tensor.name}: {count - original} values are too large for {value.dtype}; save it as bfloat16"
            )
        if not self.allow_nonfinite:
            raise CheckpointError(
                f"{tensor.name}: holds {count} NaN or infinite values of {value.size}; repair the weights, or pass "
                f"allow_nonfinite=True to store them as they are"
            )

    def start(self, total: int) -> None:
        """Says how many bytes will be written, and refuses a disk that has no room for them."""
        above = next(folder for folder in self.path.parents if folder.is_dir())
        free = shutil.disk_usage(above).free
        if free < total:
            raise SaveError(
                f"{self.path}: no space left on the disk: {total} bytes are needed, {free} are free; "
                f"free some, or save to another place. What was there before is unchanged",
                errno.ENOSPC,
            )
        self.total = total
        self.advance(None, 0)

    def advance(self, name: str | None, nbytes: int) -> None:
        """Reports that an array is written, and lets its source go."""
        self.done += nbytes
        for _, reader in self.arrays.get(name, ()) if name else ():
            release = getattr(reader, "release", None)
            if release is not None:
                release()
        if self.progress is not None:
            self.progress(self.done, self.total)


def save(
    path: str | os.PathLike[str],
    tensors: Iterable[tuple[Tensor, Reader]],
    config: Any,
    *,
    format: str,
    tokenizer: TokenizerSource | None = None,
    dtype: Any = None,
    quantize: str | None = None,
    imatrix: Mapping[str, np.ndarray] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
    replace: bool = False,
    allow_nonfinite: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> SaveReport:
    """Writes a model; the destination holds the old or the new, whatever happens meanwhile.

    Args:
      path: a folder for safetensors, a file for the others; folders above it are created.
      tensors: every tensor of `config` with its reader: `load_tensors(checkpoint)`, `from_arrays(...)`.
      config, format: of the model; one of `FORMATS`.
      tokenizer: what goes beside or into the file; None: no tokenizer.
      dtype: float32, float16 or bfloat16 for all floats; None keeps them as stored, and what is packed becomes float32
        (in a GGUF it stays packed).
      quantize: a GGUF's mix ("q4_k_m"; what has its type keeps its bytes), int4 or int8 (safetensors), int8 (ckpt), sfp8 (sbs).
      imatrix: tensor name (canonical or of the GGUF) to float32 [inputs], the mean square of each input.
      max_shard_bytes: of data in one safetensors file.
      progress: called with (bytes written, bytes in all) as the work goes on.
      replace: put it in the place of what exists. False: an existing destination is an error.
      allow_nonfinite: store NaN and infinity instead of refusing them.
      metadata: further keys of a GGUF (for example "general.license", "general.name"), or strings of the safetensors
        files; keys that describe the model itself are not to be replaced.

    Raises:
      ConfigError: an unknown format, mix or dtype, or a model that the format cannot hold.
      WeightsMismatch: missing, repeated or foreign tensors, all listed.
      CheckpointError: NaN or infinite values, or values out of the range of the type; the tensor is named.
      ShapeError: a tensor of the wrong shape, or an importance matrix that does not fit.
      TokenizerError: a tokenizer of another model.
      SaveError: the destination exists or cannot be written, the disk is full. Nothing was changed.
    """
    kind = _kind(format, dtype, quantize, imatrix)
    path = check_destination(path, replace=replace, folder=kind.folder)
    job = Job(
        path,
        config,
        _arrays(path, tensors, config, kind.column),
        kind.column,
        None if dtype is None else _dtype(dtype),
        quantize,
        imatrix,
        max_shard_bytes,
        replace,
        tokenizer,
        allow_nonfinite,
        progress,
        dict(metadata or {}),
    )
    return getattr(importlib.import_module(kind.module), kind.function)(job)


def _kind(format: str, dtype: Any, quantize: str | None, imatrix: Any) -> Format:
    """The format of that name; arguments that it has no use for are refused."""
    kind = FORMATS.get(format)
    if kind is None:
        raise ConfigError(f"format: expected one of {', '.join(FORMATS)}, got {str(format)[:80]!r}")
    if not kind.quantizes and (quantize is not None or imatrix is not None):
        able = ", ".join(name for name, other in FORMATS.items() if other.quantizes)
        raise ConfigError(f"quantize, imatrix: {format} holds floats; formats with quantized types: {able}")
    if quantize is not None and dtype is not None:
        raise ConfigError(f"expected quantize or dtype, got both ({quantize!r} and {dtype!r})")
    return kind


def _dtype(dtype: Any) -> np.dtype:
    try:
        found = _DTYPES.get(dtype if isinstance(dtype, str) else np.dtype(dtype).name)
    except TypeError:
        found = None
    if found is None:
        raise ConfigError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r:.80}")
    return found


def _arrays(path: Path, tensors: Iterable[tuple[Tensor, Reader]], config: Any, column: str):
    """Name on disk to its tensors and readers; every tensor of the configuration is there exactly once."""
    pairs = list(tensors)
    readers = {tensor.name: reader for tensor, reader in pairs}
    table = weights.tensors(config)
    names = [tensor.name for tensor, _ in pairs]
    known = {tensor.name: tensor for tensor in table}
    wrong = [
        f"{tensor.name}: expected {known[tensor.name].shape}, got {tensor.shape}"
        for tensor, _ in pairs
        if tensor.name in known and known[tensor.name].shape != tensor.shape
    ]
    missing = [tensor.name for tensor in table if tensor.name not in readers]
    missing += [f"{tensor.name} (has no name in the format {column})" for tensor in table if column not in tensor.slots]
    foreign = [name for name in names if name not in known] + sorted({n for n in names if names.count(n) > 1})
    if missing and not any(column in tensor.slots for tensor in table):
        kind = type(config).__name__.removesuffix("Config")
        able = [name for name, other in FORMATS.items() if any(other.column in tensor.slots for tensor in table)]
        raise ConfigError(
            f"format: {column} has no place for a {kind} model; formats that hold one: {', '.join(able)}, and Orbax "
            f"for what has a JAX network"
        )
    if missing or foreign or wrong:
        hint = "save the decoder alone with gemma.config.text_only(config)" if getattr(config, "vision", None) else ""
        raise WeightsMismatch(path, missing=missing, unexpected=foreign, misshaped=wrong, hint=hint)
    groups = weights.groups(table, column)
    return {name: tuple((t, readers[t.name]) for t in members) for name, members in groups.items()}


def files_report(job: Job, format: str, files: Sequence[Path], tensors: Sequence[SavedTensor]) -> SaveReport:
    """The report of files that now stand under their final names."""
    total = sum(file.stat().st_size for file in files)
    return SaveReport(format, job.path, tuple(files), total, tuple(tensors), tuple(job.notes))
