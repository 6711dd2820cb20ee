# SPDX-License-Identifier: Apache-2.0
"""Images in a call: masks compared literally in every cache layout, and wrong arguments, each named."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma import gm, testing
from gemma.config import SiglipVisionConfig
from gemma.gm.nn import _cache, _plan
from gemma.gm.utils import _cache_helper, _file_cache

VISION = SiglipVisionConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=28
)
CONFIG = dataclasses.replace(
    testing.tiny_config("gemma3", num_hidden_layers=2, layer_pattern="LG"),
    vision=VISION,
    mm_tokens_per_image=4,
    boi_token_index=298,
    eoi_token_index=299,
)
IMG = 298


@functools.cache
def tiny():
    model = gm.nn.Transformer.from_config(CONFIG, dtype=jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    return model, jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), shapes)


# ---- masks ----------------------------------------------------------------------------------------------------------

#          a b I I I I c d         one image of four tokens, longer than the window of three
GROUPS = [[0, 0, 1, 1, 1, 1, 0, 0]]
GLOBAL = ["1.......", "11......", *["111111.."] * 4, "1111111.", "11111111"]
LOCAL = [  # the window bounds how far back; inside the image, forward is free
    "1.......",
    "11......",
    "111111..",
    ".11111..",
    "..1111..",
    "...111..",
    "....111.",
    ".....111",
]


def drawing(mask) -> list[str]:
    return ["".join(".1"[int(cell)] for cell in row) for row in np.asarray(mask)]


def plan(start, stop, *, local, cache=None, ring=False, valid=None):
    spec = CONFIG.layers[0 if local else 1]
    spec = dataclasses.replace(spec, window=3 if local else None)
    valid = jnp.ones((1, stop - start), bool) if valid is None else valid
    return _plan.plan_layer(
        spec,
        positions=jnp.arange(start, stop, dtype=jnp.int32)[None],
        valid=valid,
        cache=cache,
        mask=None,
        ring=ring,
        groups=jnp.asarray(GROUPS, jnp.int32)[:, start:stop],
    )


@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
def test_mask_without_a_cache(local):
    assert drawing(plan(0, 8, local=local).mask[0]) == (LOCAL if local else GLOBAL)


@pytest.mark.parametrize("cuts", [(8,), (2, 8), (2, 6, 8), (1, 6, 7, 8)], ids=str)
@pytest.mark.parametrize("local", [False, True], ids=["global", "local"])
@pytest.mark.parametrize("layout", ["full", "ring"])
def test_masks_of_chunks(layout, local, cuts):
    """Chunk by chunk, and with the slots put in the order of their positions, the rows are those of one pass."""
    slots = 3 if local and layout == "ring" else 10
    cache = _cache.init_layer(1, slots, 1, 2, jnp.float32, -1 if layout == "ring" else 0)
    start, rows = 0, []
    for stop in cuts:
        made = plan(start, stop, local=local, cache=cache, ring=layout == "ring")
        width = made.mask.shape[2]
        if isinstance(made.write, _cache.ChunkWrite) and made.write.read_first:
            keys = np.concatenate([np.asarray(cache["positions"][0]), np.arange(start, stop)])
        else:
            keys = np.asarray(made.write.positions[0])
        assert len(keys) == width
        for row in np.asarray(made.mask[0]):
            seen = ["."] * 8
            for key in keys[row]:
                assert seen[key] == "."
                seen[key] = "1"
            rows.append("".join(seen))
        kv = jnp.zeros((1, stop - start, 1, 2))
        _, _, cache = made.write.store(cache, kv, kv)
        start = stop
    assert rows == (LOCAL if local else GLOBAL)


def test_padding_stored_in_the_full_layout_is_hidden():
    cache = _cache.init_layer(1, 6, 1, 2, jnp.float32, 0)
    valid = jnp.asarray([[False, True, True]])
    made = plan(0, 3, local=False, cache=cache, valid=valid)
    kv = jnp.zeros((1, 3, 1, 2))
    _, _, cache = made.write.store(cache, kv, kv)
    assert cache["positions"].tolist() == [[-1, 1, 2, 0, 0, 0]]
    assert drawing(plan(3, 5, local=False, cache=cache).mask[0]) == [".1111.", ".1111."]
    assert _cache.next_position({"layer_0": cache}).tolist() == [3]


# ---- wrong arguments ------------------------------------------------------------------------------------------------

PICTURE = np.full((28, 28, 3), 7, np.uint8)
BLACK = np.zeros_like(PICTURE)
SOFT = np.zeros((1, 1, 4, 72), np.float32)
BLOCK = [108, IMG, -2, -2, -2, -2, 299, 108]


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        ([[2, 5]], dict(images=PICTURE[None, None]), "the prompt has 0 <start_of_image> and comes with 1 images"),
        ([[2, IMG, IMG]], dict(images=PICTURE[None, None]), "has 2 <start_of_image> and comes with 1 images"),
        ([[2, IMG], [2, 5]], dict(images=np.stack([PICTURE] * 2)), "row 1 has 0 .* ends in black ones"),
        ([[2, 5], [2, 5]], dict(images=np.stack([BLACK] * 2)), "every row has 0 <start_of_image> and comes with 1"),
        ([[2, IMG, -2]], dict(images=PICTURE[None, None]), "tokens hold -2, a part of an expanded image"),
        ([[2, IMG]], dict(images=PICTURE), r"images: expected \[1, I, H, W, 3\] or \[1, H, W, 3\] .*\(28, 28, 3\)"),
        ([[2, IMG]], dict(images=np.stack([PICTURE] * 2)), r"images: expected \[1, I.*got uint8 .*\(2, 28, 28, 3\)"),
        ([[2, IMG]], dict(images=PICTURE[None, None, :, :, :2]), r"\(1, 1, 28, 28, 2\)"),
        ([[2, IMG]], dict(images=PICTURE[None, None].astype(np.int32)), "expected uint8 .* got int32"),
        ([[2, IMG]], dict(images=[[PICTURE, PICTURE[1:]]]), "pictures of different sizes: gm.vision.load_images"),
        ([[2, IMG]], dict(images=PICTURE[None, None] * 1.0), r"floats must be in -1\.\.1"),
        ([[2, IMG]], dict(images=PICTURE[None, None, 1:] / 255.0), "prepared pixels of the shape"),
        ([[2, IMG]], dict(images=PICTURE[None, None], soft_tokens=SOFT), "the pictures or their encoding, not both"),
        ([[2, *BLOCK]], dict(soft_tokens=SOFT[0]), r"soft_tokens: expected \[1, I, 4, 72\] .*\(1, 4, 72\)"),
        ([[2, *BLOCK]], dict(soft_tokens=SOFT.astype(np.int32)), "soft_tokens: expected floats"),
        ([[2, *BLOCK]], dict(soft_tokens=SOFT.repeat(2, 1)), "fullest row holds 1 expanded images, but soft_tokens 2"),
        ([[2, 5]], dict(soft_tokens=SOFT), "fullest row holds 0 expanded images"),
        (
            [[2, *BLOCK[:5]]],
            dict(soft_tokens=SOFT),
            "an image has 4 tokens of id -2, but 3 stand at 3: a chunk must not",
        ),
        ([[2, *BLOCK]], {}, r"expected ids in 0\.\.319, got -2; an expanded prompt needs soft_tokens"),
        ([[2, 320]], {}, r"tokens: expected ids in 0\.\.319, got 320"),
        ([[2, -1]], {}, r"tokens: expected ids in 0\.\.319, got -1"),
        (
            [[2, IMG, 5]],
            dict(images=PICTURE[None, None], positions=np.zeros((1, 3), np.int32)),
            r"positions: expected 10 queries, image tokens included, got the shape \(1, 3\)",
        ),
    ],
)
def test_bad_arguments_are_named(tokens, arguments, message):
    model, variables = tiny()
    with pytest.raises(ValueError, match=message):
        model.apply(variables, np.asarray(tokens, np.int32), **arguments)


def test_what_a_jit_cannot_know_is_defined():
    """Inside a jit, a marker too many is an ordinary token and a picture too many is not used."""
    model, variables = tiny()
    run = jax.jit(lambda tokens, images: model.apply(variables, tokens, images=images).logits)
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (1, 1, 28, 28, 3), dtype=np.uint8)
    two = run(jnp.asarray([[2, IMG, 5, IMG, 7]], jnp.int32), pictures)
    assert two.shape == (1, 5, 320) and bool(jnp.isfinite(two).all())
    none = run(jnp.asarray([[2, 4, 5, 6, 7]], jnp.int32), pictures)
    plain = jax.jit(lambda tokens: model.apply(variables, tokens).logits)(jnp.asarray([[2, 4, 5, 6, 7]], jnp.int32))
    np.testing.assert_allclose(none, plain, rtol=0, atol=1e-5)


def test_encoding_needs_an_encoder():
    model = gm.nn.Transformer.from_config(testing.tiny_config("gemma2"), dtype=jnp.float32)
    with pytest.raises(ValueError, match="does not have vision encoder"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), PICTURE[None], method="encode_images"))
    embedder = gm.nn.Embedder(5, 4)
    with pytest.raises(ValueError, match="without vision_proj_dim"):
        embedder.init(jax.random.key(0), jnp.ones((1, 4)), method="encode_vision")


# ---- helpers of official samplers -----------------------------------------------------------------------------------


def test_cache_helper():
    model = gm.nn.Transformer.from_config(testing.tiny_config("gemma2", num_hidden_layers=2), dtype=jnp.float32)
    cache = _cache_helper.Cache(model.init_cache(batch_size=2, dtype=jnp.float32, cache_length=8))
    assert cache.total_cache_length == 8 and int(cache.end_index) == 0 and not bool(cache.is_full)
    ones = _cache_helper.Cache(jax.tree.map(jnp.ones_like, cache[:, :3].cache))
    filled = cache.at[:, :3].set_kv(ones)
    assert filled[:, :3].total_cache_length == 3
    layer = filled.cache["layer_1"]
    assert layer["k"][:, :3].all() and not layer["k"][:, 3:].any()
    assert layer["positions"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]] * 2
    assert layer["end_index"].tolist() == [0, 0]
    assert filled.set_end_index(7).cache["layer_0"]["end_index"].tolist() == [7, 7]
    assert bool(filled.set_end_index(7).is_full)
    for bad in (3, slice(3), (1, 2, 3)):
        with pytest.raises(ValueError, match="Unsupported slicing"):
            cache[bad]
    with pytest.raises(ValueError, match="different layers"):
        cache.at[:, :].set_kv(_cache_helper.Cache({"layer_0": cache.cache["layer_0"]}))


def test_file_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path))
    look = functools.partial(_file_cache.maybe_get_from_cache, cache_subdir="tokenizer")
    assert str(look(remote_file_path="somewhere/t.model")) == "somewhere/t.model"
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/t.model").write_bytes(b"x")
    assert look(remote_file_path="somewhere/t.model") == tmp_path / "tokenizer/t.model"
