# SPDX-License-Identifier: Apache-2.0
"""PEFT's format of a LoRA adapter: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight      [r, in]
    base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight      [out, r]
    base_model.model.model.embed_tokens.lora_embedding_A                [r, V]        and _B [D, r]
    ....q_proj.lora_magnitude_vector                                    [out]         DoRA

Names of modules come from the weight table. What an adapter does is `adapters.py`; the GGUF format `_adapter_gguf.py`.
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gemma import weights
from gemma._atomic import atomic_folder
from gemma._hf_json import read_object
from gemma.adapters import CHECKSUM, AdapterFile, LowRank, describes, read_classification, says_chat
from gemma.checkpoint import open_checkpoint
from gemma.errors import CheckpointError, CheckpointNotFound, FormatError, UnsupportedError, WeightsMismatch
from gemma.formats.safetensors import write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\.weight)?")
# Settings under which the tensors would mean something else than what is computed here.
_UNREAD = (
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
)
_UNREAD += ("trainable_token_indices", "target_parameters", "use_bdlora", "arrow_config", "megatron_config")


def read(path: Path, config: Any) -> AdapterFile:
    """The adapter in a folder (or beside its safetensors file), bound to a model; see `adapters.open_adapter`."""
    folder = path if path.is_dir() else path.parent
    file = folder / WEIGHTS if path.is_dir() else path
    if not (folder / CONFIG).is_file():
        raise CheckpointNotFound(
            f"{path}: expected an adapter: a folder with {CONFIG} and {WEIGHTS}, or a GGUF adapter; there is no "
            f"{folder / CONFIG}"
        )
    if not file.is_file():
        other = " (adapter_model.bin is not read: save it again with safetensors)" if _bin(folder) else ""
        raise CheckpointNotFound(f"{file}: no such file{other}")
    settings = _Settings(folder / CONFIG)
    with open_checkpoint(file) as opened:
        parts = _grouped(opened.tensors, file, config)
        tensors = {}
        for name, found in parts.items():
            arrays = {part: np.array(opened.read(key)) for part, (key, _) in found.items()}
            module = next(iter(found.values()))[1]
            tensors[name] = _low_rank(arrays, module, settings, file, name)
        head = _head(opened, config, settings, file)
        checksum, chat = str(opened.metadata.get(CHECKSUM, "")), says_chat(opened.metadata)
        classification = read_classification(opened.metadata, file)
    tied = settings.flag("ensure_weight_tying") or "embed" not in tensors
    if head is not None:
        own = tensors.get("embed")
        if own is None or not _same_change(own, head):
            raise UnsupportedError(
                f"{file}: changes the output head apart from the embedding, which is the same table here"
            )
        tied = True
    return AdapterFile(
        tensors,
        use_rslora=settings.flag("use_rslora"),
        dropout=settings.number("lora_dropout", 0.0),
        tied=tied,
        base_model=settings.text("base_model_name_or_path"),
        base_checksum=checksum,
        path=path,
        chat=chat,
        classification=classification,
    )


def _bin(folder: Path) -> bool:
    return (folder / "adapter_model.bin").is_file()


class _Settings:
    """adapter_config.json, checked."""

    def __init__(self, path: Path):
        self.path, self._values = path, read_object(path)
        if self._values.get("peft_type") != "LORA":
            raise UnsupportedError(f"{path}: peft_type: expected LORA, got {self._values.get('peft_type')!r}")
        bias = self._values.get("bias", "none")
        for key in _UNREAD:
            if self._values.get(key):
                raise UnsupportedError(f"{path}: {key} is {self._values[key]!r:.80}; adapters with it are not read")
        if bias != "none":
            raise UnsupportedError(f"{path}: bias: expected 'none', got {bias!r}: trained biases are not read")

    def flag(self, key: str) -> bool:
        value = self._values.get(key) or False
        if not isinstance(value, bool):
            raise FormatError(self.path, None, f"{key}: expected true or false, got {value!r:.80}")
        return value

    def text(self, key: str) -> str:
        value = self._values.get(key)
        return value if isinstance(value, str) else ""

    def number(self, key: str, default: float | None = None) -> float:
        return self._checked(key, self._values.get(key, default))

    def _checked(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise FormatError(self.path, None, f"{key}: expected a number, got {value!r:.80}")
        return value

    def of(self, module: str, key: str, default: str) -> float:
        """A number for one module: that of the first pattern that means it, or the one for all."""
        patterns = self._values.get(key) or {}
        if not isinstance(patterns, dict):
            raise FormatError(self.path, None, f"{key}: expected an object, got {patterns!r:.80}")
        for pattern, value in patterns.items():
            if len(pattern) > 512:
                raise FormatError(self.path, None, f"{key}: a pattern of {len(pattern)} characters")
            try:
                found = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error as error:
                raise FormatError(self.path, None, f"{key}: {pattern!r}: not a regular expression ({error})") from None
            if found:
                return self._checked(f"{key}[{pattern!r}]", value)
        return self.number(default)


def _grouped(names: Iterable[str], file: Path, config: Any) -> dict[str, dict[str, tuple[str, str]]]:
    """Canonical name to {part: (key in the file, module)}; the output head of a tied model is left out."""
    modules = _modules(config)
    found: dict[str, dict[str, tuple[str, str]]] = {}
    unexpected = []
    for key in names:
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        module = match["module"] if match else ""
        if module in modules:
            found.setdefault(modules[module].name, {})[match["part"]] = (key, module)
        elif module not in _heads(config):
            unexpected.append(key)
    if unexpected:
        hint = "the adapter belongs to another model (or to its vision tower, and this is the text model alone)"
        raise WeightsMismatch(file, unexpected=unexpected, hint=hint)
    return found


def _modules(config: Any) -> dict[str, weights.Tensor]:
    """Name of a module, under any root that Hugging Face's classes use, to the tensor that is its weight."""
    found = {}
    for tensor in weights.tensors(config):
        for name in weights.names(tensor, "hf", config):
            if len(tensor.shape) == 2 and name.endswith(".weight"):
                found.setdefault(name.removesuffix(".weight"), tensor)
    return found


