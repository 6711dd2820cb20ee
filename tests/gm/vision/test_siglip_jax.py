# SPDX-License-Identifier: Apache-2.0
"""The tower: memory of its attention, pooling, stacked layers, sizes. That it is right is shown in tests/parity."""

from __future__ import annotations

import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma import gm, testing
from gemma.config import PRESETS, SiglipVisionConfig, preset
from gemma.gm.vision import _vision, _vision_utils

SMALL = SiglipVisionConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
)


def random_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape).astype(leaf.dtype)), shapes)


def numpy_attention(q, k, v):
    scores = np.einsum("bpau,bsau->baps", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("baps,bsau->bpau", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("bound", [2**24, 100, 1], ids=["whole", "3 rows", "1 row"])
def test_attention_in_blocks(bound, monkeypatch):
    """7 queries of 16 keys, 2 heads: 32 weights a query. Blocks that do not divide 7, too; and gradients."""
    monkeypatch.setattr(_vision_utils, "SCORES_AT_ONCE", bound)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 2, 5)).astype(np.float32) for n in (7, 16, 16))
    out = jax.jit(_vision_utils.attend)(q, k, v)
    np.testing.assert_allclose(out, numpy_attention(q, k, v), rtol=0, atol=1e-6)
    slope = jax.jit(jax.grad(lambda q: _vision_utils.attend(q, k, v).sum()))(q)
    step = 1e-3 * np.eye(5, dtype=np.float32)[2]
    moved = numpy_attention(q + step, k, v).sum() - numpy_attention(q - step, k, v).sum()
    np.testing.assert_allclose(slope[..., 2].sum(), moved / 2e-3, rtol=1e-2, atol=1e-3)


def test_memory_at_full_size():
    """One layer of So400m at 896 pixels, two images: the weights alone would be 2 GiB, and as much for their softmax."""
    config = preset("gemma3_4b").vision
    tower = _vision_utils.ViTModel.of(config, depth=1)
    pictures = jax.ShapeDtypeStruct((2, 896, 896, 3), jnp.float32)
    params = jax.eval_shape(tower.init, jax.random.key(0), pictures)
    program = jax.jit(tower.apply).lower(params, pictures).compile(dict(xla_backend_optimization_level=0))
    assert program.memory_analysis().temp_size_in_bytes < 2**29


def test_stacked_layers_are_the_same_tower():
    plain, stacked = (_vision_utils.ViTModel.of(SMALL, scan=scan) for scan in (False, True))
    pictures = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 28, 28, 3)), jnp.float32)
    params = random_like(jax.eval_shape(plain.init, jax.random.key(0), pictures))["params"]
    blocks = [params["Transformer"][f"encoderblock_{i}"] for i in range(2)]
    joined = {
        "encoderblock": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks),
        "encoder_norm": params["Transformer"]["encoder_norm"],
    }
    shapes = jax.eval_shape(stacked.init, jax.random.key(0), pictures)["params"]["Transformer"]
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(lambda a: a.shape, joined)
    there = jax.jit(plain.apply)({"params": params}, pictures)
    here = jax.jit(stacked.apply)({"params": params | {"Transformer": joined}}, pictures)
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)


def test_fixed_positions():
    table = _vision_utils.sincos2d(2, 3, 8)
    assert table.shape == (1, 6, 8) and table.dtype == np.float32
    # Patch (row 1, column 2); a quarter of the width has the frequencies 1 and 1 / 10,000.
    x, y = np.array([2, 2e-4]), np.array([1, 1e-4])
    np.testing.assert_allclose(table[0, 5], np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)]), rtol=1e-6)
    tower = _vision_utils.ViTModel.of(SMALL, posemb="sincos2d")
    shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 28, 28, 3)))
    assert "pos_embedding" not in shapes["params"]


