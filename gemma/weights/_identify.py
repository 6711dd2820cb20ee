# SPDX-License-Identifier: Apache-2.0
"""Which preset a checkpoint is, by its names and shapes alone, for formats that carry no configuration.

A configuration beside the file is always better: shapes do not show windows, caps or how positions are scaled, so only
the published models are recognized. Comparing with one known configuration is `_bind.py`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Mapping

from gemma import config as configs
from gemma.config import GemmaConfig
from gemma.errors import ConfigError, WeightsMismatch
from gemma.weights._bind import bind
from gemma.weights._table import AnyConfig, check_format, tensors


def identify(
    names_to_shapes: Mapping[str, tuple[int, ...]],
    *,
    format: str,
    path: str | os.PathLike[str],
    sizes_only: bool = False,
) -> AnyConfig:
    """The published model whose tensors these are.

    Args:
      names_to_shapes: of every array in the checkpoint.
      format: its column of the table.
      path: for the error.
      sizes_only: the format knows how many values a tensor has, not its axes; shapes are (count,).

    Raises:
      ConfigError: none of the presets fits; says how to state the configuration.
    """
    check_format(format)
    found = [config for config in _candidates() if _fits(names_to_shapes, config, format, sizes_only)]
    if len(found) == 1:
        return found[0]
    what = "no published model" if not found else f"{len(found)} published models"
    raise ConfigError(
        f"{path}: {what} has exactly these {len(names_to_shapes)} tensors; put the model's config.json beside the file"
    )


def _candidates() -> Iterator[AnyConfig]:
    for config in configs.PRESETS.values():
        yield config
        if isinstance(config, GemmaConfig) and config.vision is not None:
            yield configs.text_only(config)


def _fits(shapes: Mapping[str, tuple[int, ...]], config: AnyConfig, format: str, sizes_only: bool) -> bool:
    table = [tensor for tensor in tensors(config) if format in tensor.slots]
    if not table or len({tensor.slots[format].name for tensor in table}) > len(shapes):
        return False
    if sizes_only:
        shapes = shaped(shapes, config, format)
    elif not _sizes(config, format) <= {tuple(shape) for shape in shapes.values()}:
        return False
    try:
        bind(shapes, config, format=format, path="")
    except WeightsMismatch:
        return False
    return True


@functools.cache
def _sizes(config: AnyConfig, format: str) -> frozenset[tuple[int, ...]]:
    """The shapes that a model must have, whatever its arrays are called: a quick look before they are bound.

    A vocabulary may have more rows than the table says.
    """
    slots = (tensor.slots[format] for tensor in tensors(config) if format in tensor.slots and tensor.axes[0] != "V")
    return frozenset(tuple(slot.shape) for slot in slots)


def shaped(shapes: Mapping[str, tuple[int, ...]], config: AnyConfig, format: str) -> dict[str, tuple[int, ...]]:
    """The same names with the axes that the table gives them, where the number of values agrees."""
    known = {
        tensor.slots[format].name: tensor.slots[format].shape for tensor in tensors(config) if format in tensor.slots
    }
    result = {}
    for name, shape in shapes.items():
        wanted, count = known.get(name), math.prod(shape)
        if wanted is not None and name in _tables(config, format) and count % wanted[-1] == 0:
            wanted = (count // wanted[-1], wanted[-1])  # rows of a vocabulary may be padded
        result[name] = wanted if wanted is not None and math.prod(wanted) == count else shape
    return result


def _tables(config: AnyConfig, format: str) -> set[str]:
    return {t.slots[format].name for t in tensors(config) if t.axes[0] == "V" and format in t.slots}
