# SPDX-License-Identifier: Apache-2.0
"""Writes small checkpoints for tests: a GGUF of any tensors and metadata, tiny random models as GGUF or safetensors.

A writer of its own, so that the readers in `formats/` are not tested against themselves; public through `testing.py`.
It is for kilobytes: everything is held in memory. Converting real models is not its task.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma.config import GemmaConfig
from gemma.errors import ConfigError

# ggml's numbers of the types written here; rows of Q8_0 are blocks of 32 values: one float16 scale, 32 int8.
_GGML_TYPES = {"F32": 0, "F16": 1, "Q8_0": 8}
_Q8_BLOCK = 32
_ALIGNMENT = 32

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece piece types
_SPECIALS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
SPECIAL_PIECES = (*_SPECIALS, "<start_of_image>", "<end_of_image>", "<image_soft_token>")


def tiny_pieces(vocab_size: int = 320) -> list[tuple[str, float, int]]:
    """A vocabulary of the special tokens, all 256 bytes, a space and `<unusedN>`: (piece, score, SentencePiece type)"""
    pieces = [(piece, -1000.0, UNKNOWN if piece == "<unk>" else CONTROL) for piece in SPECIAL_PIECES]
    pieces += [(f"<0x{byte:02X}>", -1000.0, BYTE) for byte in range(256)]
    pieces += [("\N{LOWER ONE EIGHTH BLOCK}", -1.0, NORMAL)]
    if vocab_size < len(pieces):
        raise ConfigError(f"tiny_pieces: expected a vocab_size of at least {len(pieces)}, got {vocab_size}")
    return pieces + [(f"<unused{i}>", -1000.0, CONTROL) for i in range(vocab_size - len(pieces))]


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    types: str | Mapping[str, str] = "F32",
) -> Path:
    """Writes a GGUF file, version 3, little endian, alignment 32.

    Args:
      path: the file.
      metadata: key to bool, int (uint32), float (float32), str, or a non-empty list of one of these (ints: int32).
      tensors: name to float array in row-major axes; GGUF stores them reversed.
      types: "F32", "F16" or "Q8_0" for all, or for some by name (the others are F32). Q8_0 needs rows of whole blocks.
    """
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        out += _string(key) + _typed(key, value)
    data = bytearray()
    for name, array in tensors.items():
        kind = types if isinstance(types, str) else types.get(name, "F32")
        if kind not in _GGML_TYPES:
            raise ConfigError(f"write_gguf: {name}: expected one of {', '.join(_GGML_TYPES)}, got {kind!r}")
        data += bytes(-len(data) % _ALIGNMENT)
        dims = array.shape[::-1]
        out += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, _GGML_TYPES[kind], len(data))
        data += _encode(name, array, kind)
    out += bytes(-len(out) % _ALIGNMENT)
    Path(path).write_bytes(out + data)
    return Path(path)


def write_tiny_gguf(
    path: str | os.PathLike[str],
    config: GemmaConfig,
    seed: int = 0,
    *,
    pieces: Sequence[tuple[str, float, int]] | None = None,
    types: str | Mapping[str, str] = "F32",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes a random model as the GGUF that llama.cpp's converter would make of it.

    Args:
      path: the file.
      config: a text model. GGUF has no key for the query scale and the base of local layers: readers take head_dim
        and 10,000 for sizes that are not published, and so must the configuration.
      seed: of `random_tensors`.
      pieces: the vocabulary, one (piece, score, type) per row; None: `tiny_pieces`. An empty list: no tokenizer.
      types: "F32", "F16" or "Q8_0" for the matrices (norms stay F32), or by GGUF tensor name.
      metadata: keys to add or replace; a value of None removes the key.
      tensors: canonical name to array, instead of random ones.
    """
    from gemma import testing, weights

    for field, assumed in (("query_pre_attn_scalar", config.head_dim), ("rope_local_base_freq", 1e4)):
        if getattr(config, field) not in (None, assumed):
            raise ConfigError(f"write_tiny_gguf: {field}: a GGUF can only mean {assumed}, got {getattr(config, field)}")
    arrays = testing.random_tensors(config, seed) if tensors is None else tensors
    rows = {t.name: t.slots["gguf"] for t in weights.tensors(config) if not t.slots["gguf"].copy}
    stored = {slot.name: arrays[name] + np.float32(slot.offset) for name, slot in rows.items()}
    kinds = {name: types for name, a in stored.items() if a.ndim > 1} if isinstance(types, str) else types
    keys = gguf_metadata(config)
    if pieces is None or len(pieces):
        keys |= gguf_vocabulary(tiny_pieces(config.vocab_size) if pieces is None else pieces)
    keys |= dict(metadata or {})
    return write_gguf(path, {k: v for k, v in keys.items() if v is not None}, stored, kinds)