def _heads(config: Any) -> set[str]:
    return {name.removesuffix(".weight") for name in weights.tied_copies(config, "hf")}


def _low_rank(parts: Mapping[str, np.ndarray], module: str, settings: _Settings, file: Path, name: str) -> LowRank:
    kind = "lora_embedding_" if "lora_embedding_A" in parts or "lora_embedding_B" in parts else "lora_"
    missing = [f"{module}.{kind}{part}" for part in "AB" if kind + part not in parts]
    if missing:
        raise WeightsMismatch(file, missing=missing)
    a, b = parts[f"{kind}A"], parts[f"{kind}B"]
    if kind == "lora_embedding_":
        a, b = b.T, a.T
    rank = settings.of(module, "rank_pattern", "r")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] != rank or rank < 1:
        raise CheckpointError(
            f"{file}: {module}: expected factors of rank {rank} (from {settings.path.name}), got {a.shape} and {b.shape}"
        )
    alpha = settings.of(module, "alpha_pattern", "lora_alpha")
    scale = alpha / (math.sqrt(rank) if settings.flag("use_rslora") else rank)
    magnitude = parts.get("lora_magnitude_vector")
    if settings.flag("use_dora") != (magnitude is not None):
        raise CheckpointError(f"{file}: {module}: use_dora and a lora_magnitude_vector come together; one is missing")
    if kind == "lora_embedding_" and magnitude is not None:
        raise UnsupportedError(f"{file}: {module}: DoRA of an embedding is not read")
    return LowRank(a, b, float(scale), None if magnitude is None else magnitude.reshape(-1))


