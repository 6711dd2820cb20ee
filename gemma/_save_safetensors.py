# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face folder: config.json, the files of tokenizer and image processor, safetensors files and their index.

transformers and vLLM load it as it is. Bytes of the files are `formats/safetensors.py`, config.json is `hf_config.py`,
tokenizer files are `_tokenizer_write.py`; `gemma.saving` has checked the arguments.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gemma import _hf_packed, hf_config
from gemma._atomic import atomic_folder
from gemma._tokenizer_write import write_hf_files
from gemma.config import GemmaConfig, PaliGemmaConfig
from gemma.embedding import write_modules
from gemma.errors import ConfigError
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
    floats = max(specs, key=lambda spec: spec.nbytes).dtype.name
    coded = None
    beside = [spec for spec in specs if "/" in spec.name]  # the dense layers of an EmbeddingGemma: files of their own
    if beside and job.quantize is not None:
        raise ConfigError("quantize: an EmbeddingGemma with its dense layers is written in floats only")
    if job.quantize is not None or job.imatrix is not None:
        coded = _hf_packed.Writer(job)
        specs, values["quantization_config"] = coded.specs(), coded.config()
    parts = st.shard([spec for spec in specs if spec not in beside], job.max_shard_bytes)
    values["dtype"] = floats
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
                st.stream_safetensors(out, part, lambda spec: _read(job, spec, coded), metadata)
        if getattr(job.config, "embedding_dense", ()):
            _write_modules(job, folder, beside, metadata)
    plain = {spec.name: SavedTensor(spec.name, titles[spec.dtype], spec.shape, spec.nbytes) for spec in specs}
    quantized = {} if coded is None else coded.saved
    tensors = [quantized.get(name) or plain[name] for name in job.arrays]
    return files_report(job, "safetensors", sorted(p for p in job.path.rglob("*") if p.is_file()), tensors)


def _write_modules(job: Job, folder: Path, specs: list[st.TensorSpec], metadata: dict[str, str]) -> None:
    """What follows the encoder, as sentence-transformers expects it."""
    for name, text in write_modules(job.config).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for spec in specs:
        place, _, name = spec.name.rpartition("/")
        inner = dataclasses.replace(spec, name=name)
        with open(folder / place / "model.safetensors", "wb") as out:
            st.stream_safetensors(out, [inner], lambda _, spec=spec: _read(job, spec, None), metadata)


def _read(job: Job, spec: st.TensorSpec, coded: _hf_packed.Writer | None) -> Iterator[np.ndarray]:
    codes = None if coded is None else coded.read(spec)
    if codes is not None:
        yield from codes
        return
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
    if _GENERATION in files:
        files[_GENERATION] = _ending(files[_GENERATION], job.config)
    return files


def _ending(text: bytes, config: Any) -> bytes:
    """A generation configuration that ends where the model does: one that learnt to speak in turns ends them."""
    try:
        values = json.loads(text)
    except ValueError:
        return text
    ends = getattr(config, "end_token_ids", ())
    if not isinstance(values, dict) or "eos_token_id" not in values:
        return text
    known = values["eos_token_id"]
    known = known if isinstance(known, list) else [known]
    if set(ends) <= set(known):
        return text
    values["eos_token_id"] = [*known, *(i for i in ends if i not in known)]
    return (json.dumps(values, indent=2) + "\n").encode()


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
