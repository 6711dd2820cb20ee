# SPDX-License-Identifier: Apache-2.0
"""The host's pipeline from pictures to the pixels that the tower sees. numpy and PIL; the device's is `_preprocess.py`.

Two ways, both to float32 [size, size, 3] in -1..1, the aspect ratio not kept:

    plain          resize (bilinear, antialiased, rounded to uint8), normalize            Hugging Face's Gemma 3 processor
    standardized   JPEG round trip, resize as the JAX package does (not rounded), normalize      the training pipeline

Reading, bounds, colour modes and EXIF are `gemma/image.py`, for both.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma import image as _pixels
from gemma.config import preset
from gemma.errors import PromptError
from gemma.gm.typing import Float
from gemma.gm.vision import _preprocess

_SIZE = preset("gemma3_4b").vision.image_size


def load_image(
    source: _pixels.ImageSource,
    *,
    size: int = _SIZE,
    method: str = "bilinear",
    max_pixels: int = _pixels.MAX_PIXELS,
    name: str = "image",
) -> Float[np.ndarray, "H W C"]:
    """The plain way: one picture as Hugging Face's processor prepares it.

    Args:
      source: a path, bytes, an open file, a PIL image or an array.
      size: side of the result in pixels.
      method: "bilinear" (Gemma 3), "bicubic" (SigLIP, PaliGemma) or "lanczos".
      max_pixels: larger pictures are refused before they are decoded.
      name: what to call the picture in an error.

    Raises:
      PromptError: (a ValueError) it cannot be used.
    """
    pixels = _pixels.read_image(source, max_pixels=max_pixels, name=name)
    return _pixels.normalize(_pixels.resize(pixels, size, size, method=method))


def standardize_image(
    source: _pixels.ImageSource,
    *,
    size: int = _SIZE,
    quality: int | None = 95,
    max_pixels: int = _pixels.MAX_PIXELS,
    name: str = "image",
) -> Float[np.ndarray, "H W C"]:
    """The standardized way: JPEG round trip, then what the JAX package does to pixels.

    Args:
      source: as for `load_image`.
      size: side of the result in pixels.
      quality: of the JPEG, 1..100; None: no round trip.
      max_pixels: larger pictures are refused before they are decoded.
      name: what to call the picture in an error.

    Raises:
      PromptError: (a ValueError) it cannot be used.
    """
    pixels = _pixels.read_image(source, max_pixels=max_pixels, name=name)
    if quality is not None:
        pixels = _pixels.jpeg_roundtrip(pixels, quality)
    return np.asarray(_preprocess.pre_process_image(pixels, image_shape=(size, size, pixels.shape[-1])))


def load_images(
    sources: Sequence[_pixels.ImageSource],
    *,
    size: int = _SIZE,
    standardize: bool = False,
    max_pixels: int = _pixels.MAX_PIXELS,
) -> Float[np.ndarray, "I H W C"]:
    """Several pictures of any sizes as one array, for `images=` of a model.

    Args:
      sources: the pictures; see `load_image`.
      size: side of each result in pixels.
      standardize: the standardized way and not the plain one.
      max_pixels: larger pictures are refused before they are decoded.

    Raises:
      PromptError: (a ValueError) one of them cannot be used; the message counts from `images[0]`.
    """
    if isinstance(sources, (str, bytes)) or not isinstance(sources, Sequence) or not sources:
        raise PromptError(f"images: expected a list with at least one picture, got {type(sources).__name__}")
    prepare = standardize_image if standardize else load_image
    return np.stack(
        [prepare(source, size=size, max_pixels=max_pixels, name=f"images[{i}]") for i, source in enumerate(sources)]
    )
