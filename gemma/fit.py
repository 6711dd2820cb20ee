# SPDX-License-Identifier: Apache-2.0
"""Memory arithmetic: what a model needs at a context length, and what this machine has. No model is opened or run.

Weights and cache are exact (sliding windows included: a local layer never holds more than its window). Activations are
an upper estimate of the prefill's working memory, by the formula in `_activations`. Python and a framework come on top:
about 0.3 GB with JAX on a CPU. `gemma fit` and `gemma inspect` print these numbers; reading a checkpoint's own sizes is
`checkpoint.py`'s.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from gemma.config import GemmaConfig, PaliGemmaConfig, T5GemmaConfig
from gemma.errors import ConfigError
from gemma.quants import QuantType

AnyConfig = GemmaConfig | PaliGemmaConfig | T5GemmaConfig

DTYPES = {"float32": QuantType.F32, "bfloat16": QuantType.BF16, "float16": QuantType.F16}
PREFILL_CHUNK = 512  # tokens of a prompt that are computed at a time

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
      weight_bytes: the size of the weights in bytes; or how they are stored: a QuantType, its name ("Q4_K"), or
        "float32", "bfloat16", "float16". None: bfloat16.
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
    cache = 0 if text.use_bidirectional_attention else text.cache_bytes(context, cache_bytes_per_value)
    if isinstance(config, T5GemmaConfig):  # cross-attention: every decoder layer keeps the encoder's K and V
        cache += sum(2 * s.num_kv_heads * s.head_dim for s in text.layers) * context * cache_bytes_per_value
    return Estimate(weight_bytes, cache * batch, _activations(text, context) * batch)


def stored_bytes(config: AnyConfig, kind: str | QuantType) -> int:
    """Bytes of all parameters in one type. Norms, under 0.1 % of a model, are counted like the matrices."""
    kind = quant_type(kind)
    return -(-config.num_parameters * kind.block_bytes // kind.block_size)


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

    Residual stream and its norms, queries, keys, values, attention output and the MLP's three tensors for a chunk; the
    scores of one layer before and after the softmax, chunk by context; logits and probabilities of one token.
    """
    chunk = min(context, PREFILL_CHUNK)
    layer = text.layers[0]
    heads = (2 * layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
    rows = chunk * (4 * text.hidden_size + heads + 3 * layer.mlp_size)
    keys = max(min(context, s.cache_length(context) + chunk) for s in text.layers)
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
