# SPDX-License-Identifier: Apache-2.0
"""Reads and writes the `config.json` of every generation, in the old spelling (`rope_theta`) and the new
(`rope_parameters`); every key is accounted for, and an unknown one is refused.

The sizes themselves are in `config.py`; the metadata of a GGUF is read by `formats/gguf_config.py`; no weights here.
The parts are `_hf_json.py` (bounded parsing), `_hf_read.py` and `_hf_write.py`, and `_hf_newer.py` for Gemma 3n and 4.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from gemma import _hf_newer as newer
from gemma import _hf_write as write
from gemma._hf_json import Section, read_object
from gemma._hf_read import IGNORED, OWN_FIELDS, read_paligemma
from gemma._hf_read import READERS as CLASSIC
from gemma._hf_t5gemma2 import read_t5gemma2, write_t5gemma2
from gemma.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig, T5Gemma2Config, T5GemmaConfig
from gemma.errors import ConfigError

READERS = CLASSIC | newer.READERS
AnyConfig = GemmaConfig | PaliGemmaConfig | T5GemmaConfig | SiglipVisionConfig


def read_config(source: str | os.PathLike[str] | Mapping[str, Any], *, paligemma_window: bool = False) -> AnyConfig:
    """Reads a configuration.

    Args:
      source: a `config.json`, the folder that holds one, or its parsed dictionary.
      paligemma_window: keep the sliding window of a PaliGemma 2 decoder. The models were trained without one, so the
        default drops it; transformers applies it (4096 tokens) on every second layer.

    Returns:
      A GemmaConfig (text models, Gemma 3 with images, EmbeddingGemma, the decoder of a Gemma 3n or 4),
      PaliGemmaConfig, T5GemmaConfig, or SiglipVisionConfig for a stand-alone tower. EmbeddingGemma's `sliding_window` is
      the published 512, also from a file in which transformers left its own 257. A query scalar equal to `head_dim`
      reads as None.

    Raises:
      ConfigError: a key is unknown, or a value missing, of the wrong type or out of range.
      FormatError: the file is no bounded JSON object.
      CheckpointNotFound: there is no such file.
    """
    if isinstance(source, Mapping):
        top = Section(source, "config.json")
    else:
        path = os.path.join(source, "config.json") if os.path.isdir(source) else os.fspath(source)
        top = Section(read_object(path), path)
    kind = top.take("model_type")
    if kind == "paligemma":
        config: AnyConfig = read_paligemma(top, paligemma_window)
    elif kind == "t5gemma2":
        config = read_t5gemma2(top)
    elif isinstance(kind, str) and kind in READERS:
        config = READERS[kind](top, kind)
    else:
        known = ", ".join([*READERS, "paligemma", "t5gemma2"])
        raise top.error("model_type", f"expected one of {known}, got {str(kind)[:80]!r}")
    top.finish(IGNORED)
    return config


def write_config(config: AnyConfig) -> dict[str, Any]:
    """The `config.json` of a configuration, as a dictionary ready for `json.dump`.

    transformers 5 accepts it, and `read_config` of it equals `config` (of a PaliGemma 2 with local layers, with
    `paligemma_window=True`). What config.json has no word for, such as the padded row count of the JAX table, stands
    under the key "gemmakit" where it does not follow from the rest.

    Raises:
      ConfigError: no class of transformers can express the configuration.
    """
    writers = {
        GemmaConfig: lambda config: write.write_gemma(config) if config.is_classic else newer.write_newer(config),
        PaliGemmaConfig: write.write_paligemma,
        T5GemmaConfig: write.write_t5gemma,
        T5Gemma2Config: write_t5gemma2,
        SiglipVisionConfig: write.write_vision,
    }
    if type(config) not in writers:
        raise ConfigError(f"expected one of {', '.join(c.__name__ for c in writers)}, got {type(config).__name__}")
    values = writers[type(config)](config)
    for names in _DECODERS.get(type(config), ()):
        mine, theirs, section = config, _reread(values, config), values
        for name in names:
            mine, theirs = getattr(mine, name), getattr(theirs, name)
        for name in names or (("text_config",) if "text_config" in values else ()):
            section = section[name]
        section = section.get("text_config", section) if names == ("encoder",) else section
        if mine.layers != theirs.layers:  # our own key may not carry what others would compute without
            raise _inexpressible(".".join(names), _differences(mine, theirs))
        differ = {f for f in OWN_FIELDS if getattr(mine, f) != getattr(theirs, f)}
        write.add_own(section, {f: getattr(mine, f) for f in OWN_FIELDS if f in differ})
    again = _reread(values, config)
    if again != config:
        raise _inexpressible("", _differences(config, again))
    return values


def _inexpressible(place: str, fields: list[str]) -> ConfigError:
    where = f"{place}: " if place else ""
    return ConfigError(f"{where}no class of transformers computes this: config.json cannot express {', '.join(fields)}")


# The decoders of each kind of configuration, by the attributes that lead to them.
_DECODERS: dict[type, tuple[tuple[str, ...], ...]] = {
    GemmaConfig: ((),),
    PaliGemmaConfig: (("text_config",),),
    T5GemmaConfig: (("encoder",), ("decoder",)),
    T5Gemma2Config: (("encoder",), ("decoder",)),
}


def _reread(values: dict[str, Any], config: AnyConfig) -> AnyConfig:
    local = isinstance(config, PaliGemmaConfig) and config.text_config.sliding_window is not None
    return read_config(values, paligemma_window=local)


def _differences(one: Any, other: Any, place: str = "") -> list[str]:
    found = []
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if a == b:
            continue
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            found += _differences(a, b, f"{place}{field.name}.")
        else:
            found.append(f"{place}{field.name} ({a!r}, not {b!r})")
    return found
