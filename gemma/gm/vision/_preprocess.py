# SPDX-License-Identifier: Apache-2.0
"""Pixels on the device: resize, normalize, cut into patches. Pure functions that may be jitted.

The host's pipeline (files, JPEG round trip, Hugging Face's resizing) is `_image.py`; its result, float32 pixels in
-1..1, is taken here as it is.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import PromptError, ShapeError
from gemma.gm.typing import Array, Float, UInt8

MIDDLE = 127.5  # of 0..255; also half the range
_SLACK = 1e-3  # rounding of whoever normalized


def prepare(
    images: UInt8[Array, "*B H W C"] | Float[Array, "*B H W C"], image_shape: tuple[int, int, int]
) -> Float[Array, "*B H W C"]:
    """Pictures of any size to what the tower sees: uint8 is resized and normalized, floats are checked.

    Args:
      images: uint8, any H and W up to `gemma.image.MAX_PIXELS`; or floats in -1..1 of the tower's size.
      image_shape: (H, W, C) of the tower.

    Returns:
      float32 pixels in -1..1.

    Raises:
      ShapeError: (a ValueError) another dtype, number of channels or (for floats) size.
      PromptError: (a ValueError) too many pixels, or floats out of range (not noticed under jit).
    """
    if not isinstance(images, (np.ndarray, jax.Array)):
        images = np.asarray(images)
    shape, dtype = tuple(images.shape), images.dtype
    if len(shape) < 3 or shape[-1] != image_shape[-1] or 0 in shape:
        raise ShapeError(f"images: expected [..., H, W, {image_shape[-1]}], got {shape}")
    if dtype == np.uint8:
        from gemma.image import MAX_PIXELS

        if shape[-3] * shape[-2] > MAX_PIXELS:
            raise PromptError(
                f"images: {shape[-3]} x {shape[-2]} pixels are more than the {MAX_PIXELS} that a picture may have"
            )
        return pre_process_image(images, image_shape=image_shape)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ShapeError(f"images: expected uint8 (0..255), or floats in -1..1, got {dtype}")
    if shape[-3:] != tuple(image_shape):
        raise ShapeError(
            f"images: floats are taken as prepared pixels of the shape {tuple(image_shape)}, got {shape[-3:]}; pass "
            f"uint8 pictures of any size, or use gm.vision.load_images"
        )
    images = jnp.asarray(images)
    if not isinstance(images, jax.core.Tracer):
        with jax.ensure_compile_time_eval():  # known pictures inside of a program that is being traced
            inside = bool(jnp.all(jnp.abs(images) <= 1 + _SLACK))  # NaN is refused
        if not inside:
            raise PromptError("images: floats must be in -1..1 (normalized); for 0..255 pass uint8")
    return images.astype(jnp.float32)


def pre_process_image(
    image: UInt8[Array, "*B H W C"] | Float[Array, "*B H W C"], *, image_shape: tuple[int, int, int]
) -> Float[Array, "*B H W C"]:
    """Resizes (bilinear, antialiased, the aspect ratio is not kept) and normalizes pixels of 0..255 to -1..1."""
    image = jnp.asarray(image).astype(jnp.float32)
    shape = (*image.shape[:-3], *image_shape)
    if image.shape != shape:
        image = jax.image.resize(image, shape, method="bilinear", antialias=True)
    return jnp.clip(normalize_images(image), -1.0, 1.0)


def normalize_images(images: Float[Array, "*B H W C"]) -> Float[Array, "*B H W C"]:
    """Pixels of 0..255 to -1..1, in float32."""
    return (jnp.asarray(images).astype(jnp.float32) - MIDDLE) / MIDDLE


_normalize_images = normalize_images  # the official name


def patchify_images(
    images: Float[Array, "B H W C"], *, patch_size: tuple[int, int], padding: str = "VALID"
) -> Float[Array, "B P D"]:
    """Cuts images into patches, row by row.

    Args:
      images: pixels.
      patch_size: (Y, X) in pixels.
      padding: "VALID" drops what is left at the right and at the bottom, "SAME" pads it with zeros, half on each side.

    Returns:
      One row per patch, with D = Y * X * C numbers in the order (row, column, channel).
    """
    if padding not in ("VALID", "SAME"):
        raise ShapeError(f'padding: expected "VALID" or "SAME", got {padding!r}')
    B, H, W, C = images.shape
    Y, X = patch_size
    if padding == "SAME":
        more = [-H % Y, -W % X]
        images = jnp.pad(images, ((0, 0), *((n // 2, n - n // 2) for n in more), (0, 0)))
    rows, columns = images.shape[1] // Y, images.shape[2] // X
    if not rows or not columns:
        raise ShapeError(f"images: expected at least {Y} x {X} pixels, got {H} x {W}")
    images = images[:, : rows * Y, : columns * X].reshape(B, rows, Y, columns, X, C)
    return images.transpose(0, 1, 3, 2, 4, 5).reshape(B, rows * columns, Y * X * C)
