# SPDX-License-Identifier: Apache-2.0
"""GGUF metadata to a GemmaConfig and to a vocabulary, with every type and range checked before it is used.

A file states its sizes; what the format has no key for (which layers are local, the RoPE base of local layers, the
27B's query scale, post norms) belongs to the architecture and is taken from the family's preset, never restated here.
Reading the bytes is `gguf.py`; pieces to a tokenizer is `gemma.tokenizer`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np

from gemma import weights
from gemma.config import PRESETS, GemmaConfig
from gemma.errors import ConfigError, FormatError, UnsupportedError, WeightsMismatch
from gemma.formats.gguf import Gguf, Value

# `general.architecture` to (model_type of the text decoder, presets of the family). The first preset is the
# representative: it lends what all members share to a file of a size that is not published.
FAMILIES = {
    "gemma": ("gemma", ("gemma_2b", "gemma_7b")),
    "gemma2": ("gemma2", ("gemma2_2b", "gemma2_9b", "gemma2_27b")),
    "gemma3": ("gemma3_text", ("gemma3_270m", "gemma3_1b", "gemma3_4b", "gemma3_12b", "gemma3_27b")),
}
_WHOLE = {"UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"}
_REAL = {"FLOAT32", "FLOAT64"}
_SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "head_dim")
_TOKEN_IDS = {
    "pad": "padding",
    "eos": "eos",
    "bos": "bos",
    "unk": "unknown",
    "mask": "mask",
    "eot": "eot",
    "sep": "seperator",  # the format's own spelling
}
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # of tokenizer.ggml.token_type


class _Fields:
    """Typed access to the metadata; a wrong type or a missing field is a FormatError that names the key."""

    def __init__(self, gguf: Gguf):
        self.gguf, self.path = gguf, gguf.source.path

    def fail(self, key: str, expected: str, value: Value | None) -> FormatError:
        if value is None:
            return FormatError(self.path, None, f"metadata key {key} is missing; expected {expected}")
        shown = (
            f"ARRAY of {value.item_type} [{value.count}]"
            if value.type == "ARRAY"
            else f"{value.type} {value.data!r:.80}"
        )
        return FormatError(self.path, value.offset, f"{key}: expected {expected}, got {shown}")

    def get(self, key: str, types: set[str], expected: str, default: Any = None, *, required: bool = False) -> Any:
        value = self.gguf.values.get(key)
        if value is None and not required:
            return default
        if value is None or value.type not in types:
            raise self.fail(key, expected, value)
        return value.data

    def whole(self, key: str, low: int, high: int, default: int | None = None, *, required: bool = False) -> int | None:
        expected = f"a whole number in {low}..{high}"
        number = self.get(key, _WHOLE, expected, default, required=required)
        if number is not None and not low <= number <= high:
            raise self.fail(key, expected, self.gguf.values[key])
        return number

    def real(self, key: str, default: float | None = None, *, required: bool = False) -> float | None:
        """A float; a FLOAT32 becomes the shortest decimal that rounds to it, so 1e-6 stays 1e-6."""
        number = self.get(key, _REAL, "a finite FLOAT32", default, required=required)
        if number is not None and not math.isfinite(number):
            raise self.fail(key, "a finite FLOAT32", self.gguf.values[key])
        value = self.gguf.values.get(key)
        return float(str(np.float32(number))) if value is not None and value.type == "FLOAT32" else number

    def text(self, key: str, *, required: bool = False) -> str | None:
        return self.get(key, {"STRING"}, "a STRING", required=required)

    def flag(self, key: str) -> bool | None:
        return self.get(key, {"BOOL"}, "a BOOL")

    def items(self, key: str, item_types: set[str], length: int) -> Any:
        """An array of exactly `length` items."""
        value, expected = (
            self.gguf.values.get(key),
            f"an ARRAY of {' or '.join(sorted(item_types))} with {length} items",
        )
        if value is None or value.type != "ARRAY" or value.item_type not in item_types or value.count != length:
            raise self.fail(key, expected, value)
        return self.gguf.array(key)


def architecture(gguf: Gguf) -> str:
    """`general.architecture` of a text model of the family; anything else is an UnsupportedError."""
    fields = _Fields(gguf)
    name, kind = fields.text("general.architecture", required=True), fields.text("general.type")
    if name not in FAMILIES or kind not in (None, "model"):
        raise UnsupportedError(
            f"{gguf.source.path}: expected a model of architecture {', '.join(FAMILIES)}, "
            f"got architecture {name!r:.80}, type {kind or 'model'!r:.80}"
        )
    if fields.whole("split.count", 0, 2**16, 0) > 1:
        raise UnsupportedError(f"{gguf.source.path}: one part of a split GGUF; merge the parts into one file first")
    return name


def read_gguf_config(gguf: Gguf) -> GemmaConfig:
    """The configuration of a Gemma 1, 2 or 3 text model.

    Raises:
      UnsupportedError: another architecture, an adapter, or a RoPE scaling that no Gemma has.
      FormatError: a key is missing, of the wrong type or out of range.
      ConfigError: the values contradict each other.
    """
    arch, fields = architecture(gguf), _Fields(gguf)
    model_type = FAMILIES[arch][0]
    sizes = _sizes(fields, arch)
    base = _base(arch, sizes)
    values = sizes | _attention(fields, arch, base) | _token_fields(fields)
    values |= dict(model_type=model_type, vision=None, vocab_size=vocabulary_rows(gguf))
    values["tie_word_embeddings"] = _names()[1] not in gguf.tensors  # a file has a head only where it differs
    try:
        return dataclasses.replace(base, **values)
    except ConfigError as error:
        raise ConfigError(f"{gguf.source.path}: {error}") from None


def _base(arch: str, sizes: dict[str, int]) -> GemmaConfig:
    """Facts without a key of their own: the published model of these sizes, else what its family shares."""
    members = [PRESETS[name] for name in FAMILIES[arch][1]]
    twin = next((p for p in members if all(sizes[key] == getattr(p, key) for key in _SIZES)), None)
    return twin or dataclasses.replace(members[0], query_pre_attn_scalar=None)


def family_base(arch: str, config: GemmaConfig) -> GemmaConfig:
    """What a reader assumes about a file of these sizes where it says nothing; sizes that must agree are `config`'s."""
    sizes = {key: getattr(config, key) for key in _SIZES}
    return dataclasses.replace(_base(arch, sizes), **sizes, num_key_value_heads=config.num_key_value_heads)


