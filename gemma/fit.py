# SPDX-License-Identifier: Apache-2.0
"""Memory arithmetic: what a model needs at a context length, and what this machine has. No model is opened or run.

Weights are counted tensor by tensor: in a float type, what `generate` loads (the text model, with the rows by which the
JAX package pads its table); in a packed type, what a GGUF file of it stores. Keys and values are counted as allocated,
sliding windows included: a local layer never holds more than its window. Activations are an upper estimate of the
prefill's working memory, by the formula in `_activations`. Python and a framework come on top: about 0.3 GB with JAX on
a CPU. The prompt's chunks and the rounding of the cache's length are stated here, and the engine takes them from here.
`gemma fit` and `gemma inspect` print these numbers; reading a checkpoint's own sizes is `checkpoint.py`'s.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from gemma import config as configs
from gemma import weights
from gemma.config import GemmaConfig, PaliGemmaConfig, T5GemmaConfig
from gemma.errors import ConfigError
from gemma.quants import QuantType

AnyConfig = GemmaConfig | PaliGemmaConfig | T5GemmaConfig

DTYPES = {"float32": QuantType.F32, "bfloat16": QuantType.BF16, "float16": QuantType.F16}
PREFILL_BUCKETS = (16, 64, 256, 512, 1024)  # a prompt is computed in chunks, padded to one of these
PREFILL_CHUNK = PREFILL_BUCKETS[-1]  # most tokens of a prompt that are computed at a time
_SMALLEST_CACHE = 512
# What llama.cpp stores instead where a row is not whole blocks of 256; and F16 where it is not blocks of 32 either.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes that a model needs while it generates."""

    weights: int
    cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations


@dataclasses.dataclass(frozen=True)
class Memory:
    """This machine's memory in bytes, as far as this process may use it.

    Attributes:
      total: of the machine, or the limit of the container or control group where that is lower.
      available: what can be taken now without swapping; file caches count as available.
      limited_by: "machine" or "control group".
    """

    total: int
    available: int
    limited_by: str = "machine"


def estimate(
    config: AnyConfig,
    context: int,
    *,
    weight_bytes: int | str | QuantType | None = None,
    cache_bytes_per_value: int = 2,
    batch: int = 1,
) -> Estimate:
    """Bytes needed to generate with a full context.

    Args:
      config: the model's configuration; presets are `gemma.config.preset(name)`.
      context: tokens per sequence, 1..max_position_embeddings. An encoder's input counts as long.
      weight_bytes: the size of the weights in bytes; or how they are held: a QuantType, its name ("Q4_K"), or
        "float32", "bfloat16", "float16". None: bfloat16. A packed type is for a backend that computes on packed
        weights; the JAX one unpacks them.
      cache_bytes_per_value: of one K or V value: 4 in float32, 2 in bfloat16.
      batch: sequences held at once.

    Raises:
      ConfigError: a context that the model was not made for, or an unknown type.
    """
    text = decoder(config)
    if not 1 <= context <= text.max_position_embeddings:
        raise ConfigError(
            f"context: expected 1..{text.max_position_embeddings} tokens, the length this model was made for, "
            f"got {context}"
        )
    if batch < 1:
        raise ConfigError(f"batch: expected at least 1 sequence, got {batch}")
    if not isinstance(weight_bytes, int):
        weight_bytes = stored_bytes(config, weight_bytes or "bfloat16")
    length = cache_bucket(context, text.max_position_embeddings)
    cache = 0 if text.use_bidirectional_attention else text.cache_bytes(length, cache_bytes_per_value)
    if isinstance(config, T5GemmaConfig):  # cross-attention: every decoder layer keeps the encoder's K and V
        cache += sum(2 * s.num_kv_heads * s.head_dim for s in text.layers) * length * cache_bytes_per_value
    return Estimate(weight_bytes, cache * batch, _activations(text, context) * batch)


def stored_bytes(config: AnyConfig, kind: str | QuantType) -> int:
    """Bytes of the text model's parameters, or of the whole model where it is no plain Gemma, tensor by tensor.

    A float type: as the JAX package holds them, its padded table included. A packed type: as a GGUF file stores them,
    every matrix in that type or in llama.cpp's substitute for rows that are not whole blocks, and norms in float32.
    """
    kind, config = quant_type(kind), loaded(config)
    if kind.is_float:
        padding = (config.table_rows - config.vocab_size) * config.hidden_size if isinstance(config, GemmaConfig) else 0
        return (config.num_parameters + max(padding, 0)) * kind.block_bytes
    return sum(_packed_bytes(tensor.shape, kind) for tensor in weights.tensors(config))


