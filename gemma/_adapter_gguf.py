# SPDX-License-Identifier: Apache-2.0
"""A GGUF adapter, which llama.cpp loads with --lora: `blk.0.attn_q.weight.lora_a` [r, in] and `.lora_b` [out, r].

One alpha serves all tensors, and each is scaled by alpha / r: other scales are multiplied into `lora_b`. What an adapter
does is `adapters.py`; PEFT's format `_adapter_peft.py`; the bytes `formats/gguf_write.py`.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma import weights
from gemma._atomic import atomic_file
from gemma.adapters import CHECKSUM, AdapterFile, LowRank, describes, read_classification, says_chat
from gemma.checkpoint import GgufCheckpoint, open_checkpoint
from gemma.errors import CheckpointError, UnsupportedError, WeightsMismatch
from gemma.formats.gguf_metadata import architecture_of
from gemma.formats.gguf_write import TensorSpec, write_gguf
from gemma.quants import QuantType

_BASE = "gemmakit.base_model"


def read(path: Path, config: Any) -> AdapterFile:
    """The adapter in a file, bound to a model; see `adapters.open_adapter`."""
    names = {t.slots["gguf"].name: t for t in weights.tensors(config) if "gguf" in t.slots and len(t.shape) == 2}
    with open_checkpoint(path) as opened:
        if not isinstance(opened, GgufCheckpoint) or opened.metadata.get("general.type") != "adapter":
            what = opened.metadata.get("general.type", "model") if isinstance(opened, GgufCheckpoint) else opened.format
            raise CheckpointError(f"{path}: expected an adapter (general.type), got a {what}")
        kind = opened.metadata.get("adapter.type")
        if kind != "lora":
            raise UnsupportedError(f"{path}: adapter.type: expected lora, got {kind!r}")
        wanted, found = architecture_of(config), opened.metadata.get("general.architecture")
        if found != wanted:
            raise CheckpointError(f"{path}: is an adapter of {found!r}, the model is of {wanted!r}")
        alpha = opened.metadata.get("adapter.lora.alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise CheckpointError(f"{path}: adapter.lora.alpha: expected a number, got {alpha!r}")
        base = {key.removesuffix(".lora_a").removesuffix(".lora_b") for key in opened.tensors}
        unexpected = [key for key in base if key not in names]
        missing = [f"{key}.lora_{part}" for key in base for part in "ab" if f"{key}.lora_{part}" not in opened.tensors]
        if unexpected or missing:
            raise WeightsMismatch(path, missing=missing, unexpected=unexpected, hint="the adapter is of another model")
        tensors = {}
        for key in sorted(base):
            a, b = (np.array(opened.read(f"{key}.lora_{part}")) for part in "ab")
            if names[key].part == "embed":  # llama.cpp looks rows up in the first factor
                a, b = b.T, a
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise CheckpointError(f"{path}: {key}: factors {a.shape} and {b.shape} do not belong together")
            # as llama.cpp does: without an alpha, the factors stand as they are
            tensors[names[key].name] = LowRank(a, b, alpha / a.shape[0] if alpha else 1.0)
        text = {key: str(opened.metadata.get(key, "")) for key in (CHECKSUM, _BASE)}
        chat, classification = says_chat(opened.metadata), read_classification(opened.metadata, path)
    return AdapterFile(
        tensors,
        base_model=text[_BASE],
        base_checksum=text[CHECKSUM],
        path=path,
        chat=chat,
        classification=classification,
    )


def write(path: Path, adapter: AdapterFile, config: Any, table: Mapping[str, weights.Tensor], *, replace: bool) -> None:
    """Writes the file; see `adapters.save_adapter_file`."""
    architecture = architecture_of(config)
    if adapter.use_dora:
        raise UnsupportedError("a GGUF adapter cannot hold DoRA's magnitudes: fuse the adapter into the model instead")
    if "embed" in adapter.tensors:
        raise UnsupportedError(
            "embed: llama.cpp cannot run an adapter of a table that is also the output head: fuse it into the model instead"
        )
    homeless = [name for name in adapter.tensors if "gguf" not in table[name].slots]
    if homeless:
        raise UnsupportedError(f"{homeless[0]}: GGUF has no name for it (one of {len(homeless)}); use PEFT's format")
    alphas = collections.Counter(low.scale * low.rank for low in adapter.tensors.values() if low.scale)
    alpha = alphas.most_common(1)[0][0] if alphas else 1.0  # 0 would mean a scale of one
    arrays = {}
    for name, low in adapter.tensors.items():
        factor = low.scale * low.rank / alpha
        b = low.b.astype(np.float32)
        key = table[name].slots["gguf"].name
        arrays[f"{key}.lora_a"] = low.a.astype(np.float32)
        arrays[f"{key}.lora_b"] = b if factor == 1.0 else b * np.float32(factor)
    metadata = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "general.name": path.stem,
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    metadata |= describes(adapter)
    metadata |= {key: text for key, text in ((CHECKSUM, adapter.base_checksum), (_BASE, adapter.base_model)) if text}
    specs = [TensorSpec(key, QuantType.F32, array.shape) for key, array in arrays.items()]
    with atomic_file(path, replace=replace) as file:
        write_gguf(file, metadata, specs, lambda spec: [np.ascontiguousarray(arrays[spec.name])])
