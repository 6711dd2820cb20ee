# SPDX-License-Identifier: Apache-2.0
"""The pictures of a call: whose they are, read and brought to the size of the tower, one list per prompt.

Files are read by `gemma/image.py`, pixels prepared by `gm/vision`, and vectors made of them by the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma import image as pictures
from gemma.errors import PromptError
from gemma.gm.typing import Float
from gemma.gm.vision import _preprocess


def prepare(images: Any, rows: int, *, single: bool, model: Any) -> list[list[Float[np.ndarray, "H W C"]]]:
    """By prompt, its pictures as float32 pixels in -1..1 of the tower's size.

    Args:
      images: None; for one prompt a picture or several; for a batch one entry per prompt: a picture, several, or None.
        A picture is what `gemma.image.read_image` takes, or float pixels that are prepared already. Arrays may stack
        them: [H, W, C] or [N, H, W, C] for one prompt, [B, H, W, C] or [B, N, H, W, C] for a batch.
      rows: number of prompts.
      single: whether one prompt was given, and not a list of one.
      model: the network; its encoder says the size.

    Raises:
      PromptError: the model takes no images, their number of entries is not that of the prompts, or one cannot be read.
    """
    if images is None:
        return [[] for _ in range(rows)]
    encoder = model.config.vision_encoder
    if encoder is None:
        reason = " The model was created with `text_only=True`." if getattr(model, "text_only", False) else ""
        raise PromptError(
            f"The model '{type(model).__name__}' does not have vision encoder, yet images are provided.{reason}"
        )
    entries = [images] if single else _entries(images)
    if len(entries) != rows:
        raise PromptError(
            f"images: expected one entry per prompt, {rows} in all (None where a prompt has no image), got {len(entries)}"
        )
    shape = tuple(encoder.image_shape)
    return [
        [
            _pixels(source, shape, f"images[{i}]" if single else f"images[{b}][{i}]")
            for i, source in enumerate(_several(entry))
        ]
        for b, entry in enumerate(entries)
    ]


def _entries(images: Any) -> list[Any]:
    if isinstance(images, (list, tuple)) or (_is_array(images) and images.ndim >= 4):
        return list(images)
    raise PromptError(f"images: for several prompts expected a list or an array of one entry each, got {type(images)}")


def _several(entry: Any) -> Sequence[Any]:
    """The pictures of one prompt."""
    if entry is None:
        return []
    if isinstance(entry, (list, tuple)) or (_is_array(entry) and entry.ndim == 4):
        return list(entry)
    return [entry]


def _pixels(source: Any, shape: tuple[int, int, int], name: str) -> Float[np.ndarray, "H W C"]:
    if _is_array(source) and np.issubdtype(np.asarray(source).dtype, np.floating):
        source = np.asarray(source)  # prepared pixels: checked, not changed
    else:
        source = pictures.read_image(np.asarray(source) if _is_array(source) else source, name=name)
    return np.asarray(_preprocess.prepare(source, shape))


def _is_array(value: Any) -> bool:
    return hasattr(value, "ndim") and hasattr(value, "dtype")
