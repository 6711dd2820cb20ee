# SPDX-License-Identifier: Apache-2.0
"""Checkpoints whose files carry no configuration: PyTorch archives (`.ckpt`), big_vision's `.npz`, gemma.cpp's `.sbs`.

And the folders of sentence-transformers, whose further modules lie in folders of their own.

One rule for the first three: a `config.json` in the folder of the file says what the model is; without one the published
models are recognized by names and shapes (an `.sbs` may say it itself). A tokenizer file in the folder is the model's.
Formats with a configuration, and the interface, are in `checkpoint.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma import weights
from gemma.checkpoint import Checkpoint, HfCheckpoint, TensorInfo, TokenizerSource
from gemma.config import GemmaConfig
from gemma.embedding import read_modules
from gemma.errors import FormatError, GemmaError
from gemma.formats import ckpt, npz, sbs
from gemma.formats import safetensors as st
from gemma.formats._sbs_fields import read_model_config
from gemma.formats._source import Source
from gemma.formats._zip import Verified, read_members
from gemma.quants import PackedTensor, QuantType

_MAX_TOKENIZER = 1 << 25
_HF_NAME = re.compile(r"(.*\.)?layers\.\d+\.self_attn\.q_proj\.weight")


class _FileCheckpoint(Checkpoint):
    """Weights with the configuration and the tokenizer that may lie beside them."""

    @property
    def folder(self) -> Path:
        """Where the other files of the model may be."""
        return self.path if self.path.is_dir() else self.path.parent

    def config(self):
        file = self.folder / "config.json"
        if file.is_file():
            from gemma.hf_config import read_config

            return read_config(file)
        return self._own_config()

    def _own_config(self):
        return weights.identify(self._shapes(), format=self.format, path=self.path)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    def tokenizer_source(self) -> TokenizerSource | None:
        for name, kind in (("tokenizer.model", "sentencepiece"), ("tokenizer.json", "tokenizer.json")):
            if (self.folder / name).is_file():
                return TokenizerSource(kind, self.folder / name)
        return None


class EmbeddingCheckpoint(HfCheckpoint):
    """An EmbeddingGemma with the dense layers that follow its encoder; `modules` says what the folder states of them."""

    def __init__(self, path: Path, shards: list[st.Safetensors]):
        super().__init__(path, shards)
        self.modules = read_modules(path)
        tensors, sources = dict(self.tensors), dict(self._sources)
        for number, dense in enumerate(self.modules.dense):
            prefix, source = weights.DENSE_FOLDER.format(number + 2), Source(dense.file)
            sources[source.path] = source
            for t in st.Safetensors(source).tensors.values():
                name = prefix + t.name
                tensors[name] = TensorInfo(name, t.shape, t.dtype, t.nbytes, source.path, t.offset)
        Checkpoint.__init__(self, path, sources, tensors, self.metadata)

    def config(self):
        config = super().config()
        widths = tuple(dense.width_out for dense in self.modules.dense)
        if not widths or not isinstance(config, GemmaConfig):
            return config
        return dataclasses.replace(config, embedding_dense=widths)


class TorchCheckpoint(_FileCheckpoint):
    """A PyTorch archive. Names of gemma_pytorch or of Hugging Face; int8 weights with their scalers read as floats."""

    def __init__(self, path: Path, sources: Sequence[Source], index: Mapping[str, str] | None = None):
        """Opens the files; `index` says which of them has which tensor, and must be true."""
        self._scalers: dict[str, tuple[Path, ckpt.StoredTensor]] = {}
        tensors: dict[str, TensorInfo] = {}
        found: dict[str, str] = {}
        for source in sources:
            found |= dict.fromkeys(self._add_file(source, tensors), source.path.name)
        if index is not None and found != index:
            wrong = sorted(name for name in {*found, *index} if found.get(name) != index.get(name))
            shown = "; ".join(f"{n}: {index.get(n, 'nowhere')}, {found.get(n, 'nowhere')}" for n in wrong[:5])
            raise FormatError(path, None, f"{len(wrong)} tensors are not where the index says (stated, found): {shown}")
        self.format = "hf" if any(_HF_NAME.fullmatch(name) for name in tensors) else "ckpt"
        checked = {source.path: Verified(source, read_members(source).values()) for source in sources}
        super().__init__(path, checked, tensors, {})

    def _add_file(self, source: Source, tensors: dict[str, TensorInfo]) -> list[str]:
        """Adds the tensors of a file; returns all names in it, those of scalers included."""
        stored, path = ckpt.read_ckpt(source), source.path
        for t in stored.values():
            if t.name in tensors:
                raise FormatError(path, t.offset, f"{t.name} is in two files of the checkpoint")
            if t.name.endswith(ckpt.SCALER) and t.name.removesuffix(ckpt.SCALER) in stored:
                continue
            scaler = stored.get(t.name + ckpt.SCALER)
            if scaler is not None:
                self._check_scaler(path, t, scaler)
                self._scalers[t.name] = (path, scaler)
            dtype = "INT8" if scaler is not None else t.dtype
            tensors[t.name] = TensorInfo(t.name, t.shape, dtype, t.nbytes, path, t.offset)
        return list(stored)

    @staticmethod
    def _check_scaler(path: Path, weight: ckpt.StoredTensor, scaler: ckpt.StoredTensor) -> None:
        fits = scaler.shape in (weight.shape[:1], (*weight.shape[:1], 1)) and len(weight.shape) == 2
        if weight.dtype != "I8" or scaler.dtype not in ("F32", "BF16", "F16") or not fits:
            raise FormatError(
                path,
                scaler.offset,
                f"{scaler.name}: expected one float for each row of an int8 matrix, got {scaler.dtype} {scaler.shape} "
                f"for {weight.dtype} {weight.shape}",
            )

    def _scale(self, name: str) -> np.ndarray:
        path, scaler = self._scalers[name]
        dtype = {"F32": "<f4", "F16": "<f2"}.get(scaler.dtype)
        raw = self._sources[path].read(scaler.offset, scaler.nbytes)
        if dtype is not None:
            return raw.view(dtype).astype(np.float32)
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)

    def packed(self, name: str) -> PackedTensor:
        if name not in self._scalers:
            return super().packed(name)
        shape = self.info(name).shape
        return PackedTensor(QuantType.INT8, shape, self.raw(name).reshape(shape), self._scale(name))

    def _convert(self, info: TensorInfo, out: np.ndarray) -> None:
        if info.name not in self._scalers:
            super()._convert(info, out)
            return
        columns = info.shape[-1]
        codes = self._sources[info.file].read(info.offset, info.nbytes).reshape(-1, columns)
        first = (info.offset - self.info(info.name).offset) // columns  # `info` may be some rows of the tensor
        scale = self._scale(info.name)[first : first + len(codes)]
        PackedTensor(QuantType.INT8, info.shape, codes, scale).dequantize(out=out)


class NpzCheckpoint(_FileCheckpoint):
    """The arrays of a `.npz`; compressed ones are inflated one at a time."""

    format = "npz"

    def __init__(self, source: Source):
        arrays = npz.read_npz(source)
        tensors = {
            a.name: TensorInfo(a.name, a.shape, a.dtype, a.nbytes, Path(a.source.path), a.offset)
            for a in arrays.values()
        }
        sources: dict[Path, Any] = {Path(a.source.path): a.source for a in arrays.values()}
        sources.setdefault(source.path, source)  # to be closed, even where all arrays are compressed
        super().__init__(source.path, sources, tensors, {})


class SbsCheckpoint(_FileCheckpoint):
    """A gemma.cpp file. Its tables know rows and columns only; the axes come from the configuration."""

    format = "sbs"

    def __init__(self, source: Source):
        self._sbs, path = sbs.Sbs(source), source.path
        flat = {t.name: (t.count,) for t in self._sbs.tensors.values()}
        self.path, self._flat, self._problem = path, flat, None
        try:
            shapes: Mapping[str, tuple[int, ...]] = weights.shaped(flat, self.config(), "sbs")
        except GemmaError as problem:  # told by whoever asks for the configuration; names and sizes are known anyway
            self._problem = problem
            shapes = {t.name: (t.count // t.cols, t.cols) if t.cols else (t.count,) for t in self._sbs.tensors.values()}
        tensors = {
            t.name: TensorInfo(t.name, shapes[t.name], t.dtype, t.nbytes, path, t.offset)
            for t in self._sbs.tensors.values()
        }
        super().__init__(path, {path: source}, tensors, {"blobs": len(self._sbs.blobs)})

    def _own_config(self):
        words = self._sbs.words("config")
        if words is not None:
            return read_model_config(self.path, words)
        return weights.identify(self._flat, format="sbs", path=self.path, sizes_only=True)

    def packed(self, name: str) -> PackedTensor:
        info = self.info(name)
        if info.dtype != "SFP8":
            return super().packed(name)
        scale = np.array([self._sbs.tensors[name].scale], np.float32)
        return PackedTensor(QuantType.SFP8, info.shape, self.raw(name).reshape(-1, info.shape[-1]), scale)

    def _convert(self, info: TensorInfo, out: np.ndarray) -> None:
        if info.dtype != "SFP8":
            super()._convert(info, out)
            return
        scale = np.array([self._sbs.tensors[info.name].scale], np.float32)
        codes = self._sources[info.file].read(info.offset, info.nbytes).reshape(-1, info.shape[-1])
        PackedTensor(QuantType.SFP8, info.shape, codes, scale).dequantize(out=out)

    def tokenizer_source(self) -> TokenizerSource | None:
        blob = self._sbs.blobs.get("tokenizer")
        if blob is None or blob.nbytes < 1024:  # gemma.cpp writes a word in place of a missing vocabulary
            return super().tokenizer_source()
        if blob.nbytes > _MAX_TOKENIZER:
            raise FormatError(self.path, blob.offset, f"a tokenizer of {blob.nbytes} bytes; at most {_MAX_TOKENIZER}")
        return TokenizerSource("sentencepiece", self.path, model=self.raw_blob("tokenizer"))

    def raw_blob(self, name: str) -> bytes:
        """The bytes of a record of the file."""
        blob = self._sbs.blobs[name]
        return self._sources[self.path].read(blob.offset, blob.nbytes).tobytes()
