# SPDX-License-Identifier: Apache-2.0
"""Image tokens: expanded on the device and on the host, merged, dropped again, and cut into chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma import gm
from gemma.config import preset
from gemma.gm.utils import _types
from gemma.gm.vision import ImageTokens, _token_utils, _vision, plan_chunks

IMG = 255_999
BLOCK = [108, IMG, -2, -2, -2, 256_000, 108]  # with three soft tokens
PAD = [0] * (len(BLOCK) - 1)
TOKENS = ImageTokens(IMG, 256_000, 3)


def expand(rows, images):
    tokens = _token_utils.add_extra_tokens_for_images(jnp.asarray(rows), max_num_images=images, num_tokens_per_image=3)
    assert tokens.shape == (len(rows), len(rows[0]) + images * len(PAD)) and tokens.dtype == jnp.int32
    return tokens.tolist()


@pytest.mark.parametrize(
    ("row", "images", "expected"),
    [
        ([1, 2, 3], 0, [1, 2, 3]),
        ([1, 2, 3], 2, [1, 2, 3, *PAD, *PAD]),
        ([1, 2, IMG, 4], 2, [1, 2, *BLOCK, 4, *PAD]),
        ([1, IMG, IMG], 2, [1, *BLOCK, *BLOCK]),
        ([1, IMG, 2, IMG, 3], 2, [1, *BLOCK, 2, *BLOCK, 3]),
        ([IMG, 5], 1, [*BLOCK, 5]),  # also in front
        ([0, 0, 2, IMG, 7], 1, [0, 0, 2, *BLOCK, 7]),  # padding on the left stays
        ([2, IMG, 7, 0, 0], 1, [2, *BLOCK, 7, 0, 0]),
        ([2, IMG, 3, IMG, 4], 1, [2, *BLOCK, 3, IMG, 4]),  # a marker too many is an ordinary token
    ],
)
def test_expansion(row, images, expected):
    assert expand([row], images) == [expected]


def test_expansion_of_a_batch():
    rows = [[1, 2, 3, IMG, 5, 6], [1, IMG, IMG, 6, 0, 0], [1, 2, 3, 4, 5, 6]]
    assert expand(rows, 2) == [
        [1, 2, 3, *BLOCK, 5, 6, *PAD],
        [1, *BLOCK, *BLOCK, 6, 0, 0],
        [1, 2, 3, 4, 5, 6, *PAD, *PAD],
    ]


def test_other_ids_and_another_sequence():
    tokens = jnp.asarray([[7, 9, 8]])
    out = _token_utils.insert_sequence(tokens, at=9, sequence=[4, 5], max_num_images=1)
    assert out.tolist() == [[7, 4, 5, 8]]
    assert _token_utils.get_num_mm_tokens(max_num_images=3, num_tokens_per_image=256) == 777


def test_the_host_says_the_same_as_the_device():
    rng = np.random.default_rng(0)
    rows = np.where(rng.random((40, 12)) < 0.25, IMG, rng.integers(1, 90, (40, 12))).tolist()
    most = max(row.count(IMG) for row in rows)
    for row, device in zip(rows, expand(rows, most)):
        images = row.count(IMG)
        expanded = TOKENS.expand(row, images)
        assert device == expanded + PAD * (most - images)
        assert len(expanded) == TOKENS.expanded_length(row)
        assert TOKENS.collapse(expanded) == row
        assert [expanded[a:b] for a, b in TOKENS.spans(expanded)] == [[-2] * 3] * images


def test_the_published_ids():
    tokens = ImageTokens.of(preset("gemma3_4b"))
    assert tokens == ImageTokens.of(gm.nn.Gemma3_4B().config) == ImageTokens(IMG, 256_000, 256)
    assert tokens.length == 260
    vocabulary = gm.text.Gemma3Tokenizer(path="demo")
    assert vocabulary.encode("\n\n") == [_token_utils.DOUBLE_NEW_LINE]
    special = vocabulary.special_tokens
    assert tokens.start == special.START_OF_IMAGE and tokens.end == special.END_OF_IMAGE


@pytest.mark.parametrize(
    ("row", "images", "message"),
    [
        ([2, IMG], 2, r"the prompt has 1 <start_of_image> and comes with 2 images: add one marker"),
        ([2, IMG, IMG], 1, r"has 2 <start_of_image> and comes with 1 images: pass one image"),
        ([2, -2], 0, "id -2 stands for a part of an image"),
    ],
)
def test_counts_are_checked(row, images, message):
    with pytest.raises(ValueError, match=message):
        TOKENS.expand(row, images)


# ---- merging --------------------------------------------------------------------------------------------------------


def test_merging():
    mask = np.zeros((3, 9), bool)
    mask[0, 2:5] = mask[0, 6:9] = mask[2, 4:7] = True
    text, pictures = np.random.default_rng(1).normal(size=(3, 9, 2)), np.random.default_rng(2).normal(size=(3, 2, 3, 2))
    expected = text.astype(np.float32)
    for b, row in enumerate(mask):
        expected[b, row] = pictures[b].reshape(6, 2)[: row.sum()]
    merged = _token_utils.merge_embeddings(
        text_embeddings=jnp.asarray(text, jnp.float32),
        vision_embeddings=jnp.asarray(pictures, jnp.float32),
        mask=jnp.asarray(mask),
    )
    np.testing.assert_array_equal(merged, expected)


def test_logits_after_an_image_are_those_of_its_last_token():
    rows = jnp.asarray([[1, 2, IMG, 5, IMG], [1, IMG, 3, 4, 0]])
    expanded = _token_utils.add_extra_tokens_for_images(rows, max_num_images=2, num_tokens_per_image=3)
    index = jnp.broadcast_to(jnp.arange(expanded.shape[1]), expanded.shape)
    logits = jnp.stack([expanded, index], axis=-1).astype(jnp.float32)
    back = _token_utils.remove_mm_logits(logits=logits, tokens=rows, num_tokens_per_image=3)
    assert back[..., 0].astype(int).tolist() == [[1, 2, 108, 5, 108], [1, 108, 3, 4, 0]]
    assert back[..., 1].astype(int).tolist() == [[0, 1, 8, 9, 16], [0, 7, 8, 9, 10]]


# ---- chunks ---------------------------------------------------------------------------------------------------------


def test_chunks_cut_no_image():
    rng = np.random.default_rng(3)
    for _ in range(200):
        row = np.where(rng.random(rng.integers(1, 20)) < 0.2, IMG, 5).tolist()
        ids = TOKENS.expand(row, row.count(IMG))
        limit = int(rng.integers(3, 25))
        parts = plan_chunks(ids, limit=limit)
        assert [token for part in parts for token in ids[part]] == ids
        assert all(0 < part.stop - part.start <= limit for part in parts)
        for first, last in TOKENS.spans(ids):
            assert any(part.start <= first and last <= part.stop for part in parts)


def test_chunks_are_as_long_as_possible():
    ids = TOKENS.expand([1, 2, 3, IMG, 4, 5], 1)
    assert [ids[part] for part in plan_chunks(ids, limit=7)] == [[1, 2, 3, 108, IMG], [-2, -2, -2, 256_000, 108, 4, 5]]
    assert plan_chunks([], limit=4) == []


def test_an_image_longer_than_a_chunk():
    with pytest.raises(ValueError, match="an image of 3 tokens must be read whole, but a chunk holds 2"):
        plan_chunks(TOKENS.expand([1, IMG], 1), limit=2)
    with pytest.raises(ValueError, match="at least 1 token"):
        plan_chunks([1], limit=0)


# ---- the input of official samplers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given():
    config = _types.InputConfig(
        support_images=True, num_tokens_per_image=3, special_tokens=gm.text.Gemma3Tokenizer.special_tokens
    )
    text = jnp.asarray([[1, 2, IMG, IMG], [1, 2, 0, 0], [1, IMG, 3, 0]])
    return _types.Input(text=text, images=jnp.zeros((3, 2, 4, 4, 3), jnp.uint8), config=config)


def test_input(given):
    assert (given.batch_size, given.max_num_images, given.length_with_mm) == (3, 2, 16)
    tokens = [[1, 2, *BLOCK, *BLOCK], [1, 2, 0, 0, *PAD, *PAD], [1, *BLOCK, 3, 0, *PAD]]
    assert given.tokens_with_mm.tolist() == tokens
    assert given.inputs_mask.tolist() == [[t != 0 for t in row] for row in tokens]
    assert given.positions[2].tolist() == [*range(9), *[8] * 7]
    assert given.last_token_pos.tolist() == [15, 1, 8]
    assert given.last_token.tolist() == [108, 2, 3]
    drawing = ["".join(".1"[int(c)] for c in row) for row in np.asarray(given.attention_mask[2])]
    assert drawing == [
        "1...............",
        "11..............",
        "111.............",
        *["111111.........."] * 3,
        "1111111.........",
        "11111111........",
        *["111111111......."] * 8,
    ]
    assert given.attention_mask[1].sum() == 1 + 2 * 15


def test_input_without_images_and_padded(given):
    plain = given.replace(images=None)
    assert plain.tokens_with_mm.tolist() == given.text.tolist()
    assert plain.pad(7).tokens_with_mm.shape == (3, 7)
    assert given.pad(20).length_with_mm == 20
    with pytest.raises(ValueError, match="Cannot pad sequence"):
        given.pad(15)
    assert jax.tree.leaves(given)[0].shape == (3, 4)


def test_input_of_a_text_model(given):
    text_model = _types.InputConfig(support_images=False, num_tokens_per_image=0, special_tokens=None)
    with pytest.raises(ValueError, match="the model does not support vision"):
        given.replace(config=text_model)


# ---- helpers of the first sampler -----------------------------------------------------------------------------------


def test_first_sampler():
    buffer = jnp.asarray([[2, 11, 12]])
    none = _vision.initialize_vision_tokens(None, buffer, jnp.asarray([3]))
    assert none.token_buffer is buffer
    made = _vision.initialize_vision_tokens(jnp.zeros((1, 2, 4, 4)), buffer, jnp.asarray([3]))
    block = [108, IMG, *[-2] * 256, 256_000, 108]
    assert made.token_buffer.tolist() == [[2, *block, *block, 11, 12]]
    assert made.num_input_tokens.tolist() == [523]
    check = jax.jit(_vision.check_mask)
    valid, starts = check(made.token_buffer[0])
    assert bool(valid) and starts[:3].tolist() == [3, 263, 0]
    for token, offset, right in ((256_000, 256, True), (IMG, 0, False)):
        found = _vision.check_special_vision_token(
            made.token_buffer, start_positions=starts[None], special_token=token, position_offset=offset
        )
        assert bool(found) is right
    assert not bool(check(jnp.roll(made.token_buffer[0], -5))[0])
