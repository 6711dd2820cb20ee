# SPDX-License-Identifier: Apache-2.0
"""What the settings of a fine-tuning run may be: words, ranges, which go together. `finetuning.py` has the settings."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from gemma._quants_mixes import mix, recipe
from gemma.errors import ConfigError

if TYPE_CHECKING:
    from gemma.finetuning import RunConfig

METHODS: Mapping[str, str] = {
    "lora": "small matrices beside frozen weights learn from examples",
    "qlora": "the same over weights that stay packed in a few bits",
    "full": "every weight learns",
    "dpo": "learns from pairs of a better and a worse answer",
    "orpo": "pairs, without a reference model",
    "simpo": "pairs, by the mean log-probability of a token",
    "kto": "answers that are marked good or bad",
    "qat": "every weight learns on the grid of the quantized file to come",
    "classification": "one word out of a few for each text",
}
TUNES = ("lora", "qlora", "full")
EXPORTS = ("adapter", "adapter-gguf", "merged", "gguf", "quantized")
TRUNCATE = ("error", "drop", "right", "left", "turns", "split", "auto")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
PREFERENCES = ("sigmoid", "hinge", "ipo", "npo")
SHARDINGS = ("none", "data", "fsdp", "tensor")
DTYPES = ("auto", "float32", "bfloat16")
_QAT = ("q4_0", "int4", "int8", "sfp8")
FLOATS = ("float32", "bfloat16", "float16")


def converted(name: str, kind: Any, value: Any) -> Any:
    """A value as its field wants it; a word stands for a list of one word."""
    text = str(kind)
    if value is None and "None" in text:
        return None
    if name in ("columns", "labels"):
        return _pairs(name, value)
    if "tuple" in text:
        parts = (value,) if isinstance(value, (str, os.PathLike)) else value
        if not isinstance(parts, (list, tuple)) or not all(isinstance(p, (str, os.PathLike, int)) for p in parts):
            raise ConfigError(f"{name}: expected a list of words, got {value!r:.80}")
        return tuple(str(part) for part in parts)
    if "bool" in text:
        if not isinstance(value, bool):
            raise ConfigError(f"{name}: expected true or false, got {value!r:.80}")
        return value
    if "float" in text or "int" in text:
        return _number(name, value, whole="float" not in text)
    if not isinstance(value, (str, os.PathLike)):
        raise ConfigError(f"{name}: expected a word or path, got {value!r:.80}")
    return str(value)


def _pairs(name: str, value: Any) -> tuple[tuple[str, str], ...]:
    """Pairs of words out of a mapping, pairs, "a=b", or, for labels, words that stand for themselves."""
    found = []
    for part in [value] if isinstance(value, str) else value.items() if isinstance(value, Mapping) else value or ():
        if isinstance(part, (str, int)):
            first, equals, second = str(part).partition("=")
            part = (first, second if equals else first if name == "labels" else None)
        if not isinstance(part, (list, tuple)) or len(part) != 2 or any(isinstance(p, (dict, list)) for p in part):
            raise ConfigError(f"{name}: expected names with a value each, got {part!r:.80}")
        if None in part:
            raise ConfigError(f"{name}: expected name=value, got {part[0]!r:.80}")
        found.append((str(part[0]), str(part[1])))
    return tuple(found)


def _number(name: str, value: Any, whole: bool) -> float | int:
    if isinstance(value, str):  # YAML reads 2e-4, without a dot, as text
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{name}: expected a number, got {value[:80]!r}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name}: expected a number, got {value!r:.80}")
    if whole and value != int(value):
        raise ConfigError(f"{name}: expected a whole number, got {value!r}")
    return int(value) if whole else float(value)


def check_words(run: RunConfig) -> None:
    _one_of("method", run.method, tuple(METHODS))
    _one_of("tune", run.tune, (None, *TUNES))
    _one_of("truncate", run.truncate, TRUNCATE)
    _one_of("sample_by", run.sample_by, ("line", "paragraph", "document"))
    _one_of("schedule", run.schedule, SCHEDULES)
    _one_of("preference", run.preference, PREFERENCES)
    _one_of("dtype", run.dtype, DTYPES)
    _one_of("remat", run.remat, ("none", "block", "dots"))
    _one_of("sharding", run.sharding, SHARDINGS)
    _one_of("merged_dtype", run.merged_dtype, FLOATS)
    for name in run.export or ():
        _one_of("export", name, EXPORTS)
    for name in run.gguf or ():
        _known("gguf", mix, name)
    if run.quantize not in (None, "keep"):
        _known("quantize", recipe, run.quantize)


def _known(field: str, find: Callable[[str], Any], name: str) -> None:
    try:
        find(name)
    except ConfigError as error:
        raise ConfigError(f"{field}: {str(error).partition(': ')[2] or error}") from error


def _one_of(name: str, value: Any, valid: tuple[Any, ...]) -> None:
    if value not in valid:
        words = [word for word in valid if word is not None]
        near = difflib.get_close_matches(str(value), words, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name}: expected one of {', '.join(words)}, got {str(value)[:80]!r}{meant}")


# Field to its lowest and highest value.
_RANGES: Mapping[str, tuple[float, float]] = {
    "eval_split": (0, 0.5),
    "limit": (1, 2**40),
    "max_length": (2, 2**20),
    "batch_size": (1, 2**16),
    "accumulate": (1, 2**16),
    "epochs": (1e-6, 1e6),
    "steps": (1, 2**40),
    "learning_rate": (0, 10),
    "warmup_steps": (0, 2**40),
    "weight_decay": (0, 10),
    "clip_norm": (1e-12, 1e12),
    "ema": (0, 0.999999999),
    "rank": (1, 2**14),
    "alpha": (1e-6, 1e6),
    "dropout": (0, 0.99),
    "beta": (0, 1000),
    "label_smoothing": (0, 0.5),
    "gamma": (0, 1000),
    "tensor": (1, 2**12),
    "seed": (0, 2**31 - 1),
    "eval_every": (1, 2**40),
    "early_stop": (1, 2**40),
    "log_every": (1, 2**40),
    "save_every": (1, 2**40),
    "keep": (1, 2**20),
}


def check_numbers(run: RunConfig) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(run, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{name}: expected a number in {low:g}..{high:g}, got {value!r}")


def check_combinations(run: RunConfig) -> None:
    if not run.data:
        raise ConfigError("data: expected at least one file of examples")
    fixed = {"lora": "lora", "qlora": "qlora", "full": "full", "qat": "full"}.get(run.method)
    if run.tune is not None and fixed is not None and run.tune != fixed:
        raise ConfigError(
            f"tune: the method {run.method} trains {fixed}, got {run.tune!r}; tune goes with dpo and others"
        )
    if run.tuned == "full":
        if run.adapter is not None:
            raise ConfigError(
                f"adapter: {run.method} trains the weights themselves; expected tune: lora, or no adapter"
            )
        if any(name.startswith("adapter") for name in run.export or ()):
            raise ConfigError(f"export: {run.method} makes no adapter; expected merged or gguf")
    if run.quantize is not None:
        if run.method == "qat":
            _one_of("quantize", run.quantize, _QAT)
        elif run.tuned != "qlora":
            raise ConfigError(f"quantize: is for qlora and qat; {run.method} ({run.tuned}) computes on floats")
    if "quantized" in (run.export or ()) and run.method != "qat":
        raise ConfigError(f"export: quantized is the file that qat trains for; {run.method} can export gguf")
    if (run.labels or run.template) and run.method != "classification":
        raise ConfigError(f"labels, template: are for the method classification, not {run.method}")
    if run.eval_data and run.eval_split:
        raise ConfigError("eval_split: expected either eval_data or eval_split, got both")
    if run.early_stop is not None and not (run.eval_data or run.eval_split):
        raise ConfigError("early_stop: needs eval_data or eval_split, whose loss it watches")
    if run.tensor > 1 and run.sharding != "tensor":
        raise ConfigError(f"tensor: {run.tensor} devices for one product need sharding: tensor, got {run.sharding!r}")
