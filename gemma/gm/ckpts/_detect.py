# SPDX-License-Identifier: Apache-2.0
"""Which model a parameter tree is, from its names and shapes.

A published model whose tensors are these is found by `weights.identify`. Otherwise the sizes are read off the table's
axes: enough to say what is missing or wrong in the tree, not enough to run it, since windows and rotary bases leave no
trace in shapes. Quantized and adapted trees are seen through `plain_name`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from gemma import config as configs
from gemma import weights
from gemma.config import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig, T5GemmaConfig
from gemma.errors import CheckpointError, ConfigError, WeightsMismatch
from gemma.weights._axes import parse

AnyConfig = GemmaConfig | PaliGemmaConfig | T5GemmaConfig
Shapes = Mapping[str, tuple[int, ...]]

_LAYER = re.compile(r"layer_(\d{1,5})/")
_BLOCK = re.compile(r"encoderblock_(\d{1,5})/")
_WRAPPED = re.compile(r"_(?:SimulateQuantized|Int)Einsum_(0|gating_einsum|linear)/kernel")
_SIDES = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True)
class Detected:
    """A configuration and where it is from.

    Attributes:
      config: None if the tree is not a model of the table.
      source: "given" by the caller, "saved" with the tree, a "preset" of exactly these shapes, only the "shapes" (then
        windows, rotary bases and caps are unknown), or "none".
    """

    config: AnyConfig | None
    source: Literal["given", "saved", "preset", "shapes", "none"]

    def require(self, path: Path) -> AnyConfig:
        """The configuration, if it is good enough to run the model."""
        if self.config is None or self.source == "shapes":
            found = (
                "its tensors are not those of a Gemma" if self.config is None else "its sizes are those of no preset"
            )
            raise ConfigError(
                f"{path}: no configuration was saved with these parameters, and {found}: pass config=, or save them "
                f"with gm.ckpts.save_params(..., config=)"
            )
        return self.config


def plain_name(name: str) -> str | None:
    """The name of the float weight that a leaf is or wraps; None for what is no weight: adapters, scales."""
    parts = name.split("/")
    if "lora" in parts:
        return None
    if len(parts) > 1 and parts[-1] == "scale" and re.fullmatch(r"_IntEinsum_\w+", parts[-2]):
        return None
    wrapped = _WRAPPED.fullmatch("/".join(parts[-2:]))
    if wrapped is None:
        return name
    return "/".join((*parts[:-2], "w" if wrapped[1] == "0" else wrapped[1]))


def plain_shapes(shapes: Shapes, where: object) -> dict[str, tuple[int, ...]]:
    """The weights of a tree under the names of the float tree."""
    plain: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        found = plain_name(name)
        if found is not None and found in plain:
            raise CheckpointError(f"{where}: {name} and another leaf are both the weight {found}; expected one of them")
        if found is not None:
            plain[found] = shape
    return plain


def detect(shapes: Shapes) -> Detected:
    """Finds the model that has these leaves.

    Args:
      shapes: slash name in the NESTED tree to shape.
    """
    shapes = plain_shapes(shapes, "the tree")
    if not _looks_like_gemma(shapes):
        return Detected(None, "none")
    with contextlib.suppress(ConfigError):  # no preset: sizes are enough for a check
        return Detected(weights.identify(shapes, format="flax", path="the tree"), "preset")
    config = _from_shapes(shapes)
    return Detected(config, "none" if config is None else "shapes")


def check(shapes: Shapes, detected: Detected, path: Path, *, text_only: bool) -> None:
    """Compares a tree with what its model must have; every difference in one error.

    A tree of no known model passes as it is: Gemma 3n and a user's own trees have no rows in the table.

    Raises:
      WeightsMismatch: leaves are missing, unexpected or of the wrong shape.
    """
    plain = plain_shapes(shapes, path)
    if detected.config is None:
        if _looks_like_gemma(plain) and not _is_other_member(plain):
            need = [name for name in _names_of_top() if name not in plain]
            raise WeightsMismatch(path, missing=need, hint="not enough is left of this tree to say which model it is")
        return
    if isinstance(detected.config, PaliGemmaConfig):
        raise ConfigError(f"{path}: a PaliGemma has no parameter tree in JAX; expected a GemmaConfig or T5GemmaConfig")
    config = _as_stored(detected.config, plain)
    weights.bind(plain, config, format="flax", path=path, text_only=text_only)


def _as_stored(config: AnyConfig, plain: Shapes) -> AnyConfig:
    """A tree of Gemma 3 may have been saved without its vision tower; none of it must be there then."""
    if not isinstance(config, GemmaConfig) or config.vision is None:
        return config
    vision = {t.slots["flax"].name for t in weights.tensors(config) if t.part in ("vision", "mm")}
    return config if vision & set(plain) else configs.text_only(config)


@functools.cache
def _names_of_top() -> tuple[str, ...]:
    """The leaves outside the layers that every decoder has: the embedding first."""
    probe = _probe(post=False, qk=False, mha=False, transposed=False, vision=False)
    return tuple(t.slots["flax"].name for t in weights.tensors(probe) if "." not in t.name)


def _looks_like_gemma(shapes: Iterable[str]) -> bool:
    tops = {name.split("/")[0] for name in shapes}
    known = {name.split("/")[0] for name in _names_of_top()} | set(_SIDES)
    return bool(tops & known) or any(re.fullmatch(r"layer_\d+", top) for top in tops)


def _is_other_member(shapes: Iterable[str]) -> bool:
    """Whether the tree has parts that only newer members have, such as the extra streams of Gemma 3n."""
    return any(re.search(r"(^|/)(altup|laurel|per_layer|skip_scale|eoi_embedding)", name) for name in shapes)


# ---- sizes from shapes -------------------------------------------------------------------------------------------------


def _probe(post: bool, qk: bool, mha: bool, transposed: bool, vision: bool) -> GemmaConfig:
    """A model of one layer with given traits: its rows in the table say which axis of which leaf is which size."""
    tower = SiglipVisionConfig(8, 8, 1, 2, 3, 4, 2) if vision else None
    return GemmaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2 if mha else 1,
        head_dim=2,
        use_post_norms=post,
        use_qk_norm=qk,
        transpose_gating_einsum=transposed,
        vision=tower,
    )


def _probes() -> Iterator[GemmaConfig]:
    for post, qk in ((False, False), (True, False), (True, True)):
        for rest in itertools.product((False, True), repeat=3):
            yield _probe(post, qk, *rest)


def _from_shapes(shapes: Shapes) -> GemmaConfig | T5GemmaConfig | None:
    """A configuration of the sizes that the leaves show; None if they do not show them."""
    if all(any(name.startswith(f"{side}/") for name in shapes) for side in _SIDES):
        sides = [_decoder({n.split("/", 1)[1]: s for n, s in shapes.items() if n.startswith(f"{p}/")}) for p in _SIDES]
        shared = any(name.startswith("embedder/") for name in shapes)  # a T5Gemma 2: two decoders without a table
        return None if shared or None in sides else T5GemmaConfig(*sides)
    return _decoder(shapes)


def _decoder(shapes: Shapes) -> GemmaConfig | None:
    first = {name: shape for name, shape in shapes.items() if _number(_LAYER, name) == _number(_BLOCK, name) == 0}
    best, sizes, score = None, {}, -math.inf
    for probe in _probes():
        found, fit = _fit(probe, first)
        if fit > score:
            best, sizes, score = probe, found, fit
    if best is None or not set("DFNKH") <= set(sizes):
        return None
    try:
        return _config(best, sizes, shapes)
    except ConfigError:
        return None


def _number(pattern: re.Pattern[str], name: str) -> int:
    match = pattern.search(name)
    return int(match[1]) if match else 0


def _fit(probe: GemmaConfig, first: Shapes) -> tuple[dict[str, int], float]:
    """The length of each axis letter by majority of the leaves, and how well the leaves agree with it."""
    slots = {t.slots["flax"].name: t.slots["flax"] for t in weights.tensors(probe)}
    axes = {name: parse(slot.axes) for name, slot in slots.items()}  # of the part that is one tensor
    parts = {name: first.get(name, ())[len(slot.index) :] for name, slot in slots.items()}
    votes: dict[str, list[int]] = {}
    for name, part in parts.items():
        if len(part) == len(axes[name]):
            for letters, size in zip(axes[name], part, strict=True):
                for letter in letters:
                    votes.setdefault(letter, []).append(size)
    sizes = {letter: max(set(found), key=found.count) for letter, found in votes.items()}
    agree = sum(
        parts[name] == tuple(sizes.get(letters[0], -1) if letters else 1 for letters in axes[name]) for name in slots
    )
    surplus = sum(name not in slots for name in first)
    return sizes, 2 * agree - len(slots) - surplus


def _config(probe: GemmaConfig, sizes: dict[str, int], shapes: Shapes) -> GemmaConfig:
    """The probe with these sizes. One that no leaf shows is that of a missing leaf, which is reported by its name."""
    tower = None
    if probe.vision is not None and "E" in sizes:
        patch, heads = sizes.get("Y", 1), sizes.get("A", 1)
        tower = SiglipVisionConfig(
            hidden_size=sizes["E"],
            intermediate_size=sizes.get("M", 1),
            num_hidden_layers=1 + max(_number(_BLOCK, name) for name in shapes),
            num_attention_heads=heads,
            num_channels=sizes.get("C", 3),
            image_size=math.isqrt(sizes.get("P", 1)) * patch,
            patch_size=patch,
        )
    return dataclasses.replace(
        probe,
        vocab_size=sizes.get("V", 1),
        hidden_size=sizes["D"],
        intermediate_size=sizes["F"],
        num_hidden_layers=1 + max(_number(_LAYER, name) for name in shapes),
        num_attention_heads=sizes["N"],
        num_key_value_heads=sizes["K"],
        head_dim=sizes["H"],
        vision=tower,
    )