def _head(opened: Any, config: Any, settings: _Settings, file: Path) -> LowRank | None:
    """The change of a tied head, which PEFT may store beside that of the embedding."""
    for key in opened.tensors:
        match = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if match and match["module"] in _heads(config) and match["part"] == "lora_A":
            arrays = {part: np.array(opened.read(key.replace("lora_A", part))) for part in ("lora_A", "lora_B")}
            return _low_rank(arrays, match["module"], settings, file, "head")
    return None


def _same_change(one: LowRank, other: LowRank) -> bool:
    return one.scale == other.scale and np.array_equal(one.a, other.a) and np.array_equal(one.b, other.b)


def write(path: Path, adapter: AdapterFile, config: Any, table: Mapping[str, weights.Tensor], *, replace: bool) -> None:
    """Writes the folder; see `adapters.save_adapter_file`."""
    arrays: dict[str, np.ndarray] = {}
    modules: dict[str, LowRank] = {}
    for name, low in adapter.tensors.items():
        full = table[name].slots["hf"].name if "hf" in table[name].slots else ""
        if not full.endswith(".weight") or len(table[name].shape) != 2:
            raise UnsupportedError(f"{name}: Hugging Face's model has no module for it, so PEFT cannot adapt it")
        module = full.removesuffix(".weight")
        modules[module] = low
        key = f"{_PREFIX}{module}."
        if table[name].part == "embed":
            arrays |= {f"{key}lora_embedding_A": low.b.T, f"{key}lora_embedding_B": low.a.T}
            continue
        arrays |= {f"{key}lora_A.weight": low.a, f"{key}lora_B.weight": low.b}
        if low.magnitude is not None:
            arrays[f"{key}lora_magnitude_vector"] = low.magnitude
    metadata = {"format": "pt"} | ({CHECKSUM: adapter.base_checksum} if adapter.base_checksum else {})
    metadata |= describes(adapter)
    settings = json.dumps(_config(adapter, modules, config), indent=2, sort_keys=True)
    with atomic_folder(path, replace=replace, manifest=False) as folder:
        (folder / CONFIG).write_text(settings + "\n", encoding="utf-8")
        write_safetensors(folder / WEIGHTS, {key: np.ascontiguousarray(a) for key, a in arrays.items()}, metadata)


def _config(adapter: AdapterFile, modules: Mapping[str, LowRank], config: Any) -> dict[str, Any]:
    def alpha(low: LowRank) -> float:
        value = low.scale * (math.sqrt(low.rank) if adapter.use_rslora else low.rank)
        whole = round(value)  # 3 / sqrt(3) * sqrt(3) is not exactly 3
        return whole if abs(value - whole) < 1e-12 * max(1, abs(value)) else value

    rank = collections.Counter(low.rank for low in modules.values()).most_common(1)[0][0]
    common = collections.Counter(map(alpha, modules.values())).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_model or None,
        "r": rank,
        "lora_alpha": common,
        "lora_dropout": adapter.dropout,
        "target_modules": _targets(modules, config),
        "rank_pattern": {re.escape(name): low.rank for name, low in modules.items() if low.rank != rank},
        "alpha_pattern": {re.escape(name): alpha(low) for name, low in modules.items() if alpha(low) != common},
        "use_rslora": adapter.use_rslora,
        "use_dora": adapter.use_dora,
        "ensure_weight_tying": adapter.tied and any(name.endswith("embed_tokens") for name in modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _targets(modules: Mapping[str, LowRank], config: Any) -> list[str]:
    """Short names where all modules of that name are adapted, whole paths of the others."""
    every = [t.slots["hf"].name for t in weights.tensors(config) if "hf" in t.slots and len(t.shape) == 2]
    every = [name.removesuffix(".weight") for name in every if name.endswith(".weight")]
    targets = set()
    for module in modules:
        short = module.rpartition(".")[2]
        alike = [name for name in every if name.rpartition(".")[2] == short]
        targets.add(short if all(name in modules for name in alike) else module)
    return sorted(targets)
