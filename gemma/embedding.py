# SPDX-License-Identifier: Apache-2.0
"""Embeddings around the network: task prompts, shorter vectors, cosines, and the folders of sentence-transformers.

The network is `gm/nn/_embedding.py`, texts in and vectors out is `gm/text/_embedding.py`. numpy only. The prompts are
those of EmbeddingGemma's published configuration (https://huggingface.co/google/embeddinggemma-300m).

A published folder holds the encoder, and beside it one folder per further module, listed in `modules.json`:

    config.json  model.safetensors  modules.json  1_Pooling/config.json  2_Dense/{config.json, model.safetensors}  ...
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma._hf_json import Section, read_list, read_object
from gemma.config import GemmaConfig
from gemma.errors import ConfigError, FormatError, PromptError, ShapeError, UnsupportedError

__all__ = ["SIZES", "TASKS", "Dense", "Modules", "cosine", "prompt", "read_modules", "shortened", "write_modules"]

SIZES = (768, 512, 256, 128)  # lengths that EmbeddingGemma's vectors were trained for

# What is put before a text, by what its vector is for. In `document`, a title may take the place of "none".
TASKS: Mapping[str, str] = {
    "query": "task: search result | query: ",
    "document": "title: none | text: ",
    "question-answering": "task: question answering | query: ",
    "fact-checking": "task: fact checking | query: ",
    "classification": "task: classification | query: ",
    "clustering": "task: clustering | query: ",
    "similarity": "task: sentence similarity | query: ",
    "code-retrieval": "task: code retrieval | query: ",
    "summarization": "task: summarization | query: ",
    "none": "",
}
_MODULES, _PROMPTS = "modules.json", "config_sentence_transformers.json"
_PREFIX = "sentence_transformers.models."
_POOLING = ("cls_token", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_MOST = 64  # modules of a folder, dense layers among them


def prompt(text: str, task: str = "none", *, title: str | None = None, prompts: Mapping[str, str] = TASKS) -> str:
    """The text with the prompt of a task before it.

    Args:
      text: what is embedded.
      task: a key of `prompts`.
      title: of a document; only with the task "document".
      prompts: by task; those that a folder states take precedence over `TASKS` (`Modules.prompts`).

    Raises:
      PromptError: (a ValueError) an unknown task, or a title where there is no place for one.
    """
    if task not in prompts:
        raise PromptError(f"task: expected one of {', '.join(prompts)}, got {task!r:.80}")
    before = prompts[task]
    if title is not None:
        if "title: none" not in before:
            raise PromptError(f"title: the prompt of the task {task!r} has no place for one; use the task 'document'")
        before = before.replace("title: none", f"title: {' '.join(title.split()) or 'none'}", 1)
    return before + text


def shortened(vectors: np.ndarray, dim: int) -> np.ndarray:
    """The first `dim` numbers of each vector, of unit length again: float32 [*B, dim].

    Raises:
      ShapeError: (a ValueError) `dim` is not in 1..the vectors' length.
    """
    vectors = np.asarray(vectors, np.float32)
    if not 1 <= dim <= vectors.shape[-1]:
        raise ShapeError(f"dim: expected 1..{vectors.shape[-1]}, the length of the vectors, got {dim}")
    cut = vectors[..., :dim]
    return cut / np.maximum(np.linalg.norm(cut, axis=-1, keepdims=True), 1e-12)


def cosine(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Cosine of each query [Q, D] with each document [M, D]: float32 [Q, M], in -1..1."""
    queries, documents = (np.asarray(a, np.float32) for a in (queries, documents))
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        raise ShapeError(f"cosine: expected [Q, D] and [M, D], got {queries.shape} and {documents.shape}")
    return np.clip(shortened(queries, queries.shape[1]) @ shortened(documents, documents.shape[1]).T, -1.0, 1.0)


