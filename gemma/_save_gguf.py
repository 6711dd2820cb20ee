# SPDX-License-Identifier: Apache-2.0
"""A GGUF file of a text model, quantized or not, that llama.cpp runs: types by the mix, metadata, vocabulary, tensors.

Keys are `formats/gguf_metadata.py` and `_tokenizer_write.py`, types `_quants_mixes.py`, bytes `formats/gguf_write.py`;
`gemma.saving` has checked the arguments. Norms are stored as float32 1 + w.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np

from gemma._atomic import atomic_file
from gemma._quants_mixes import MIXES, fitting, mix, plan
from gemma._tokenizer_write import gguf_fields
from gemma.errors import CheckpointError, ConfigError, ShapeError
from gemma.formats import gguf_metadata
from gemma.formats.gguf_write import TensorSpec, write_gguf
from gemma.quants import PackedTensor, QuantType, float_dtype, quantization_error, quantize
from gemma.saving import Job, SavedTensor, SaveReport, files_report
from gemma.weights import Tensor

_PIECE = 1 << 24  # bytes of a packed tensor that are handed on together
_FLOAT_MIXES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def write(job: Job) -> SaveReport:
    """Writes the file; see `gemma.saving.save`."""
    gguf_metadata.architecture_of(job.config)  # refuses what the format cannot hold
    types, file_type = _types(job)
    importance = _importance(job)
    rows = job.config.vocab_size
    fields = {"tokenizer.ggml.model": "none"}
    if job.tokenizer is not None:
        fields = gguf_fields(job.tokenizer, rows)
        rows = len(fields["tokenizer.ggml.tokens"])  # llama.cpp wants one piece for each row
        if rows < job.config.vocab_size:
            job.notes.append(f"{job.config.vocab_size - rows} rows of the embedding without a piece are left out")
    metadata = gguf_metadata.config_metadata(job.config, rows=rows, name=job.path.stem, file_type=file_type)
    metadata = _with_own(metadata, job.metadata) | fields
    job.notes += gguf_metadata.warnings(job.config)
    specs, saved = _specs(job, types, rows), {}

    def read(spec: TensorSpec) -> Iterator[np.ndarray]:
        saved[spec.name] = yield from _encoded(job, spec, rows, importance.get(spec.name))
        job.advance(spec.name, spec.nbytes)

    job.start(sum(spec.nbytes for spec in specs))
    with atomic_file(job.path, replace=job.replace) as file:
        write_gguf(file, metadata, specs, read)
    return files_report(job, "gguf", [job.path], [saved[spec.name] for spec in specs])


def _with_own(metadata: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the model with a caller's keys, which may only say what the tensors and sizes do not."""
    taken = [key for key in own if (key in metadata and key != "general.name") or key.startswith("tokenizer.ggml.")]
    if taken:
        raise ConfigError(f"metadata: {taken[0]!r} follows from the model (one of {len(taken)} such keys)")
    return metadata | dict(own)


def _types(job: Job) -> tuple[dict[str, QuantType], int | None]:
    """(name on disk to type, `general.file_type` or None where no standard mix has these types)."""
    table = {name: pairs[0][0] for name, pairs in job.arrays.items()}
    name = job.quantize if job.quantize is not None else _FLOAT_MIXES[job.dtype.name] if job.dtype is not None else None
    if name is not None:
        chosen = plan(table.values(), name, importance=job.imatrix is not None)
        return {disk: chosen[tensor.name] for disk, tensor in table.items()}, mix(name).file_type
    types = {disk: _kept(tensor, job.arrays[disk][0][1].dtype) for disk, tensor in table.items()}
    kept = {tensor.name: types[disk] for disk, tensor in table.items()}
    same = (m.file_type for m in MIXES.values() if plan(table.values(), m.name) == kept)
    return types, next(same, None)


def _kept(tensor: Tensor, dtype: str) -> QuantType:
    """The type of a tensor that shall stay as it is stored."""
    if len(tensor.shape) < 2 or dtype not in QuantType.__members__ or QuantType[dtype].ggml_id is None:
        return QuantType.F32
    return fitting(QuantType[dtype], tensor.shape[-1])


def _specs(job: Job, types: Mapping[str, QuantType], rows: int) -> list[TensorSpec]:
    specs = []
    for name, pairs in job.arrays.items():
        shape = job.shape(name)
        specs.append(TensorSpec(name, types[name], (rows, *shape[1:]) if pairs[0][0].axes[0] == "V" else shape))
    return specs


def _importance(job: Job) -> dict[str, np.ndarray]:
    """The importance matrix by name on disk; names that the model does not have are refused."""
    if job.imatrix is None:
        return {}
    names = {tensor.name: disk for disk, pairs in job.arrays.items() for tensor, _ in pairs}
    found = {names.get(name, name): np.asarray(values) for name, values in job.imatrix.items()}
    unknown = sorted(set(found) - set(job.arrays))
    if unknown:
        raise ShapeError(
            f"imatrix: {unknown[0]!r} is no tensor of this model (one of {len(unknown)} unknown names): it is the "
            f"importance matrix of another model"
        )
    for name, values in found.items():
        if values.shape != job.shape(name)[-1:]:
            raise ShapeError(
                f"imatrix: {name}: expected float32 {job.shape(name)[-1:]}, got {values.dtype} {values.shape}"
            )
    return found


def _encoded(
    job: Job, spec: TensorSpec, rows: int, importance: np.ndarray | None
) -> Generator[np.ndarray, None, SavedTensor]:
    """Gives the bytes of a tensor in runs; returns what the report says about it."""
    tensor, reader = job.arrays[spec.name][0]
    saved = SavedTensor(spec.name, spec.type.name, spec.shape, spec.nbytes)
    packed = _as_stored(tensor, reader, spec)
    if packed is not None:
        yield from _pieces(packed.data, reader)
        return saved
    if spec.type.is_float:
        # 1 + w is computed in float32, and no other dtype has an offset
        wanted = np.dtype(np.float32) if tensor.slots[job.column].offset else float_dtype(spec.type)
        for values in job.runs(spec.name, wanted, rows):
            yield np.ascontiguousarray(values)
        return saved
    worst, squares = 0.0, 0.0
    for values in job.runs(spec.name, job.stored_dtype(spec.name), rows):
        try:
            packed = quantize(values, spec.type, importance=importance)
        except CheckpointError as error:
            raise CheckpointError(f"{tensor.name}: {error}") from None
        largest, mean = quantization_error(values, packed)
        worst, squares = max(worst, largest), squares + mean * mean * values.size
        yield packed.data
    return dataclasses.replace(saved, max_error=worst, rmse=math.sqrt(squares / math.prod(spec.shape)))


def _pieces(data: np.ndarray, reader) -> Iterator[np.ndarray]:
    """Rows of a mapped file, some at a time: what was written leaves memory before the next is looked at."""
    step = max(1, _PIECE // data.shape[1])
    for start in range(0, len(data), step):
        yield data[start : start + step]
        if hasattr(reader, "release"):
            reader.release()


def _as_stored(tensor: Tensor, reader, spec: TensorSpec) -> PackedTensor | None:
    """The tensor's own bytes, where they are of the wanted type already; quantizing twice would lose twice."""
    if spec.type.is_float or reader.dtype != spec.type.name or not hasattr(reader, "packed"):
        return None
    return reader.packed() if tensor.shape == spec.shape else None
