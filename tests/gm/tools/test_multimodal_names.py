# SPDX-License-Identifier: Apache-2.0
"""`gemma.multimodal`: the names of the first published package, and its image pipeline against numpy and PIL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gemma import multimodal
from gemma.errors import PromptError
from gemma.gm.vision import _vision, _vision_utils
from gemma.image import jpeg_roundtrip

PIXELS = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)


def test_the_names_are_those_of_gm_vision():
    for module, home in ((multimodal.vision, _vision), (multimodal.vision_utils, _vision_utils)):
        for name in module.__all__:
            assert getattr(module, name) is getattr(home, name)
    assert multimodal.vision.TOKEN_PLACEHOLDER == -2 and multimodal.vision.BEGIN_IMAGE_TOKEN == 255999
    assert multimodal.vision.NUM_PLACEHOLDER_TOKENS_PER_IMAGE == 256 and multimodal.vision.NUM_TOKENS_PER_MEDIA == 260
    with pytest.raises(AttributeError, match="image, vision, vision_utils"):
        multimodal.audio  # noqa: B018


def test_pre_process_image_is_jpeg_resize_normalize():
    found = multimodal.image.pre_process_image(PIXELS, image_height=10, image_width=12)
    jpeg = jnp.asarray(jpeg_roundtrip(PIXELS, 95), jnp.float32)
    wanted = jax.image.resize(jpeg, (10, 12, 3), "bilinear", antialias=True) / 127.5 - 1
    assert found.shape == (10, 12, 3) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert multimodal.image.pre_process_image(PIXELS).shape == (896, 896, 3)


def test_patches_come_row_by_row_with_the_channel_last():
    images = np.arange(2 * 6 * 4 * 3, dtype=np.float32).reshape(1, 2, 6, 4, 3)
    found = multimodal.image.patchify_images(images, patch_size=2)
    assert found.shape == (1, 2, 6, 12)
    wanted = [images[0, 1, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].ravel() for r in range(3) for c in range(2)]
    np.testing.assert_array_equal(found[0, 1], wanted)
    assert multimodal.image.patchify_images(np.zeros((14 * 3, 14 * 2, 3), np.float32)).shape == (6, 14 * 14 * 3)


def test_files_become_patches(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    found = multimodal.image.load_image_files([[path, None]])
    assert found.shape == (1, 2, 4096, 588)
    wanted = multimodal.image.patchify_images(multimodal.image.pre_process_image(PIXELS))
    np.testing.assert_array_equal(found[0, 0], wanted)
    assert not np.asarray(found[0, 1]).any()
    for nothing in (None, [], [[None], [None]]):
        assert multimodal.image.load_image_files(nothing) is None
    with pytest.raises(PromptError, match=r"lists of one length, got \[1, 2\]"):
        multimodal.image.load_image_files([[path], [path, None]])
    with pytest.raises(PromptError, match=r"img_paths\[1\]\[0\] .*cannot be opened"):
        multimodal.image.load_image_files([[path], [tmp_path / "b.png"]])
