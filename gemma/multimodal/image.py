# SPDX-License-Identifier: Apache-2.0
"""The standardized image pipeline: JPEG round trip, resize, normalize, patches.

Reading is `gemma/image.py`, pixels and patches are `gm/vision/_preprocess.py`; only the calls of the first published
package are here. The plain pipeline, without JPEG, is `gm.vision.load_image`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from gemma import image as _pixels
from gemma.config import preset
from gemma.errors import PromptError
from gemma.gm.typing import Array, Float, UInt8
from gemma.gm.vision import _preprocess
from gemma.gm.vision._preprocess import normalize_images

_VISION = preset("gemma3_4b").vision  # every published model has this tower

__all__ = ["load_image_files", "normalize_images", "patchify_images", "pre_process_image"]


def pre_process_image(
    image: UInt8[np.ndarray, "H W C"],
    *,
    image_height: int = _VISION.image_size,
    image_width: int = _VISION.image_size,
    quality: int = 95,
) -> Float[Array, "h w C"]:
    """Encodes to JPEG and decodes again, resizes (bilinear, antialiased) and normalizes to -1..1.

    The codec is PIL's: single pixels may differ by some levels from another's.

    Args:
      image: anything that `gemma.image.read_image` takes.
      image_height, image_width: size of the result in pixels.
      quality: of the JPEG, 1..100.

    Raises:
      PromptError: (a ValueError) it is no picture.
    """
    pixels = _pixels.jpeg_roundtrip(_pixels.read_image(image), quality)
    return _preprocess.pre_process_image(pixels, image_shape=(image_height, image_width, pixels.shape[-1]))


def patchify_images(
    images: Float[Array, "*B H W C"], patch_size: int = _VISION.patch_size, padding: str = "VALID"
) -> Float[Array, "*B P D"]:
    """Cuts images into square patches, row by row; D = patch_size * patch_size * C."""
    images = jnp.asarray(images)
    flat = images.reshape(-1, *images.shape[-3:])
    patches = _preprocess.patchify_images(flat, patch_size=(patch_size, patch_size), padding=padding)
    return patches.reshape(*images.shape[:-3], *patches.shape[1:])


def load_image_files(
    img_paths: Sequence[Sequence[_pixels.ImageSource | None]] | None, patch_size: int = _VISION.patch_size
) -> Float[Array, "B S P D"] | None:
    """The patches of a batch of picture lists.

    Args:
      img_paths: [B][S] paths, or anything else that holds a picture; the lists must be equally long. None stands for no
        picture and gives patches of zeros.
      patch_size: side of a patch in pixels.

    Returns:
      Patches, or None where there is no picture at all.

    Raises:
      PromptError: (a ValueError) lists of different lengths, or a picture cannot be read.
    """
    rows = [list(row) for row in img_paths or ()]
    if all(source is None for row in rows for source in row):
        return None
    if len({len(row) for row in rows}) != 1:
        raise PromptError(
            f"img_paths: expected lists of one length, got {[len(row) for row in rows]}; fill up with None"
        )
    out = [
        [_patches(source, patch_size, f"img_paths[{b}][{s}]") for s, source in enumerate(row)]
        for b, row in enumerate(rows)
    ]
    empty = jnp.zeros_like(next(patches for row in out for patches in row if patches is not None))
    return jnp.stack([jnp.stack([empty if patches is None else patches for patches in row]) for row in out])


def _patches(source, patch_size: int, name: str):
    if source is None:
        return None
    return patchify_images(pre_process_image(_pixels.read_image(source, name=name)), patch_size)
