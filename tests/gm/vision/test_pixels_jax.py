# SPDX-License-Identifier: Apache-2.0
"""Pixels: the standardized pipeline against its steps, and what is refused. The plain one: tests/parity."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from gemma import gm
from gemma import image as host
from gemma.gm.vision import _preprocess


def photo(height=61, width=90, seed=0) -> np.ndarray:
    """Smooth colours with an edge, so that resizing has something to do."""
    y, x = np.mgrid[:height, :width] / 30
    rng = np.random.default_rng(seed)
    channels = [np.sin(a * x + b * y) + (x > 1.2) for a, b in rng.uniform(1, 4, (3, 2))]
    return np.clip(np.stack(channels, -1) * 60 + 110, 0, 255).astype(np.uint8)


def test_the_standardized_way():
    """JPEG round trip, JAX's resize without rounding, (x - 127.5) / 127.5 clipped."""
    ours = gm.vision.standardize_image(photo(), size=56, quality=90)
    pixels = jnp.asarray(host.jpeg_roundtrip(photo(), 90)).astype(jnp.float32)
    resized = jax.image.resize(pixels, (56, 56, 3), "bilinear", antialias=True)
    np.testing.assert_allclose(ours, np.clip((np.asarray(resized) - 127.5) / 127.5, -1, 1), rtol=0, atol=1e-6)
    plain = gm.vision.load_image(photo(), size=56)
    off = np.abs(ours - plain)
    assert 1e-3 < off.mean() < 0.05  # the same picture, another way
    np.testing.assert_allclose(  # without the round trip they differ by rounding to 8 bits, twice per direction
        gm.vision.standardize_image(photo(), size=56, quality=None), plain, rtol=0, atol=2.5 / 127.5
    )


def test_many_pictures(tmp_path):
    file = tmp_path / "picture.png"
    PIL.Image.fromarray(photo()).save(file)
    data = io.BytesIO()
    PIL.Image.fromarray(photo(40, 40)).convert("L").save(data, "PNG")
    out = gm.vision.load_images([file, data.getvalue(), photo(20, 70)], size=28)
    assert out.shape == (3, 28, 28, 3) and np.abs(out).max() <= 1
    np.testing.assert_array_equal(out[0], gm.vision.load_image(photo(), size=28))
    for bad in ("cat.png", [], b"abc"):
        with pytest.raises(ValueError, match="expected a list with at least one picture"):
            gm.vision.load_images(bad)
    with pytest.raises(ValueError, match=r"images\[1\]"):
        gm.vision.load_images([file, b"no picture"])
    with pytest.raises(ValueError, match="pixels"):
        gm.vision.load_images([file], max_pixels=100)


def test_prepare_on_the_device():
    shape = (56, 56, 3)
    batch = np.stack([photo(), photo(seed=1)])[None]
    out = jax.jit(lambda x: _preprocess.prepare(x, shape))(jnp.asarray(batch))
    assert out.shape == (1, 2, *shape) and out.dtype == jnp.float32
    alone = _preprocess.pre_process_image(jnp.asarray(batch[0, 1]), image_shape=shape)
    np.testing.assert_allclose(out[0, 1], alone, rtol=0, atol=1e-6)
    same = photo(56, 56)  # nothing to resize
    np.testing.assert_allclose(_preprocess.prepare(same, shape), host.normalize(same), rtol=0, atol=1e-6)
    prepared = np.asarray(out)
    np.testing.assert_array_equal(_preprocess.prepare(prepared, shape), prepared)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((56, 56), np.uint8), r"expected \[..., H, W, 3\], got \(56, 56\)"),
        (np.zeros((56, 56, 4), np.uint8), r"got \(56, 56, 4\)"),
        (np.zeros((0, 56, 3), np.uint8), r"got \(0, 56, 3\)"),
        (np.zeros((56, 56, 3), np.int32), "expected uint8 .* got int32"),
        (np.zeros((55, 56, 3), np.float32), r"prepared pixels of the shape \(56, 56, 3\)"),
        (np.full((56, 56, 3), 200.0), r"floats must be in -1\.\.1"),
        (np.full((56, 56, 3), np.nan, np.float32), r"floats must be in -1\.\.1"),
        (np.broadcast_to(np.uint8(0), (9000, 9000, 3)), "9000 x 9000 pixels are more than"),
    ],
)
def test_pixels_that_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        _preprocess.prepare(images, (56, 56, 3))


def test_patches():
    images = np.random.default_rng(0).normal(size=(2, 9, 6, 3)).astype(np.float32)
    out = _preprocess.patchify_images(jnp.asarray(images), patch_size=(2, 3))
    assert out.shape == (2, 4 * 2, 18)  # the ninth row is dropped
    for row, column in np.ndindex(4, 2):
        patch = images[:, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        np.testing.assert_array_equal(out[:, 2 * row + column], patch.reshape(2, 18))
    padded = _preprocess.patchify_images(jnp.asarray(images), patch_size=(2, 3), padding="SAME")
    assert padded.shape == (2, 5 * 2, 18)
    assert not np.asarray(padded).reshape(2, 10, 2, 3, 3)[:, 8:, 1].any()
    with pytest.raises(ValueError, match="padding"):
        _preprocess.patchify_images(jnp.asarray(images), patch_size=(2, 3), padding="FULL")
    with pytest.raises(ValueError, match="at least 10 x 10 pixels, got 9 x 6"):
        _preprocess.patchify_images(jnp.asarray(images), patch_size=(10, 10))
