# SPDX-License-Identifier: Apache-2.0
"""One interface over every checkpoint: names, shapes, dtypes, lazily read tensors, metadata, tokenizer.

Opening reads and checks headers only. Bytes and their rules are in `formats/`, tensor names and axes in `weights/`,
block types in `quants.py`; this module joins them and knows no framework.

Mapped files: `raw`, `packed` and native reads are views of a read-only map, which is fastest and shares memory between
processes. Replacing the file by renaming is safe. Truncating it in place under a live view kills the process (SIGBUS),
as it does for every program that maps files; where that can happen, open with `mmap=False`, which copies.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import difflib
import os
import types as _types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from gemma import _quants_decode
from gemma._load_tensors import NonFiniteWarning, TensorReader, load_tensors
from gemma.errors import CheckpointError, CheckpointNotFound, FormatError, UnsupportedError
from gemma.formats import gguf_config
from gemma.formats import safetensors as st
from gemma.formats._source import Source
from gemma.formats.gguf import Gguf
from gemma.quants import PackedTensor, QuantType, float_dtype

__all__ = [
    "Checkpoint",
    "GgufCheckpoint",
    "HfCheckpoint",
    "NonFiniteWarning",
    "TensorInfo",
    "TensorReader",
    "TokenizerSource",
    "load_tensors",
    "open_checkpoint",
]

KINDS = "GGUF, safetensors, PyTorch, .npz or .sbs"
_FLOATS = {np.dtype(t) for t in (np.float32, np.float16, ml_dtypes.bfloat16)}
_FLOAT_NAMES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_SMALL_ARRAY = 4096  # items of a metadata array that `metadata` holds as a list


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is: `shape` row-major, `dtype` as "F32", "BF16", "I8", "Q4_K", ..., `offset` in `file`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    offset: int


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizerSource:
    """What a checkpoint knows about its tokenizer; `gemma.tokenizer` builds one from it.

    Attributes:
      kind: "sentencepiece" and "tokenizer.json" name a file in `path`; "gguf" carries the vocabulary itself.
      path: of the tokenizer file, or of the checkpoint that carries the vocabulary.
      model: the bytes of a SentencePiece model that is part of the checkpoint (sentencepiece).
      pieces: [V] strings by id (gguf). Pieces of type 4 hold real spaces.
      scores: float32 [V] (gguf).
      types: int32 [V], 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte (gguf).
      special: ids named by the metadata: some of pad, eos, bos, unk, mask, eot, sep.
      flags: some of add_bos_token, add_eos_token, add_space_prefix.
      template: a chat template (Jinja) to write instead of the one that the checkpoint carries.
    """

    kind: Literal["sentencepiece", "tokenizer.json", "gguf"]
    path: Path | None = None
    pieces: list[str] | None = None
    scores: np.ndarray | None = None
    types: np.ndarray | None = None
    special: Mapping[str, int] = dataclasses.field(default_factory=dict)
    flags: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    model: bytes | None = None
    template: str | None = None


class Checkpoint(abc.ABC):
    """An open checkpoint; use it as a context manager, or call `close`.

    Attributes:
      path: as opened, file or folder.
      format: the column of `gemma.weights` its names belong to: "hf", "gguf", "ckpt", "npz" or "sbs".
      tensors: name to TensorInfo, in file order.
      metadata: of the file: strings, numbers and short lists.
    """

    path: Path
    format: Literal["hf", "gguf", "ckpt", "npz", "sbs"]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, Any]

    def __init__(
        self, path: Path, sources: Mapping[Path, Source], tensors: Mapping[str, TensorInfo], metadata: Mapping
    ):
        self.path, self._sources = path, dict(sources)
        self.tensors, self.metadata = _types.MappingProxyType(dict(tensors)), _types.MappingProxyType(dict(metadata))

    @abc.abstractmethod
    def config(self):
        """The model's configuration, a GemmaConfig, PaliGemmaConfig or T5GemmaConfig."""

    @abc.abstractmethod
    def tokenizer_source(self) -> TokenizerSource | None:
        """The tokenizer that comes with the checkpoint, or None."""

    def info(self, name: str) -> TensorInfo:
        """The TensorInfo of a name; an unknown name is a CheckpointError that offers near ones."""
        found = self.tensors.get(name)
        if found is None:
            near = difflib.get_close_matches(name, self.tensors, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {len(self.tensors)} tensors"
            raise CheckpointError(f"{self.path}: no tensor {name!r}; {hint}")
        return found

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor as they are in the file, uint8 [nbytes], read-only: a view of the map, or a copy."""
        info = self.info(name)
        return self._sources[info.file].view(info.offset, info.nbytes)

    def packed(self, name: str) -> PackedTensor:
        """A tensor in its stored type, bytes as in the file; float32, float16 and bfloat16 included."""
        info = self.info(name)
        if info.dtype not in QuantType.__members__ or not info.shape:
            raise UnsupportedError(f"{info.file}: {name} is {info.dtype} {info.shape}, which has no packed form")
        type, columns = QuantType[info.dtype], info.shape[-1]
        return PackedTensor(type, info.shape, self.raw(name).reshape(-1, type.row_bytes(columns)))

    def read(self, name: str, dtype=None, out: np.ndarray | None = None) -> np.ndarray:
        """A tensor as an array of its shape.

        Args:
          name: as in the file.
          dtype: float32, bfloat16 or float16; None keeps a plain type as it is and makes a quantized one float32.
          out: a C-contiguous array to fill; its dtype wins.

        Returns:
          A read-only view of the map where nothing is to be converted, else a fresh array (or `out`). Conversion
          reads the file in small pieces, so its memory is the result and a few megabytes.
        """
        info = self.info(name)
        native = _native_dtype(info.dtype)
        target = out.dtype if out is not None else np.dtype(dtype) if dtype is not None else native or np.dtype("f4")
        if target == native and out is None:
            return self._native(info, native)
        if target not in _FLOATS or not (native is None or info.dtype in _FLOAT_NAMES):
            raise UnsupportedError(
                f"{info.file}: {name} is {info.dtype} and cannot be read as {target}; "
                f"float tensors are read as float32, bfloat16 or float16, others as they are"
            )
        out = np.empty(info.shape, target) if out is None else out
        if out.shape != info.shape or not out.flags.c_contiguous:
            raise CheckpointError(f"{name}: expected a C-contiguous `out` of shape {info.shape}, got {out.shape}")
        self._convert(info, out)
        return out

    def read_rows(self, name: str, start: int, stop: int, dtype=np.float32) -> np.ndarray:
        """Rows start..stop-1 along the first axis, as a fresh array of float32, bfloat16 or float16.

        Raises:
          CheckpointError: rows that the tensor does not have.
        """
        info = self.info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(f"{info.file}: {name} {info.shape}: no rows {start}..{stop}")
        size = info.nbytes // max(1, info.shape[0])  # blocks never cross rows
        part = dataclasses.replace(
            info, shape=(stop - start, *info.shape[1:]), offset=info.offset + start * size, nbytes=(stop - start) * size
        )
        out = np.empty(part.shape, dtype)
        self._convert(part, out)
        return out

    def release(self, name: str) -> None:
        """Lets the mapped pages of a tensor leave memory once its values have been copied elsewhere."""
        info = self.info(name)
        self._sources[info.file].release(info.offset, info.nbytes)

    def close(self) -> None:
        """Closes the files. Views handed out before stay readable."""
        for source in self._sources.values():
            source.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _native(self, info: TensorInfo, dtype: np.dtype) -> np.ndarray:
        data = self.raw(info.name)
        if info.dtype == "BOOL" and data.max(initial=0) > 1:
            raise FormatError(info.file, info.offset, f"{info.name}: a BOOL byte is 0 or 1, got {data.max()}")
        return data.view(dtype).reshape(info.shape)

    def _convert(self, info: TensorInfo, out: np.ndarray) -> None:
        source, flat = self._sources[info.file], out.reshape(-1)
        if info.dtype in QuantType.__members__:
            type = QuantType[info.dtype]
            width = type.block_bytes

            def fetch(start: int, count: int) -> np.ndarray:
                return source.read(info.offset + start * width, count * width).reshape(count, width)

            _quants_decode.decode(type.name, type.block_size, fetch, flat.size // type.block_size, flat)
            return
        native, step = _native_dtype(info.dtype), _quants_decode.CHUNK
        for start in range(0, flat.size, step):
            part = flat[start : start + step]
            data = source.read(info.offset + start * native.itemsize, part.size * native.itemsize)
            with np.errstate(over="ignore"):  # what leaves the range is counted by the loader
                part[...] = data.view(native)


def _native_dtype(name: str) -> np.dtype | None:
    """The numpy dtype of a plain type, None for a quantized one."""
    if name in QuantType.__members__:
        return float_dtype(QuantType[name]) if QuantType[name].is_float else None
    return np.dtype(np.complex64) if name == "C64" else st.DTYPES[name]


class GgufCheckpoint(Checkpoint):
    """One GGUF file. `gguf` is its parsed header, for arrays too long for `metadata`."""

    format = "gguf"

    def __init__(self, source: Source):
        self.gguf = Gguf(source)
        tensors = {
            t.name: TensorInfo(t.name, t.shape, t.type.name, t.nbytes, source.path, t.offset)
            for t in self.gguf.tensors.values()
        }
        metadata = {}
        for key, value in self.gguf.values.items():
            if value.type != "ARRAY":
                metadata[key] = value.data
            elif value.count <= _SMALL_ARRAY:
                metadata[key] = list(self.gguf.array(key))
        super().__init__(source.path, {source.path: source}, tensors, metadata)

    def config(self):
        return gguf_config.read_gguf_config(self.gguf)

    def tokenizer_source(self) -> TokenizerSource | None:
        fields = gguf_config.read_vocabulary(self.gguf)
        return None if fields is None else TokenizerSource("gguf", self.path, **fields)


class HfCheckpoint(Checkpoint):
    """safetensors: one file, or the shards of an index, with the files of a Hugging Face folder beside them."""

    format = "hf"

    def __init__(self, path: Path, shards: list[st.Safetensors]):
        self.folder = path if path.is_dir() else path.parent
        tensors, metadata = {}, {}
        for shard in shards:
            file = shard.source.path
            for t in shard.tensors.values():
                tensors[t.name] = TensorInfo(t.name, t.shape, t.dtype, t.nbytes, file, t.offset)
            metadata |= shard.metadata
        super().__init__(path, {shard.source.path: shard.source for shard in shards}, tensors, metadata)

    def config(self):
        file = self.folder / "config.json"
        if not file.is_file():
            raise CheckpointNotFound(f"{file}: no such file; a safetensors checkpoint needs its config.json beside it")
        from gemma.hf_config import read_config

        return read_config(file)

    def tokenizer_source(self) -> TokenizerSource | None:
        for name, kind in (("tokenizer.model", "sentencepiece"), ("tokenizer.json", "tokenizer.json")):
            if (self.folder / name).is_file():
                return TokenizerSource(kind, self.folder / name)
        return None


# First bytes of files that are checkpoints, but not of a kind that is read here.
_OTHER_KINDS = {
    b"\x80\x02": "a bare pickle, PyTorch's format before 2020: load it where you trust it and save it with torch.save",
    b"\x80\x04": "a bare pickle",
    b"lmgg": "a GGML file from before GGUF",
    b"fmgg": "a GGMF file from before GGUF",
    b"tjgg": "a GGJT file from before GGUF",
}
_TORCH_INDEX = "pytorch_model.bin.index.json"
_SUFFIXES = ("*.safetensors", "*.gguf", "*.ckpt", "*.sbs", "*.npz", "pytorch_model.bin")


def open_checkpoint(path: str | os.PathLike[str], *, mmap: bool = True) -> Checkpoint:
    """Opens a checkpoint by what it contains, whatever it is called.

    Args:
      path: a GGUF, safetensors, PyTorch, .npz or .sbs file, a `*.index.json`, or a folder that holds one of these.
      mmap: map files instead of copying from them (see the module's note on truncation).

    Raises:
      CheckpointNotFound: nothing there to read.
      FormatError: the bytes break their format; the message has file, byte and rule.
      UnsupportedError: a valid file of a kind, version or type that is not read.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        inner = _file_of_folder(path)
        if inner.name == _TORCH_INDEX:
            return _torch_shards(path, inner, mmap)
        if inner.suffix == ".json":
            return _opened(path, st.open_shards(inner, mmap=mmap))
        source = Source(inner, mmap=mmap)
    else:
        source = Source(path, mmap=mmap)
    try:
        head = source.read(0, min(9, source.size)).tobytes()
        for magic, kind in _OTHER_KINDS.items():
            if head.startswith(magic) and head[8:] != b"{":
                raise UnsupportedError(f"{source.path}: {kind}; expected {KINDS}")
        if head[:4] == b"GGUF":
            return GgufCheckpoint(source)
        if head[:4] in (b"PK\x03\x04", b"SBS\n") and head[8:] != b"{":
            return _without_config(source, head[:4])
        if head[:1] == b"{" and source.path.suffix == ".json":
            source.close()
            if path.name == _TORCH_INDEX:
                return _torch_shards(path, path, mmap)
            return _opened(path, st.open_shards(path, mmap=mmap))
        if head[8:] != b"{" and source.path.suffix != ".safetensors":
            raise FormatError(source.path, 0, f"expected a {KINDS} file, got the bytes {head!r}")
        return _opened(path, [st.Safetensors(source)])
    except BaseException:
        source.close()
        raise


def _without_config(source: Source, magic: bytes) -> Checkpoint:
    from gemma import _checkpoint_kinds as kinds
    from gemma.formats._zip import read_members

    if magic == b"SBS\n":
        return kinds.SbsCheckpoint(source)
    arrays = all(name.endswith((".npy", "/")) for name in read_members(source))
    return kinds.NpzCheckpoint(source) if arrays else kinds.TorchCheckpoint(source.path, [source])


def _torch_shards(path: Path, index: Path, mmap: bool) -> Checkpoint:
    """The files that the index of a sharded PyTorch checkpoint names; every tensor is where it says, and only there."""
    from gemma._checkpoint_kinds import TorchCheckpoint

    with contextlib.ExitStack() as opened:
        sources, names = [], st.read_index(index)
        for file in dict.fromkeys(names.values()):
            sources.append(Source(index.parent / file, mmap=mmap))
            opened.callback(sources[-1].close)
        checkpoint = TorchCheckpoint(path, sources, names)
        opened.pop_all()
    return checkpoint


def _opened(path: Path, shards: list[st.Safetensors]) -> HfCheckpoint:
    if path.is_dir() and (path / "modules.json").is_file():
        from gemma._checkpoint_kinds import EmbeddingCheckpoint

        return EmbeddingCheckpoint(path, shards)
    if any(name.endswith(".weight_scale") for shard in shards for name in shard.tensors):
        from gemma._hf_packed import PackedHfCheckpoint

        return PackedHfCheckpoint(path, shards)
    return HfCheckpoint(path, shards)


def _file_of_folder(folder: Path) -> Path:
    """The one checkpoint of a folder: its index, model.safetensors, or the only file of a kind, in a fixed order."""
    for name in (st.INDEX_NAME, "model.safetensors", _TORCH_INDEX):
        if (folder / name).is_file():
            return folder / name
    for pattern in _SUFFIXES:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:5])
            raise CheckpointError(f"{folder}: several checkpoints and no {st.INDEX_NAME}: {names}; name one of them")
        if found:
            return found[0]
    raise CheckpointNotFound(f"{folder}: no {st.INDEX_NAME} and none of {', '.join(_SUFFIXES)} in this folder")
