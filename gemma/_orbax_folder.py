# SPDX-License-Identifier: Apache-2.0
"""Recognizes an Orbax folder by what it contains, and reads and writes the configuration that gemmakit keeps beside one.

No array is read here and no JAX is loaded: the tree and its values are `gemma/gm/ckpts/_orbax.py`'s.

    folder/                        folder/                a step of the kauldron trainer: the tree is in `default`
      _METADATA                      _CHECKPOINT_METADATA
      manifest.ocdbt  d/ ...         default/_METADATA ...
      gemma_config.json
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from gemma._hf_json import parse_object
from gemma.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig, T5Gemma2Config, T5GemmaConfig
from gemma.errors import CheckpointError, ConfigError, FormatError

METADATA = "_METADATA"
STEP_METADATA = "_CHECKPOINT_METADATA"
OCDBT_MANIFEST = "manifest.ocdbt"
ITEM = "default"
SIDECAR = "gemma_config.json"
_AGGREGATE = "checkpoint"  # what Orbax wrote before it had `_METADATA`
_FORMAT, _VERSION, _LIMIT = "gemma-config", 1, 1 << 20
_CLASSES = {c.__name__: c for c in (GemmaConfig, PaliGemmaConfig, T5GemmaConfig, T5Gemma2Config)}


def item_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder that holds the tree of an Orbax checkpoint: `path` itself or its item `default`; None if it is none."""
    path = Path(path)
    if not os.path.isdir(path):
        return None
    for folder in (path, path / ITEM):
        if (folder / METADATA).is_file() or (folder / OCDBT_MANIFEST).is_file():
            return folder
    return None


def is_orbax(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder that Orbax wrote, readable or not."""
    if item_folder(path) is not None:
        return True
    return os.path.isdir(path) and any(os.path.isfile(os.path.join(path, n)) for n in (STEP_METADATA, _AGGREGATE))


def read_sidecar(folder: Path) -> GemmaConfig | PaliGemmaConfig | T5GemmaConfig | None:
    """The configuration that was saved with a tree; None if none was.

    Raises:
      FormatError: the file is damaged, or holds a configuration that no model can have.
    """
    path = folder / SIDECAR
    try:
        with open(path, "rb") as file:
            raw = file.read(_LIMIT + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); pass the configuration yourself") from None
    if len(raw) > _LIMIT:
        raise FormatError(path, _LIMIT, f"expected a configuration of at most {_LIMIT} bytes")
    values = parse_object(raw, path)
    name, fields = values.get("class"), values.get("fields")
    if values.get("format") != _FORMAT or values.get("version") != _VERSION:
        raise FormatError(path, 0, f"expected format {_FORMAT!r}, version {_VERSION}")
    if name not in _CLASSES or not isinstance(fields, dict):
        raise FormatError(path, 0, f"class: expected one of {', '.join(_CLASSES)}, with fields; got {str(name)[:80]!r}")
    try:
        return _CLASSES[name].from_dict(_decoders(fields))
    except ConfigError as error:
        raise FormatError(path, None, str(error)) from None
    except TypeError as error:  # a value of a type that comparisons do not take
        raise FormatError(path, None, f"{name}: {error}") from None


def _decoders(fields: dict[str, Any]) -> dict[str, Any]:
    """Builds what the configuration classes do not build from a dictionary themselves."""
    built = dict(fields)
    if isinstance(built.get("vision"), dict):
        built["vision"] = SiglipVisionConfig.from_dict(built["vision"])
    for side in ("encoder", "decoder", "text_config"):
        if isinstance(built.get(side), dict):
            built[side] = GemmaConfig.from_dict(_decoders(built[side]))
    return built


def write_sidecar(folder: Path, config: GemmaConfig | PaliGemmaConfig | T5GemmaConfig) -> None:
    """Keeps a configuration beside a tree that is being saved."""
    values = dict(format=_FORMAT, version=_VERSION) | {"class": type(config).__name__}
    values["fields"] = dataclasses.asdict(config)
    (folder / SIDECAR).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