def test_pooling():
    x = np.random.default_rng(2).normal(size=(2, 36, 3)).astype(np.float32)
    out = _vision.VisionExit(output_length=9).apply({}, jnp.asarray(x))
    grid = x.reshape(2, 6, 6, 3)
    for row, column in np.ndindex(3, 3):
        square = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_allclose(out[:, 3 * row + column], square.mean((1, 2)), rtol=0, atol=1e-6)
    assert _vision.VisionExit(output_length=36).apply({}, jnp.asarray(x)).shape == x.shape
    for length in (8, 16, 64):
        with pytest.raises(ValueError, match=f"cannot pool 36 patches to {length}"):
            _vision.VisionExit(output_length=length).apply({}, jnp.asarray(x))


def test_patches_and_no_stop_gradient():
    """`patchify_images` and back are one another's inverse; training reaches the tower if one says so."""
    encoder = _vision.SigLiPFromPatches(
        siglip_encoder=_vision_utils.ViTModel.of(SMALL),
        siglip_exit=_vision.VisionExit(4),
        num_mm_tokens_per_image_prepool=16,
        num_mm_tokens_per_image=4,
        image_height=28,
        image_width=28,
        apply_stop_gradient=False,
    )
    pictures = jnp.asarray(np.random.default_rng(3).uniform(-1, 1, (1, 2, 28, 28, 3)), jnp.float32)
    patches = encoder.patchify_images(pictures)
    assert patches.shape == (1, 2, 16, 147)
    np.testing.assert_array_equal(patches[0, 1, 6].reshape(7, 7, 3), pictures[0, 1, 7:14, 14:21])
    params = random_like(jax.eval_shape(lambda: encoder.init(jax.random.key(0), patches=patches)))
    assert list(params["params"]) == ["siglip_encoder"]
    whole = encoder.siglip_encoder.apply({"params": params["params"]["siglip_encoder"]}, pictures[0])

    def loss(params):
        out = encoder.apply(params, patches=patches)
        return out.sum(), out

    (_, out), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(out[0].mean(1), whole.mean(1), rtol=0, atol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slopes))
    with pytest.raises(ValueError, match=r"expected \[B, I, 16, 147\].*got \(1, 2, 15, 147\)"):
        encoder.apply(params, patches=patches[:, :, 1:])


def test_the_published_encoder():
    encoder = _vision.SigLiPFromPatches()
    assert encoder == gm.nn.Gemma3_27B.config.vision_encoder
    assert (encoder.num_mm_tokens_per_image_prepool, encoder.num_mm_tokens_per_image, encoder.width) == (
        4096,
        256,
        1152,
    )
    assert encoder.vision_config == preset("gemma3_4b").vision
    assert _vision.NUM_TOKENS_PER_MEDIA == 260
    assert pickle.loads(pickle.dumps(encoder)) == encoder and hash(encoder) == hash(_vision.SigLiPFromPatches())


@pytest.mark.parametrize("name", ["gemma3_4b", "gemma3_12b", "gemma3_27b"])
def test_configurations_with_vision(name):
    model = gm.nn.Transformer.from_config(PRESETS[name])
    assert model.config.gemma == PRESETS[name]
    assert model.vision_encoder is model.config.vision_encoder
    assert model.config.input_config.num_tokens_per_image == 256
    assert model.config.input_config.special_tokens.START_OF_IMAGE == 255_999
    text = model.config.text_only()
    assert text.vision_encoder is None and text.gemma.vision is None and not text.input_config.support_images


def test_dtypes_of_a_bfloat16_model():
    """The text in bfloat16; what belongs to images in float32, computed in float32, and merged in bfloat16."""
    config = dataclasses.replace(testing.tiny_config(), vision=SMALL, mm_tokens_per_image=4, boi_token_index=300)
    model = gm.nn.Transformer.from_config(config)

    def run():
        tokens = jnp.full((1, 3), 300)
        pictures = jnp.zeros((1, 3, 50, 60, 3), jnp.uint8)
        out, variables = model.init_with_output(jax.random.key(0), tokens, images=pictures)
        soft = model.apply(variables, pictures, method="encode_images")
        return out, variables["params"], soft

    out, params, soft = jax.eval_shape(run)
    assert out.logits.shape == (1, 3, 320) and out.logits.dtype == jnp.bfloat16
    assert soft.shape == (1, 3, 4, 72) and soft.dtype == jnp.float32
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == (jnp.float32 if "vision_encoder" in name or "mm_" in name else jnp.bfloat16), name
