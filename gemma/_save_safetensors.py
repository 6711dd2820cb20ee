# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder: config.json, the tokenizer's files, one or more safetensors files and their index.

transformers and vLLM load it as it is. Bytes of the files are `formats/safetensors.py`, config.json is `hf_config.py`,
tokenizer files are `_tokenizer_write.py`; `gemma.saving` has checked the arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from gemma import hf_config
from gemma._atomic import atomic_folder
from gemma._tokenizer_write import write_hf_files
from gemma.config import PaliGemmaConfig
from gemma.formats import safetensors as st
from gemma.saving import Job, SavedTensor, SaveReport, files_report

_METADATA = {"format": "pt"}  # transformers refuses a file that does not say which framework wrote it


def write(job: Job) -> SaveReport:
    """Writes the folder; see `gemma.saving.save`."""
    values = hf_config.write_config(job.config)
    specs = [st.TensorSpec(name, job.stored_dtype(name), job.shape(name)) for name in job.arrays]
    parts = st.shard(specs, job.max_shard_bytes)
    values["dtype"] = max(specs, key=lambda spec: spec.nbytes).dtype.name
    files = [_file_name(number, len(parts)) for number in range(len(parts))]
    metadata = {**job.metadata, **_METADATA}
    for part in parts:
        st.header(part, metadata)  # names and shapes, before anything is written
    job.start(sum(spec.nbytes for spec in specs))
    titles = {dtype: name for name, dtype in st.DTYPES.items()}
    with atomic_folder(job.path, replace=job.replace) as folder:
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        if job.tokenizer is not None:
            write_hf_files(job.tokenizer, folder, _rows(job.config))
        if len(parts) > 1:
            (folder / st.INDEX_NAME).write_text(st.index_text(parts, files))
        for file, part in zip(files, parts, strict=True):
            with open(folder / file, "wb") as out:
                st.stream_safetensors(out, part, lambda spec: _read(job, spec), metadata)
    tensors = [SavedTensor(spec.name, titles[spec.dtype], spec.shape, spec.nbytes) for spec in specs]
    return files_report(job, "safetensors", sorted(job.path.iterdir()), tensors)


def _read(job: Job, spec: st.TensorSpec) -> Iterator[np.ndarray]:
    yield from job.runs(spec.name, spec.dtype)
    job.advance(spec.name, spec.nbytes)


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _rows(config) -> int:
    return config.text_config.vocab_size if isinstance(config, PaliGemmaConfig) else config.vocab_size