def gguf_metadata(config: GemmaConfig) -> dict[str, Any]:
    """The `general.*` and `<architecture>.*` keys of a text model."""
    arch = {"gemma": "gemma", "gemma2": "gemma2"}.get(config.model_type, "gemma3")
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        "rope.freq_base": float(config.rope_theta) if arch == "gemma3" else None,
    }
    if config.rope_scaling_factor != 1.0:
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(config.rope_scaling_factor)}
    named = {f"{arch}.{key}": value for key, value in keys.items() if value is not None}
    return {"general.architecture": arch, "general.type": "model", "general.name": f"tiny {arch}"} | named


def gguf_vocabulary(pieces: Sequence[tuple[str, float, int]]) -> dict[str, Any]:
    """The `tokenizer.ggml.*` keys of a SentencePiece vocabulary."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece for piece, _, _ in pieces],
        "tokenizer.ggml.scores": [float(score) for _, score, _ in pieces],
        "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


def write_tiny_safetensors(
    folder: str | os.PathLike[str],
    config: GemmaConfig,
    seed: int = 0,
    *,
    shards: int = 1,
    dtype: Any = np.float32,
    tensors: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes a random model as a Hugging Face folder: config.json and one or more safetensors files, no tokenizer.

    Args:
      folder: made if missing.
      config: a text model.
      seed: of `random_tensors`.
      shards: above 1 also writes `model.safetensors.index.json`.
      dtype: of the stored tensors: float32, float16 or ml_dtypes.bfloat16.
      tensors: canonical name to array, instead of random ones.
    """
    from safetensors.numpy import save_file

    from gemma import hf_config, testing, weights

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = testing.random_tensors(config, seed) if tensors is None else tensors
    stored = {t.slots["hf"].name: np.ascontiguousarray(arrays[t.name].astype(dtype)) for t in weights.tensors(config)}
    (folder / "config.json").write_text(json.dumps(hf_config.write_config(config), indent=2) + "\n")
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, where = list(stored), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: stored[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(a.nbytes for a in stored.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(key: str, value: Any) -> bytes:
    if isinstance(value, (list, tuple)):
        number, _ = _scalar(key, value[0])
        number = 5 if number == 4 else number  # converters store lists of ints as int32
        body = b"".join(struct.pack("<i", v) if number == 5 else _scalar(key, v)[1] for v in value)
        return struct.pack("<IIQ", 9, number, len(value)) + body
    number, body = _scalar(key, value)
    return struct.pack("<I", number) + body


def _scalar(key: str, value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, _string(value)
    raise ConfigError(
        f"write_gguf: {key}: expected bool, int, float, str or a list of them, got {type(value).__name__}"
    )


def _encode(name: str, array: np.ndarray, kind: str) -> bytes:
    if kind != "Q8_0":
        return np.ascontiguousarray(array, "<f4" if kind == "F32" else "<f2").tobytes()
    if array.shape[-1] % _Q8_BLOCK:
        raise ConfigError(f"write_gguf: {name}: Q8_0 needs rows of a multiple of {_Q8_BLOCK}, got {array.shape}")
    blocks = np.ascontiguousarray(array, np.float32).reshape(-1, _Q8_BLOCK)
    scale = np.abs(blocks).max(axis=1) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    scaled = blocks * inverse[:, None]
    rounded = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(
        np.int8
    )  # halves away from zero, as C does
    packed = np.zeros(len(blocks), dtype=[("d", "<f2"), ("q", "i1", _Q8_BLOCK)])
    packed["d"], packed["q"] = scale, rounded
    return packed.tobytes()
