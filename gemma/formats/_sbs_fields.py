# SPDX-License-Identifier: Apache-2.0
"""The two records inside a gemma.cpp file: the table of its tensors ("toc") and the model's configuration ("config").

Both are sequences of 32-bit words: a record begins with the number of words that follow, so that fields which are
appended later can be skipped; strings and lists begin with their length. What the words around them mean (blobs,
offsets) is `sbs.py`'s business. gemma.cpp numbers its models; a number that we know stands for one of our presets.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma import config as configs
from gemma.config import GemmaConfig, PaliGemmaConfig
from gemma.errors import FormatError, UnsupportedError

TYPES = {1: "F32", 2: "BF16", 3: "SFP8"}  # gemma.cpp's numbers of the types that are read
OTHER_TYPES = {4: "NUQ", 5: "F64", 6: "U32", 7: "U64", 8: "I8"}
_MODELS = {
    1: "gemma_2b",
    2: "gemma_7b",
    3: "gemma2_9b",
    4: "gemma2_27b",
    7: "gemma2_2b",
    10: "paligemma2_3b_224",
    11: "paligemma2_3b_448",
    12: "paligemma2_10b_224",
    13: "paligemma2_10b_448",
    14: "gemma3_4b",
    15: "gemma3_1b",
    16: "gemma3_12b",
    17: "gemma3_27b",
    18: "gemma3_270m",
}
_TEXT_ONLY = {20: "gemma3_4b", 21: "gemma3_12b", 22: "gemma3_27b"}
_CUSTOM = 19
_KEY_SIZE, _MODEL_BY_HEADS = 0, 1  # how queries are scaled: H ** -0.5, or (D / N) ** -0.5


class _Words:
    """Reads one record from left to right; beyond its end every field has the default."""

    def __init__(self, path: Path, words: Sequence[int], what: str):
        self._path, self._words, self._what, self._at, self._ends = path, words, what, 0, [len(words)]

    def fail(self, rule: str) -> FormatError:
        return FormatError(self._path, None, f"{self._what}, word {self._at}: {rule}")

    @property
    def more(self) -> bool:
        return self._at < self._ends[-1]

    def number(self, default: int = 0) -> int:
        if not self.more:
            return default
        self._at += 1
        return int(self._words[self._at - 1])

    def real(self, default: float = 0.0) -> float:
        return struct.unpack("<f", struct.pack("<I", self.number()))[0] if self.more else default

    def count(self, limit: int) -> int:
        count = self.number()
        if count > min(limit, self._ends[-1] - self._at):
            raise self.fail(f"a length of {count}; at most {min(limit, self._ends[-1] - self._at)} fit")
        return count

    def text(self) -> str:
        data = b"".join(struct.pack("<I", self.number()) for _ in range(self.count(64)))
        return data.rstrip(b"\0").decode("utf-8", "replace")

    def enter(self) -> None:
        """Begins a nested record."""
        end = self.count(1 << 20)
        self._ends.append(self._at + end)

    def leave(self) -> None:
        """Ends it, skipping fields that we do not know."""
        self._at = self._ends.pop()


def read_toc(path: Path, words: Sequence[int]) -> Iterator[dict[str, Any]]:
    """For each tensor: name, type (a number of `TYPES`), rows, cols, scale, stride."""
    reader = _Words(path, words, "toc")
    while reader.more:
        reader.enter()
        entry = dict(name=reader.text(), type=reader.number())
        reader.number(), reader.number()  # bytes of an element and number of elements follow from the type
        entry |= dict(rows=reader.number(), cols=reader.number(), scale=reader.real(1.0))
        yield entry | dict(stride=reader.number(entry["cols"]))
        reader.leave()


def _read_layer(reader: _Words) -> dict[str, int]:
    names = (
        "model_dim griffin_dim ff_hidden_dim heads kv_heads qkv_dim conv1d_width ff_biases attn_biases "
        "optimized_gating post_norm type activation post_qk use_qk_norm"
    )
    reader.enter()
    layer = {name: reader.number() for name in names.split(" ")}
    reader.leave()
    return layer


def read_model_config(path: Path, words: Sequence[int]) -> GemmaConfig | PaliGemmaConfig:
    """The configuration that a file states.

    A model of gemma.cpp's list is our preset of that name. For any other the stated sizes are taken; what this record
    has no field for (the scaling of positions above all) has the default of its generation.
    """
    reader = _Words(path, words, "config")
    reader.enter()
    reader.number(), reader.text()  # generation and a name for display
    model, _wrapping, _weight = reader.number(), reader.number(), reader.number()
    layers, width, vocabulary, context = (reader.number() for _ in range(4))
    reader.number()
    caps = (reader.real(), reader.real())
    reader.number(), reader.number()
    scale = reader.number()
    specs = [_read_layer(reader) for _ in range(reader.count(4096))]
    windows = [reader.number() for _ in range(reader.count(4096))]
    known = _MODELS.get(model) or _TEXT_ONLY.get(model)
    if known:
        preset = configs.preset(known)
        text = preset.text_config if isinstance(preset, PaliGemmaConfig) else preset
        if (text.num_hidden_layers, text.hidden_size) != (layers, width):
            raise reader.fail(f"it says {known}, but {layers} layers of width {width}")
        return configs.text_only(preset) if model in _TEXT_ONLY else preset
    if not specs or len(specs) != layers or len(windows) != layers or any(spec != specs[0] for spec in specs):
        raise UnsupportedError(
            f"{path}: config: expected {layers} equal layers with windows; put a config.json beside it"
        )
    return _generic(reader, specs[0], windows, layers, width, vocabulary, context, caps, scale)


def _generic(reader, spec, windows, layers, width, vocabulary, context, caps, scale) -> GemmaConfig:
    if spec["type"] or spec["activation"] or spec["griffin_dim"] or scale not in (_KEY_SIZE, _MODEL_BY_HEADS):
        raise reader.fail("layers that no Gemma 1, 2 or 3 has")
    local = sorted({window for window in windows if window < context})
    if len(local) > 1:
        raise reader.fail(f"windows of {local}; expected one size")
    normed, post = bool(spec["use_qk_norm"]), bool(spec["post_norm"])
    return GemmaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=spec["ff_hidden_dim"],
        num_hidden_layers=layers,
        num_attention_heads=spec["heads"],
        num_key_value_heads=spec["kv_heads"],
        head_dim=spec["qkv_dim"],
        max_position_embeddings=context,
        model_type="gemma3_text" if normed else "gemma2" if post else "gemma",
        layer_pattern=_period("".join("L" if window < context else "G" for window in windows)),
        sliding_window=local[0] if local else None,
        rope_theta=1e6 if normed else 1e4,
        rope_local_base_freq=1e4 if normed else None,
        query_pre_attn_scalar=width / spec["heads"] if scale == _MODEL_BY_HEADS else None,
        attn_logit_softcapping=caps[0] or None,
        final_logit_softcapping=caps[1] or None,
        use_post_norms=post,
        use_qk_norm=normed,
        transpose_gating_einsum=bool(spec["optimized_gating"]),
    )


def _period(pattern: str) -> str:
    """The shortest beginning whose repetition is the pattern: "LGLGL" is "LG"."""
    sizes = range(1, len(pattern) + 1)
    return next(pattern[:n] for n in sizes if (pattern[:n] * len(pattern))[: len(pattern)] == pattern)


# ---- writing --------------------------------------------------------------------------------------------------------


def _real(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _text(value: str) -> list[int]:
    data = value.encode()
    data += b"\0" * (-len(data) % 4)
    return [len(data) // 4, *struct.unpack(f"<{len(data) // 4}I", data)]


def _record(words: list[int]) -> list[int]:
    return [len(words), *words]


@dataclasses.dataclass(frozen=True)
class TocEntry:
    """A tensor as the table of a file lists it."""

    name: str
    type: str  # "F32", "BF16" or "SFP8"
    rows: int
    cols: int
    scale: float = 1.0


def toc_words(entries: Sequence[TocEntry]) -> np.ndarray:
    """The "toc" blob, uint32."""
    numbers = {title: number for number, title in TYPES.items()}
    width = {"F32": 4, "BF16": 2, "SFP8": 1}
    words: list[int] = []
    for e in entries:
        shape = [width[e.type], e.rows * e.cols, e.rows, e.cols, _real(e.scale), e.cols]
        words += _record([*_text(e.name), numbers[e.type], *shape])
    return np.array(words, np.uint32)


def config_words(config: GemmaConfig, weight: str) -> np.ndarray:
    """The "config" blob, uint32, of a text model whose large tensors have the type `weight`.

    Raises:
      UnsupportedError: a model that gemma.cpp's record has no words for.
    """
    D, N, H = config.hidden_size, config.num_attention_heads, config.head_dim
    scalar = config.query_pre_attn_scalar or H
    if scalar not in (H, D / N):
        raise UnsupportedError(f"gemma.cpp scales queries by head_dim or width / heads, not by {scalar}")
    if config.vision is not None or not config.tie_word_embeddings or config.use_bidirectional_attention:
        raise UnsupportedError("an .sbs file is written for text decoders with a tied head only")
    if not config.is_classic:
        raise UnsupportedError("an .sbs file is written for Gemma 1 to 3 only, not for Gemma 3n and 4")
    numbers = {configs.preset(name): n for n, name in {**_MODELS, **_TEXT_ONLY}.items() if n > 2}
    texts = {configs.text_only(p): n for p, n in numbers.items() if isinstance(p, GemmaConfig)}
    context, windows = config.max_position_embeddings, [spec.window for spec in config.layers]
    traits = [int(config.transpose_gating_einsum), int(config.use_post_norms), 0, 0, 0, int(config.use_qk_norm)]
    unused = [0, 0, 0, 0, 0xFFFFFFFF]  # no value norm, experts or per-layer embeddings; keys shared with no layer
    layer = _record([D, 0, config.intermediate_size, N, config.num_key_value_heads, H, 0, 0, 0, *traits, *unused])
    generation = 3 if config.use_qk_norm else 2 if config.use_post_norms else 1
    caps = [_real(config.attn_logit_softcapping or 0.0), _real(config.final_logit_softcapping or 0.0)]
    turn_end = 106 if config.use_qk_norm else 107
    words = [generation, *_text(config.model_type), texts.get(config, _CUSTOM), 1]
    words += [next(n for n, title in TYPES.items() if title == weight)]
    words += [config.num_hidden_layers, D, config.vocab_size, context, 0, *caps, 0, 0]
    words += [_KEY_SIZE if scalar == H else _MODEL_BY_HEADS]
    words += [len(windows), *layer * len(windows)]
    words += [len(windows), *(window or context for window in windows)]
    words += [1, *_record([0, 0, 0, 14, 224, 0, 1]), 1]  # no image tower
    words += [1, turn_end, 0, int(config.use_qk_norm), _real(1.0), 0, 0]
    words += [_real(config.rope_local_base_freq or config.rope_theta), 0, 0, *map(_real, (1.0, 32.0, 1.0)), 20]
    words += [_real(1e-6), 0, 0, 0, _real(config.rope_theta)]
    return np.array(_record(words), np.uint32)
