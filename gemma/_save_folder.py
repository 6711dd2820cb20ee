# SPDX-License-Identifier: Apache-2.0
"""Folders of the formats that know no configuration: `model.ckpt`, `model.npz` or `model.sbs` with its `config.json`.

The tokenizer's files lie beside them, so that the folder is a whole model. Bytes are in `formats/{ckpt,npz,sbs}.py`;
`gemma.saving` has checked the arguments.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gemma import hf_config
from gemma._atomic import atomic_folder
from gemma._tokenizer_write import write_hf_files
from gemma.config import PaliGemmaConfig
from gemma.errors import ConfigError
from gemma.formats import ckpt, npz, sbs
from gemma.formats._sbs_fields import TocEntry, config_words
from gemma.quants import PackedTensor, QuantType, quantization_error, quantize
from gemma.saving import Job, SavedTensor, SaveReport, files_report

# What gemma.cpp expects where a file carries no vocabulary.
_NO_TOKENIZER = b"unavailable"
_TITLES = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}


def _title(dtype: np.dtype) -> str:
    return _TITLES.get(dtype, "BF16")


@dataclasses.dataclass
class _Writing:
    """One run: what is written, and what the report will say."""

    job: Job
    saved: dict[str, SavedTensor] = dataclasses.field(default_factory=dict)

    def floats(self, name: str, dtype: np.dtype) -> np.ndarray:
        """An array of the file as floats."""
        array = np.ascontiguousarray(self.job.read(name, dtype))
        self.saved[name] = SavedTensor(name, _title(dtype), array.shape, array.nbytes)
        self.job.advance(name, array.nbytes)
        return array

    def packed(self, name: str, type: QuantType) -> PackedTensor:
        """An array of the file in codes."""
        values = self.job.read(name, np.dtype(np.float32))
        packed = quantize(values, type)
        worst, rmse = quantization_error(values, packed)
        self.saved[name] = SavedTensor(name, type.name, values.shape, packed.nbytes, worst, rmse)
        self.job.advance(name, packed.nbytes)
        return packed

    def folder(self, format: str, total: int, fill: Callable[[BinaryIO, Path], None]) -> SaveReport:
        """Writes the files beside `model.<format>`, then that file: `fill` gets it and the folder so far."""
        job = self.job
        values = hf_config.write_config(job.config)
        job.start(total)
        with atomic_folder(job.path, replace=job.replace) as folder:
            (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
            if job.tokenizer is not None:
                write_hf_files(job.tokenizer, folder, _rows(job.config))
            with open(folder / f"model.{format}", "wb") as file:
                fill(file, folder)
            names = sorted(item.name for item in folder.iterdir())
        files = [job.path / name for name in names if (job.path / name).is_file()]
        return files_report(job, format, files, [self.saved[name] for name in job.arrays])


def _rows(config) -> int:
    return config.text_config.vocab_size if isinstance(config, PaliGemmaConfig) else config.vocab_size


def _size(job: Job, name: str, type: str | None = None) -> int:
    width = sbs.WIDTH.get(type, 1) if type else job.stored_dtype(name).itemsize
    return int(np.prod(job.shape(name), dtype=np.int64)) * width


def write_ckpt(job: Job) -> SaveReport:
    """A PyTorch archive as gemma_pytorch reads it; `quantize="int8"` stores matrices as codes with scalers."""
    coded = _int8_names(job)
    writing, tensors, scales = _Writing(job), {}, {}
    for name in job.arrays:
        tensors[name] = (np.dtype(np.int8) if name in coded else job.stored_dtype(name), job.shape(name))
        if name in coded:
            tensors[name + ckpt.SCALER] = (np.dtype(np.float32), job.shape(name)[:1])

    def read(name: str) -> np.ndarray:
        if name in scales:
            return scales.pop(name)
        if name not in coded:
            return writing.floats(name, job.stored_dtype(name))
        packed = writing.packed(name, QuantType.INT8)
        scales[name + ckpt.SCALER] = packed.scale
        return packed.data.view(np.int8)

    total = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for dtype, shape in tensors.values())
    return writing.folder("ckpt", total, lambda file, _: ckpt.write_ckpt(file, tensors, read))


def _int8_names(job: Job) -> set[str]:
    """The matrices that gemma_pytorch quantizes: the embedding and every projection of the decoder."""
    if job.quantize is None:
        return set()
    if job.quantize != "int8" or job.imatrix is not None:
        raise ConfigError(
            f"quantize: a .ckpt holds floats or int8 (without an importance matrix), got {job.quantize!r}"
        )
    parts = {name: pairs[0][0] for name, pairs in job.arrays.items()}
    return {name for name, tensor in parts.items() if tensor.part not in ("vision", "mm") and len(tensor.shape) == 2}


def write_npz(job: Job) -> SaveReport:
    """The arrays that big_vision reads: names with slashes, layers stacked, nothing compressed."""
    writing = _Writing(job)
    total = sum(_size(job, name) for name in job.arrays)
    arrays = ((name, writing.floats(name, job.stored_dtype(name))) for name in job.arrays)
    return writing.folder("npz", total, lambda file, _: npz.write_npz(file, arrays))


def write_sbs(job: Job) -> SaveReport:
    """A gemma.cpp file; `quantize="sfp8"` stores matrices in SFP8. Proven only by reading it back ourselves."""
    if job.quantize not in (None, "sfp8") or job.imatrix is not None:
        raise ConfigError(
            f"quantize: an .sbs holds floats or sfp8 (without an importance matrix), got {job.quantize!r}"
        )
    if job.dtype == np.float16:
        raise ConfigError("dtype: an .sbs holds float32 or bfloat16, got float16")
    entries = [TocEntry(name, _sbs_type(job, name), *_rows_cols(job.shape(name))) for name in job.arrays]
    types = {entry.name: entry.type for entry in entries}
    smallest = min(types.values(), key=lambda type: sbs.WIDTH[type])
    config = config_words(job.config, smallest)
    writing = _Writing(job)
    dtypes = {title: dtype for dtype, title in _TITLES.items()}

    def read(name: str):
        if types[name] == "SFP8":
            packed = writing.packed(name, QuantType.SFP8)
            return packed.data, float(packed.scale[0])
        return writing.floats(name, dtypes.get(types[name], job.stored_dtype(name)))

    def fill(file: BinaryIO, folder: Path) -> None:
        model = folder / "tokenizer.model"
        vocabulary = model.read_bytes() if model.is_file() else _NO_TOKENIZER
        sbs.write_sbs(file, entries, read, {"config": config, "tokenizer": vocabulary})

    job.notes.append("not proven by gemma.cpp: no build of it was at hand; the file is checked by reading it back")
    total = sum(_size(job, name, types[name]) for name in job.arrays)
    return writing.folder("sbs", total, fill)


def _sbs_type(job: Job, name: str) -> str:
    if job.quantize is not None and len(job.shape(name)) > 1:
        return "SFP8"
    return "BF16" if _title(job.stored_dtype(name)) == "BF16" else "F32"


def _rows_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    return int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