def _sizes(fields: _Fields, arch: str) -> dict[str, int]:
    def whole(key: str, high: int, default: int | None = None) -> int:
        return fields.whole(f"{arch}.{key}", 1, high, default, required=default is None)

    width, heads = whole("embedding_length", 2**24), whole("attention.head_count", 4096)
    sizes = dict(
        num_hidden_layers=whole("block_count", 4096),
        hidden_size=width,
        intermediate_size=whole("feed_forward_length", 2**24),
        num_attention_heads=heads,
        num_key_value_heads=whole("attention.head_count_kv", 4096, heads),  # the format's default
        head_dim=whole("attention.key_length", 4096, max(1, width // heads)),  # likewise
        max_position_embeddings=whole("context_length", 2**27),
    )
    value_length = whole("attention.value_length", 4096, sizes["head_dim"])
    if value_length != sizes["head_dim"]:
        key = f"{arch}.attention.value_length"
        raise fields.fail(key, f"the key length {sizes['head_dim']}", fields.gguf.values.get(key))
    return sizes


def _attention(fields: _Fields, arch: str, base: GemmaConfig) -> dict[str, Any]:
    """RoPE, window, caps and query scale; what a file leaves out is `base`'s.

    The converter of the format writes no window and no caps for early Gemma 2 files, and the quantization-aware
    Gemma 3 files lack the RoPE scaling of their sizes: the weights need them all the same.
    """
    values: dict[str, Any] = {
        "rms_norm_eps": fields.real(f"{arch}.attention.layer_norm_rms_epsilon", required=True),
        "rope_theta": fields.real(f"{arch}.rope.freq_base", base.rope_theta),
        "rope_scaling_factor": _rope_factor(fields, arch, base),
        "attn_logit_softcapping": fields.real(f"{arch}.attn_logit_softcapping", base.attn_logit_softcapping) or None,
        "final_logit_softcapping": fields.real(f"{arch}.final_logit_softcapping", base.final_logit_softcapping) or None,
    }
    if "L" in base.layer_pattern:
        default = base.sliding_window if arch == "gemma2" else None
        key = f"{arch}.attention.sliding_window"
        values["sliding_window"] = fields.whole(key, 1, 2**27, default, required=default is None)
        values["layer_pattern"] = _layer_pattern(fields, arch, base)
    if base.rope_local_base_freq is not None:
        values["rope_local_base_freq"] = fields.real(f"{arch}.rope.freq_base_swa", base.rope_local_base_freq)
    scale = fields.real(f"{arch}.attention.scale")  # of queries; the converter leaves it out
    if scale is not None:
        if not 1e-3 <= scale <= 1e3:
            key = f"{arch}.attention.scale"
            raise fields.fail(key, "a number in 0.001..1000", fields.gguf.values[key])
        values["query_pre_attn_scalar"] = float(np.float32(scale**-2))
    return values


def _rope_factor(fields: _Fields, arch: str, base: GemmaConfig) -> float:
    kind = fields.text(f"{arch}.rope.scaling.type")
    if kind not in (None, "none", "linear"):
        raise UnsupportedError(
            f'{fields.path}: {arch}.rope.scaling.type: expected "none" or "linear", which Gemma uses, got {kind!r:.80}'
        )
    if kind == "none":
        return 1.0
    old = fields.real(f"{arch}.rope.scale_linear", base.rope_scaling_factor)  # the key before rope.scaling
    return fields.real(f"{arch}.rope.scaling.factor", old, required=kind == "linear")


def _layer_pattern(fields: _Fields, arch: str, base: GemmaConfig) -> str:
    """The family's pattern, unless the file has its own: n for "every n-th is global", or one BOOL (local) a layer."""
    key = f"{arch}.attention.sliding_window_pattern"
    value = fields.gguf.values.get(key)
    if value is None:
        return base.layer_pattern
    if value.type == "ARRAY":
        layers = fields.whole(f"{arch}.block_count", 1, 4096, required=True)
        return "".join("L" if local else "G" for local in fields.items(key, {"BOOL"}, layers))
    every = fields.whole(key, 1, 4096, required=True)
    return "L" * (every - 1) + "G"


def _token_fields(fields: _Fields) -> dict[str, Any]:
    ids = token_ids(fields.gguf)
    values: dict[str, Any] = {f"{name}_token_id": ids[name] for name in ("pad", "bos", "eos") if name in ids}
    if "eot" in ids and ids["eot"] != ids.get("eos"):
        values["eos_token_id"] = (*((ids["eos"],) if "eos" in ids else ()), ids["eot"])
    return values


def token_ids(gguf: Gguf) -> dict[str, int]:
    """Special ids of the metadata, those that are there: pad, eos, bos, unk, mask, eot, sep; each within the table."""
    fields, rows = _Fields(gguf), vocabulary_rows(gguf)
    found = {name: fields.whole(f"tokenizer.ggml.{key}_token_id", 0, rows - 1) for name, key in _TOKEN_IDS.items()}
    return {name: number for name, number in found.items() if number is not None}


@functools.cache
def _names() -> tuple[str, str]:
    """The file's names of the embedding and of a head of its own, from the weight table."""
    untied = dataclasses.replace(PRESETS[FAMILIES["gemma3"][1][0]], tie_word_embeddings=False)
    names = {tensor.name: tensor.slots["gguf"].name for tensor in weights.tensors(untied) if "gguf" in tensor.slots}
    return names["embed"], names["head"]


def vocabulary_rows(gguf: Gguf) -> int:
    """Rows of the embedding table."""
    name = _names()[0]
    table = gguf.tensors.get(name)
    if table is None or len(table.shape) != 2:
        raise FormatError(gguf.source.path, None, f"expected a tensor {name} with two dimensions")
    return table.shape[0]


def read_vocabulary(gguf: Gguf) -> dict[str, Any] | None:
    """Pieces, scores, types, special ids and flags, as the fields of a TokenizerSource; None where a file has none."""
    fields = _Fields(gguf)
    model = fields.text("tokenizer.ggml.model")
    if model is None or model in ("none", "no_vocab"):
        return None
    if model != "llama":
        raise UnsupportedError(
            f'{fields.path}: tokenizer.ggml.model: expected "llama" (the SentencePiece of Gemma 1 to 3), '
            f"got {model!r:.80}"
        )
    rows = vocabulary_rows(gguf)
    stated = gguf.values.get("tokenizer.ggml.tokens")
    if stated is not None and stated.item_type == "STRING" and stated.count != rows:
        raise WeightsMismatch(
            gguf.source.path,
            misshaped=[f"embed: expected {stated.count} rows, one for each of tokenizer.ggml.tokens, got {rows}"],
            hint="the vocabulary and the embedding are of different models",
        )
    pieces = fields.items("tokenizer.ggml.tokens", {"STRING"}, rows)
    scores = fields.items("tokenizer.ggml.scores", {"FLOAT32"}, rows)
    types = fields.items("tokenizer.ggml.token_type", {"INT32", "UINT32"}, rows).astype(np.int32)
    _check_vocabulary(fields, pieces, scores, types)
    flags = {
        name: fields.flag(f"tokenizer.ggml.{name}") for name in ("add_bos_token", "add_eos_token", "add_space_prefix")
    }
    return dict(
        pieces=pieces,
        scores=scores,
        types=types,
        special=token_ids(gguf),
        flags={name: value for name, value in flags.items() if value is not None},
    )


def _check_vocabulary(fields: _Fields, pieces: list[str], scores: np.ndarray, types: np.ndarray) -> None:
    def fail(key: str, rule: str) -> FormatError:
        return FormatError(
            fields.path, fields.gguf.values[f"tokenizer.ggml.{key}"].offset, f"tokenizer.ggml.{key}: {rule}"
        )

    if not np.isfinite(scores).all():
        raise fail(
            "scores", f"expected finite numbers, got one that is not for id {int(np.argmin(np.isfinite(scores)))}"
        )
    outside = (types < NORMAL) | (types > BYTE)
    if outside.any():
        at = int(np.argmax(outside))
        raise fail("token_type", f"expected types {NORMAL}..{BYTE}, got {types[at]} for id {at}")
    if len(set(pieces)) != len(pieces):
        seen: set[str] = set()
        twice = next(piece for piece in pieces if piece in seen or seen.add(piece))
        raise fail("tokens", f"duplicate piece {twice!r:.80}")
    if "" in pieces:
        raise fail("tokens", f"the piece of id {pieces.index('')} is empty")
    byte_ids = np.flatnonzero(types == BYTE)
    wrong = next((int(i) for i in byte_ids if not _BYTE_PIECE.fullmatch(pieces[i])), None)
    if wrong is not None:
        raise fail("tokens", f"id {wrong} is of type BYTE: expected <0x00>..<0xFF>, got {pieces[wrong]!r:.80}")
    if len(byte_ids) not in (0, 256):
        raise fail("tokens", f"expected all 256 byte pieces or none, got {len(byte_ids)}")