def loaded(config: AnyConfig) -> AnyConfig:
    """The part of a model that `generate` loads: a vision tower of Gemma 3 stays in the file."""
    return configs.text_only(config) if isinstance(config, GemmaConfig) else config


def cache_bucket(tokens: int, limit: int) -> int:
    """The length of a cache for `tokens`: a power of two, so that few programs are compiled; at most `limit`."""
    return min(max(1 << (tokens - 1).bit_length(), _SMALLEST_CACHE), limit)


def _packed_bytes(shape: tuple[int, ...], kind: QuantType) -> int:
    if len(shape) < 2:
        return 4 * math.prod(shape)
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if columns % kind.block_size:
        kind = QuantType[_FALLBACK.get(kind.name, "F16")]
        kind = QuantType.F16 if columns % kind.block_size else kind
    scales = 0 if not kind.has_scale else 4 if kind is QuantType.SFP8 else 4 * rows
    return rows * kind.row_bytes(columns) + scales


def quant_type(name: str | QuantType) -> QuantType:
    """The type of a name: a dtype ("bfloat16"), or a quantization type in any case ("q4_k")."""
    if isinstance(name, QuantType):
        return name
    found = DTYPES.get(name.lower()) or QuantType.__members__.get(name.upper())
    if found is None:
        raise ConfigError(f"unknown type {name!r}: expected one of {', '.join([*DTYPES, *QuantType.__members__])}")
    return found


def decoder(config: AnyConfig) -> GemmaConfig:
    """The part that generates text: it owns the cache and the context length."""
    if isinstance(config, PaliGemmaConfig):
        return config.text_config
    return config.decoder if isinstance(config, T5GemmaConfig) else config


def machine_memory(root: str | os.PathLike[str] = "/") -> Memory | None:
    """What this machine has; None where it cannot be told. `root` is where /proc and /sys are, for tests."""
    root = Path(root)
    lines = _read(root / "proc/meminfo").splitlines()
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if re.match(r"\w+:\s+\d+ kB", line)}
    if not {"MemTotal", "MemAvailable"} <= set(kilobytes):
        return _by_sysconf()
    total, available, by = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024, "machine"
    for limit, used in _group_limits(root):
        if limit < total:
            total, by = limit, "control group"
        available = min(available, max(0, limit - used))
    return Memory(total, min(available, total), by)


def parse_bytes(text: str) -> int:
    """ "16GB", "16G" and "1.5GiB" as bytes; G is 10**9, Gi is 2**30."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] == "i":
        raise ConfigError(f"expected an amount of memory such as 16GB or 12GiB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_context(text: str) -> int:
    """ "32768" and "32k" as tokens; k is 1024, as in the names of context lengths."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*(k?)\s*", text.lower())
    if not match or not int(match[1]):
        raise ConfigError(f"expected a number of tokens such as 4096 or 32k, got {text!r}")
    return int(match[1]) * (1024 if match[2] else 1)


def format_bytes(count: int) -> str:
    """ "1.07 GB": three digits, decimal units."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    digits = 0 if units[0] == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[0]}"


def _activations(text: GemmaConfig, context: int) -> int:
    """Bytes of working memory of one sequence, in float32, at its largest: the last chunk of a full context's prompt.

    Residual stream and its norms, queries, keys, values, attention output and the MLP's three tensors for a chunk, which
    is padded; the scores of one layer before and after the softmax, chunk by what the cache has room for and the chunk
    itself; logits and probabilities of one token.
    """
    chunk = next(size for size in PREFILL_BUCKETS if size >= min(context, PREFILL_CHUNK))
    length = cache_bucket(context, text.max_position_embeddings)
    layer = text.layers[0]
    heads = (2 * layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
    rows = chunk * (4 * text.hidden_size + heads + 3 * layer.mlp_size)
    keys = max(s.cache_length(length) for s in text.layers) + chunk
    return 4 * (rows + 2 * layer.num_heads * chunk * keys + 2 * text.vocab_size)


def _group_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) in bytes of each control group above this process that has a limit, versions 1 and 2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "")
        if controllers == "":
            top, limit, used, cached = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):  # inside a container the path may not exist: its top does
            group = top.joinpath(*parts[:depth])
            most, now = _read(group / limit).strip(), _read(group / used).strip()
            if most.isdigit() and now.isdigit():
                # Cached files are counted as used, but are given up when memory is asked for.
                stat = re.search(rf"^{cached} (\d+)$", _read(group / "memory.stat"), re.MULTILINE)
                yield int(most), int(now) - (int(stat[1]) if stat else 0)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):  # not this kind of system, or not for us to read
        return ""


def _by_sysconf() -> Memory | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return Memory(total, total)
