# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder: config.json, the files of tokenizer and image processor, safetensors files and their index.

transformers and vLLM load it as it is. Bytes of the files are `formats/safetensors.py`, config.json is `hf_config.py`,
tokenizer files are `_tokenizer_write.py`; `gemma.saving` has checked the arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma import hf_config
from gemma._atomic import atomic_folder
from gemma._tokenizer_write import write_hf_files
from gemma.config import GemmaConfig, PaliGemmaConfig
from gemma.formats import safetensors as st
from gemma.saving import Job, SavedTensor, SaveReport, files_report

_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_GENERATION = "generation_config.json"
_LARGEST = 1 << 20  # bytes of one of these; published ones have a few hundred
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
        for name, data in _beside(job).items():
            (folder / name).write_bytes(data)
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


def _beside(job: Job) -> dict[str, bytes]:
    """The files about images and generation: those of the tokenizer's folder, else what the model's sizes say."""
    files = {}
    vision = isinstance(job.config, PaliGemmaConfig) or getattr(job.config, "vision", None) is not None
    if vision:
        values = _processor(job.config)
        files = {name: json.dumps(found, indent=2).encode() + b"\n" for name, found in values.items()}
    tokenizer = job.tokenizer
    if tokenizer is None or tokenizer.kind == "gguf" or tokenizer.model is not None or tokenizer.path is None:
        return files
    for name in (_GENERATION, *(_PROCESSOR if vision else ())):
        file = Path(tokenizer.path).parent / name
        if file.is_file() and file.stat().st_size <= _LARGEST:
            files[name] = file.read_bytes()
    return files


def _processor(config: GemmaConfig | PaliGemmaConfig) -> dict[str, dict[str, Any]]:
    """How transformers prepares images: square, -1..1; bilinear for Gemma 3, bicubic for PaliGemma."""
    pali = isinstance(config, PaliGemmaConfig)
    tower = config.vision_config if pali else config.vision
    tokens = (tower.image_size // tower.patch_size) ** 2 if pali else config.mm_tokens_per_image
    kind, images = ("PaliGemma", "Siglip") if pali else ("Gemma3", "Gemma3")
    image = dict(image_processor_type=f"{images}ImageProcessor", processor_class=f"{kind}Processor")
    image |= dict(do_convert_rgb=True, do_resize=True, do_rescale=True, do_normalize=True, rescale_factor=1 / 255)
    image |= dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3 if pali else 2, image_seq_length=tokens)
    image["size"] = dict(height=tower.image_size, width=tower.image_size)
    return {_PROCESSOR[0]: image, _PROCESSOR[1]: dict(processor_class=f"{kind}Processor", image_seq_length=tokens)}


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _rows(config) -> int:
    return config.text_config.vocab_size if isinstance(config, PaliGemmaConfig) else config.vocab_size