# ---- folders


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dense layer of a folder: its file, and the widths that it takes and gives."""

    file: Path
    width_in: int
    width_out: int


@dataclasses.dataclass(frozen=True)
class Modules:
    """What follows the encoder in a folder.

    Attributes:
      dense: the layers after the pooling, in order.
      prompts: `TASKS`, with the prompts that the folder states.
    """

    dense: tuple[Dense, ...]
    prompts: Mapping[str, str]


def read_modules(folder: Path) -> Modules | None:
    """The modules of a folder of sentence-transformers; None for any other folder.

    Raises:
      FormatError, ConfigError: a file of it is broken, or widths do not fit each other.
      UnsupportedError: modules that EmbeddingGemma does not have.
    """
    if not (folder / _MODULES).is_file():
        return None
    dense: list[Dense] = []
    listed = read_list(folder / _MODULES)
    if not 1 <= len(listed) <= _MOST:
        raise FormatError(folder / _MODULES, None, f"expected 1..{_MOST} modules, got {len(listed)}")
    for number, entry in enumerate(listed):
        section = Section(entry, str(folder / _MODULES), f"[{number}]")
        kind, place = section.take("type", ""), section.take("path", "")
        if not isinstance(kind, str) or not isinstance(place, str):
            raise section.error("", "expected a type and a path, both text")
        inner = folder / place
        if place and (Path(place).is_absolute() or ".." in Path(place).parts):
            raise section.error("path", f"expected a folder inside of this one, got {place[:80]!r}")
        name = kind.rpartition(".")[2]
        if name == "Dense":
            dense.append(_read_dense(inner))
        elif name == "Pooling":
            _check_pooling(inner)
        elif name not in ("Transformer", "Normalize"):
            raise UnsupportedError(f"{folder / _MODULES}: the module {kind[:80]!r} is not part of an EmbeddingGemma")
    for before, after in itertools.pairwise(dense):
        if before.width_out != after.width_in:
            raise ConfigError(f"{after.file}: expected in_features {before.width_out}, got {after.width_in}")
    return Modules(tuple(dense), dict(TASKS) | _read_prompts(folder))


def _read_dense(folder: Path) -> Dense:
    section = Section(read_object(folder / "config.json"), str(folder / "config.json"))
    widths = [section.whole(name, None, 1, 2**20) for name in ("in_features", "out_features")]
    if None in widths:
        raise section.error("in_features", "missing, or out_features is; a dense layer states its widths")
    section.only("bias", False, why="the dense layers of EmbeddingGemma have none")
    identity = "torch.nn.modules.linear.Identity"
    section.only("activation_function", identity, why="the dense layers of EmbeddingGemma have none")
    file = folder / "model.safetensors"
    if not file.is_file():
        raise UnsupportedError(f"{file}: no such file; dense layers are read from safetensors")
    return Dense(file, *widths)


def _check_pooling(folder: Path) -> None:
    section = Section(read_object(folder / "config.json"), str(folder / "config.json"))
    modes = [name for name in _POOLING if section.take(f"pooling_mode_{name}", False)]
    mode = section.take("pooling_mode", "mean")
    if modes or not section.take("pooling_mode_mean_tokens", True) or mode not in ("mean", ["mean"]):
        raise UnsupportedError(f"{folder / 'config.json'}: expected the mean of the tokens, got {modes or mode}")
    section.only("include_prompt", True, why="EmbeddingGemma's mean is over the prompt, too")


def _read_prompts(folder: Path) -> dict[str, str]:
    if not (folder / _PROMPTS).is_file():
        return {}
    values = read_object(folder / _PROMPTS).get("prompts") or {}
    if not isinstance(values, Mapping) or not all(isinstance(value, str) for value in values.values()):
        raise FormatError(folder / _PROMPTS, None, "prompts: expected an object of texts")
    return {str(name): value for name, value in values.items()}


def write_modules(config: GemmaConfig, prompts: Mapping[str, str] = TASKS) -> dict[str, str]:
    """The files beside an encoder, for sentence-transformers: path in the folder to what JSON it holds.

    The weights of the dense layers are not among them: `{n}_Dense/model.safetensors` with `linear.weight` [out, in].
    """
    widths = (config.hidden_size, *config.embedding_dense)
    names = ["", "1_Pooling", *(f"{i + 2}_Dense" for i in range(len(widths) - 1)), f"{len(widths) + 1}_Normalize"]
    kinds = ["Transformer", "Pooling", *["Dense"] * (len(widths) - 1), "Normalize"]
    listed = [
        dict(idx=i, name=str(i), path=name, type=_PREFIX + kind)
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    pooling = dict(word_embedding_dimension=widths[0], include_prompt=True, pooling_mode_mean_tokens=True)
    pooling |= {f"pooling_mode_{name}": False for name in _POOLING}
    files: dict[str, Any] = {_MODULES: listed, "1_Pooling/config.json": pooling}
    files["sentence_bert_config.json"] = dict(max_seq_length=config.max_position_embeddings, do_lower_case=False)
    stated = {name: text for name, text in prompts.items() if text}
    files[_PROMPTS] = dict(prompts=stated, default_prompt_name=None, similarity_fn_name="cosine")
    for i, (before, after) in enumerate(itertools.pairwise(widths)):
        layer = dict(in_features=before, out_features=after, bias=False)
        layer["activation_function"] = "torch.nn.modules.linear.Identity"
        files[f"{i + 2}_Dense/config.json"] = layer
    return {name: json.dumps(values, indent=2) + "\n" for name, values in files.items()}
