# SPDX-License-Identifier: Apache-2.0
"""Binds the names and shapes of a checkpoint to the tensors of a configuration, strictly: everything is accounted for.

The names come from `_rows.py`, the expected shapes from `_table.py`. Nothing is read here: values are the business of
the reader, which learns from the returned slots what to take, and which copies of tied tensors to compare.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping

from gemma.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig, T5Gemma2Config, T5GemmaConfig
from gemma.errors import WeightsMismatch
from gemma.weights import _rows as rows
from gemma.weights import _rows_newer as newer_rows
from gemma.weights._table import AnyConfig, Slot, Tensor, check_format, family, roots, tensors


def bind(
    names_to_shapes: Mapping[str, tuple[int, ...]],
    config: AnyConfig,
    *,
    format: str,
    path: str | os.PathLike[str],
    text_only: bool = False,
) -> dict[str, tuple[Slot, ...]]:
    """Finds each tensor of a model among the names of a checkpoint.

    Args:
      names_to_shapes: of every array in the checkpoint, row-major.
      config: the model that it should be.
      format: "hf" (any of Hugging Face's prefixes), "flax", "gguf", "ckpt", "npz" or "sbs".
      path: of the checkpoint, for the error.
      text_only: leave the image tensors out, whether or not the file or the configuration has them.

    Returns:
      Canonical name to places, in the order of `tensors(config)`. The first place is the one to read; any more are
      copies (`copy=True`) of a tied head, which must hold equal values. `Slot.name` and `Slot.shape` are the file's: a
      vocabulary table may have either of the two published row counts.

    Raises:
      WeightsMismatch: with every missing, unexpected and misshaped name, and a hint if they look like another model.
    """
    check_format(format)
    table = [t for t in tensors(config) if not (text_only and t.part in ("vision", "mm"))]
    homeless = [f"{t.name} (has no name in the format {format})" for t in table if format not in t.slots]
    renamed = _rename(table, names_to_shapes, config, format)
    found, missing, misshaped, used = {}, [], [], set()
    for tensor in table:
        slot = renamed.get(tensor.name)
        if slot is None:
            continue
        got = names_to_shapes.get(slot.name)
        if got is None:
            missing.append(slot.name)
            continue
        used.add(slot.name)
        got = tuple(int(n) for n in got)
        if got != slot.shape and not (tensor.axes[0] == "V" and _rows_differ(got, slot.shape, config)):
            misshaped.append(f"{slot.name}: expected {slot.shape}, got {got}")
        found[tensor.name] = (dataclasses.replace(slot, shape=got),)
    for name, tied in _copies(config, format).items():
        if tied in found and name in names_to_shapes:
            first, used = found[tied][0], used | {name}
            if tuple(names_to_shapes[name]) != first.shape:
                misshaped.append(
                    f"{name}: expected {first.shape} (a copy of {first.name}), got {names_to_shapes[name]}"
                )
            found[tied] += (dataclasses.replace(first, name=name, copy=True),)
    passed = _passed_over(names_to_shapes, config, format)
    unexpected = [n for n in names_to_shapes if n not in used | passed and not _ignored(n, format, text_only)]
    missing = list(dict.fromkeys(missing))
    if missing or homeless or unexpected or misshaped:
        hint = _hint(names_to_shapes, config, format, bool(homeless))
        misshaped = dict.fromkeys(misshaped)
        raise WeightsMismatch(path, missing=missing + homeless, unexpected=unexpected, misshaped=misshaped, hint=hint)
    return found


def _rename(
    table: Iterable[Tensor], names: Mapping[str, tuple[int, ...]], config: AnyConfig, format: str
) -> dict[str, Slot]:
    """The slots of the table with the roots that this file uses: the ones under which most names are there."""
    groups: dict[tuple[str, ...], list[Tensor]] = {}
    for tensor in table:
        if format in tensor.slots:
            groups.setdefault(roots(family(config, tensor.name), format, tensor.part), []).append(tensor)
    renamed = {}
    for choices, members in groups.items():
        tails = {t.name: t.slots[format].name.removeprefix(choices[0]) for t in members}
        hits = [sum(root + tail in names for tail in tails.values()) for root in choices]
        root = choices[hits.index(max(hits))]
        for tensor in members:
            renamed[tensor.name] = dataclasses.replace(tensor.slots[format], name=root + tails[tensor.name])
    return renamed


def _rows_differ(got: tuple[int, ...], expected: tuple[int, ...], config: AnyConfig) -> bool:
    """True if only the vocabulary rows differ, and both counts are published ones of this model."""
    if isinstance(config, PaliGemmaConfig):
        allowed = {config.text_config.vocab_size, config.text_config.table_rows}
    elif isinstance(config, T5GemmaConfig):
        allowed = {side.vocab_size for side in (config.encoder, config.decoder)}
        allowed |= {side.table_rows for side in (config.encoder, config.decoder)}
    else:
        allowed = {config.vocab_size, config.table_rows}
    return len(got) == 2 and got[1:] == expected[1:] and got[0] in allowed


def _copies(config: AnyConfig, format: str) -> Mapping[str, str]:
    """Names that may hold a copy, to the canonical tensor that they copy."""
    if isinstance(config, T5Gemma2Config):
        return rows.SHARED.get(format, {}) if config.decoder.tie_word_embeddings else {}
    return dict.fromkeys(rows.TIED_COPIES.get(format, ()), _tied(config))


def _tied(config: AnyConfig) -> str:
    """The canonical tensor that a tied head copies; "" where there is no head or it has weights of its own."""
    if isinstance(config, SiglipVisionConfig):
        return ""
    if isinstance(config, T5GemmaConfig):
        return "decoder.embed" if config.decoder.tie_word_embeddings else ""
    text = config.text_config if isinstance(config, PaliGemmaConfig) else config
    return "embed" if text.tie_word_embeddings else ""


def _ignored(name: str, format: str, text_only: bool) -> bool:
    if text_only and re.fullmatch(rows.VISION_NAMES.get(format, "$^"), name):
        return True
    return any(re.fullmatch(pattern, name) for pattern in rows.IGNORED.get(format, ()))


def _passed_over(names: Iterable[str], config: AnyConfig, format: str) -> set[str]:
    """What a file of Gemma 3n or 4 may hold besides the text model: towers, and keys and values that nobody uses."""
    if not isinstance(config, GemmaConfig) or config.is_classic:
        return set()
    shared = {str(spec.index) for spec in config.layers if spec.shares_kv}
    towers, keys = newer_rows.NOT_READ.get(format, ()), newer_rows.SHARED_KV.get(format, "$^")
    found = {name for name in names for match in [re.fullmatch(keys, name)] if match is not None and match[1] in shared}
    return found | {name for name in names if any(re.fullmatch(pattern, name) for pattern in towers)}


# What gives a generation away in any format: the newest sign that is there decides.
_SIGNS = (
    ("T5Gemma 2", r"eoi_embedding"),
    ("T5Gemma", r"cross_attn"),
    ("Gemma 3n or 4", r"altup|laurel|per_layer_|skip_scale|layer_scalar"),
    ("Gemma 3", r"q_norm|_query_norm|query_norm"),
    ("Gemma 2", r"post_feedforward_layernorm|post_ffw_norm|post_ff_ns"),
    ("Gemma 1", r"mlp|ffn_|gating|linear_w"),
)
_LAYER = re.compile(r"(?:^|[./])(?:layers\.|layer_|blk\.)(\d+)[./]")


def _hint(names: Iterable[str], config: AnyConfig, format: str, homeless: bool) -> str:
    names = list(names)
    if homeless:
        return f"a file of the format {format} holds the text model only: pass text_only=True to read just that"
    text = [name for name in names if not re.fullmatch(rows.VISION_NAMES.get(format, "$^"), name)]
    if isinstance(config, SiglipVisionConfig) or not text:
        return ""
    looks = next((who for who, sign in _SIGNS if any(re.search(sign, name) for name in text)), "")
    wanted = _generation(config)
    if looks and looks != wanted:
        return f"hint: these tensors look like {looks}, but the configuration is of {wanted}"
    if isinstance(config, GemmaConfig) and config.vision is None and len(text) < len(names):
        return "hint: the file also holds an image tower: pass text_only=True, or a configuration with `vision`"
    side = config.decoder if isinstance(config, T5GemmaConfig) else getattr(config, "text_config", config)
    numbers = [int(found[1]) for found in map(_LAYER.search, text) if found and len(found[1]) < 5]
    if numbers and max(numbers) + 1 != side.num_hidden_layers:
        return f"hint: the file has {max(numbers) + 1} layers, the configuration {side.num_hidden_layers}"
    return ""


def _generation(config: AnyConfig) -> str:
    if isinstance(config, T5GemmaConfig):
        return "T5Gemma 2" if isinstance(config, T5Gemma2Config) else "T5Gemma"
    text = config.text_config if isinstance(config, PaliGemmaConfig) else config
    if isinstance(text, GemmaConfig) and not text.is_classic:
        return "Gemma 3n or 4"
    return "Gemma 3" if text.use_qk_norm else "Gemma 2" if text.use_post_norms else "Gemma 1"
