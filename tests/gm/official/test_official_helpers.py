# SPDX-License-Identifier: Apache-2.0
"""The private helpers that official tests and scripts import: what goes in, what comes out."""

from __future__ import annotations

import dataclasses
from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Float
from official_models import call

from gemma import gm
from gemma.gm.text import _full_loop, _prefill, _sampler_loop, _template, _turn_utils
from gemma.gm.utils import _attention_mask, _cache_helper, _file_cache, _jax_utils, _types
from gemma.gm.vision import _token_utils

IMAGE = 255999  # <start_of_image>
BLOCK = [108, 255999, -2, -2, -2, 256000, 108]  # what one becomes, with three soft tokens per image
GAP = [0] * (len(BLOCK) - 1)


def inputs(text, images=None, support=True, soft=3):
    return _types.Input(
        text=jnp.asarray(text),
        images=images,
        config=_types.InputConfig(
            support_images=support,
            num_tokens_per_image=soft,
            special_tokens=gm.text.Gemma3Tokenizer.special_tokens,
        ),
    )


# ---- gm.vision._token_utils -----------------------------------------------------------------------------------------


def test_room_for_images():
    assert _token_utils.SOFT_TOKEN_PLACEHOLDER == -2
    assert _token_utils.get_num_mm_tokens(max_num_images=0, num_tokens_per_image=3) == 0
    assert _token_utils.get_num_mm_tokens(max_num_images=2, num_tokens_per_image=256) == 2 * 259


@pytest.mark.parametrize(
    ("tokens", "expanded"),
    [
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, *GAP, *GAP]),
        ([1, 2, 3, IMAGE, 4], [1, 2, 3, *BLOCK, 4, *GAP]),
        ([1, 2, 3, IMAGE, IMAGE], [1, 2, 3, *BLOCK, *BLOCK]),
        ([1, IMAGE, 2, IMAGE, 3], [1, *BLOCK, 2, *BLOCK, 3]),
        ([1, IMAGE, 2, 0, 0], [1, *BLOCK, 2, 0, 0, *GAP]),
    ],
)
def test_expanding_placeholders(tokens, expanded):
    expand = _token_utils.add_extra_tokens_for_images
    out = expand(jnp.array([tokens]), max_num_images=2, num_tokens_per_image=3)
    assert out[0].tolist() == expanded
    both = expand(tokens=jnp.array([tokens, [7, 8, 9, 0, 0]]), max_num_images=2, num_tokens_per_image=3)
    assert both.tolist() == [expanded, [7, 8, 9, 0, 0, *GAP, *GAP]]  # static: as long for every row


@pytest.mark.parametrize("images", [2, 3])
def test_merging_embeddings(images):
    mask = jnp.array([[0, 0, 1, 1, 1, 0, 1, 1, 1], [0] * 9, [0, 0, 0, 0, 1, 1, 1, 0, 0]], bool)
    text = jnp.broadcast_to(jnp.arange(1.0, 10.0)[None, :, None], (3, 9, 2))
    vision = jnp.broadcast_to(10 * jnp.arange(1.0, images * 3 + 1).reshape(1, images, 3, 1), (3, images, 3, 2))
    out = _token_utils.merge_embeddings(text_embeddings=text, vision_embeddings=vision, mask=mask)
    assert out[..., 0].tolist() == [
        [1, 2, 10, 20, 30, 6, 40, 50, 60],
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
        [1, 2, 3, 4, 10, 20, 30, 8, 9],
    ]


def test_removing_the_rows_of_images():
    """The row of a placeholder is that of the last token it became, which has seen the image.

    (The official package takes the first one's, whose next token is no text.)
    """
    tokens = jnp.array([[1, IMAGE, 2], [3, 4, 5]])
    length = 3 + len(GAP)
    logits = jnp.broadcast_to(jnp.arange(float(length))[None, :, None], (2, length, 4))
    out = _token_utils.remove_mm_logits(logits=logits, tokens=tokens, num_tokens_per_image=3)
    assert out.shape == (2, 3, 4)
    assert out[..., 0].tolist() == [[0, len(BLOCK), 1 + len(BLOCK)], [0, 1, 2]]


# ---- gm.utils -------------------------------------------------------------------------------------------------------


def test_input_of_text():
    text = inputs([[1, 2, 3, 4], [1, 2, 0, 0], [1, 2, 3, 0]])
    assert (text.batch_size, text.max_num_images, text.length_with_mm) == (3, 0, 4)
    np.testing.assert_array_equal(text.tokens_with_mm, text.text)
    np.testing.assert_array_equal(text.inputs_mask, text.text != 0)
    causal = np.tril(np.ones((4, 4), bool))
    np.testing.assert_array_equal(text.attention_mask, causal[None] & np.asarray(text.text != 0)[:, None, :])
    assert text.positions.tolist() == [[0, 1, 2, 3], [0, 1, 1, 1], [0, 1, 2, 2]]
    assert text.last_token_pos.tolist() == [3, 1, 2] and text.last_token.tolist() == [4, 2, 3]
    longer = text.pad(7)
    assert longer.length_with_mm == 7 and longer.positions[1].tolist() == [0, 1, 1, 1, 1, 1, 1]
    assert longer.last_token_pos.tolist() == [3, 1, 2] and longer.last_token.tolist() == [4, 2, 3]
    assert longer.tokens_with_mm[0].tolist() == [1, 2, 3, 4, 0, 0, 0]
    assert len(jax.tree.leaves(text)) == 1  # a pytree; the configuration is static


def test_input_with_images():
    images = jnp.zeros((3, 2, 4, 4, 3), jnp.uint8)
    mixed = inputs([[1, 2, IMAGE, IMAGE], [1, 2, 0, 0], [1, IMAGE, 3, 0]], images)
    assert (mixed.batch_size, mixed.max_num_images, mixed.length_with_mm) == (3, 2, 16)
    rows = [[1, 2, *BLOCK, *BLOCK], [1, 2, 0, 0, *GAP, *GAP], [1, *BLOCK, 3, 0, *GAP]]
    assert mixed.tokens_with_mm.tolist() == rows
    for row, mask in zip(np.asarray(rows), np.asarray(mixed.attention_mask)):
        # Causal over what is no padding, and the soft tokens of one image see each other both ways.
        block = np.cumsum(np.diff(row == -2, prepend=False)) * (row == -2)
        same = (block[:, None] == block[None, :]) & (row == -2)[:, None]
        np.testing.assert_array_equal(mask, (np.tril(np.ones((16, 16), bool)) & (row != 0)[None, :]) | same)
    assert mixed.last_token_pos.tolist() == [15, 1, 8] and mixed.last_token.tolist() == [108, 2, 3]
    assert mixed.positions[2].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8] + [8] * 7
    with pytest.raises(ValueError, match="Images are provided, but the model does not support vision"):
        inputs([[1, IMAGE]], images[:1], support=False)


def test_bidirectional_runs():
    causal = jnp.array([[1, 1, 1, 1, 1, 1, 1, 1, 0, 0]], bool)
    both = jnp.array([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]], bool)
    out = _attention_mask.make_causal_bidirectional_attention_mask(causal, bidirectional_mask=both)
    expected = np.tril(np.ones((10, 10), bool)) & np.asarray(causal)
    expected[2:6, 2:6] = True
    np.testing.assert_array_equal(out[0], expected)
    plain = _attention_mask.make_causal_bidirectional_attention_mask(causal_mask=causal)
    np.testing.assert_array_equal(plain[0], np.tril(np.ones((10, 10), bool)) & np.asarray(causal))


def test_cache_helper(dummy):
    model, params = dummy
    cache = _prefill._get_or_init_cache(
        inputs=inputs([[5, 6]], support=False),
        prev_turns=_turn_utils.PrevTurns(last_state=None),
        model=model,
        params=params,
        cache_length=64,
        sharding=None,
    )
    assert cache.total_cache_length == 64 and not cache.cache["layer_0"]["k"].any()
    assert cache.cache["layer_0"]["k"].shape == (1, 64, 2, 128) and cache.end_index.tolist() in (0, [0])
    dtype = cache.cache["layer_0"]["k"].dtype
    part = {"k": jnp.ones((1, 16, 2, 128), dtype), "v": jnp.ones((1, 16, 2, 128), dtype)}
    part |= {"end_index": jnp.asarray([4]), "positions": jnp.ones((1, 16), jnp.int32)}
    filled = cache.at[:, :16].set_kv(_cache_helper.Cache({"layer_0": part}))
    head, tail = filled[:, :16].cache["layer_0"], filled[:, 16:].cache["layer_0"]
    assert head["k"].all() and head["v"].all() and head["end_index"].tolist() == [0]
    assert not tail["k"].any() and tail["v"].shape == (1, 48, 2, 128)
    assert filled.set_end_index(5).cache["layer_0"]["end_index"].tolist() == [5]
    assert not filled.set_end_index(62).is_full and filled.set_end_index(63).is_full
    with pytest.raises(ValueError):
        filled[:16]


def test_cache_helper_without_positions(dummy):
    """Caches of the older layout have none."""
    cache = {"layer_0": {n: jnp.zeros((1, 8, 2, 4)) for n in "kv"} | {"end_index": jnp.asarray([0])}}
    ones = {"layer_0": {n: jnp.ones((1, 3, 2, 4)) for n in "kv"} | {"end_index": jnp.asarray([0])}}
    out = _cache_helper.Cache(cache).at[:, :3].set_kv(_cache_helper.Cache(ones))
    assert out[:, :3].cache["layer_0"]["k"].all() and not out[:, 3:].cache["layer_0"]["k"].any()


def test_batch_dimensions():
    seen = {}

    @_jax_utils.flatten_unflatten_batch_dim()
    def f(
        x: Float[jax.Array, "*b h n"],
        y: Float[jax.Array, "*b"],
        either: Float[jax.Array, "*b n"] | Float[jax.Array, "*b n w"],
        maybe: Optional[Float[jax.Array, "*b h"]] = None,  # noqa: UP045 - an Optional on purpose
        none: Float[jax.Array, "*b h"] | None = None,
        *,
        other=4,
    ):
        seen.update(x=x.shape, y=y.shape, either=either.shape, maybe=None if maybe is None else maybe.shape)
        return x

    sizes = _jax_utils._get_argname_to_non_batch_dim_size(f)
    assert sizes == {"x": 2, "y": 0, "maybe": 1, "none": 1}
    out = f(jnp.ones((2, 3, 1, 4)), jnp.ones((2, 3)), jnp.ones((2, 3, 2)), maybe=jnp.ones((2, 3, 2)))
    assert out.shape == (2, 3, 1, 4) and seen == dict(x=(6, 1, 4), y=(6,), either=(6, 2), maybe=(6, 2))
    assert f(x=jnp.ones((3, 4)), y=jnp.ones(()), either=jnp.ones((3, 2))).shape == (3, 4)
    assert seen == dict(x=(1, 3, 4), y=(1,), either=(1, 3, 2), maybe=None)
    with pytest.raises(ValueError, match="Could not infer batch shape. Got conflicting values"):
        f(jnp.ones((2, 3, 4)), jnp.ones((5,)), jnp.ones((2, 3)))


def test_file_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GEMMA_CACHE_DIR", str(tmp_path))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer/used.txt").write_text("text")
    found = _file_cache.maybe_get_from_cache(remote_file_path="gs://nowhere/used.txt", cache_subdir="tokenizer")
    assert str(found) == str(tmp_path / "tokenizer/used.txt")
    missing = _file_cache.maybe_get_from_cache(remote_file_path="gs://nowhere/other.txt", cache_subdir="tokenizer")
    assert str(missing) == "gs://nowhere/other.txt"
    assert str(_file_cache._get_cache_dir()) == str(tmp_path)
    monkeypatch.delenv("GEMMA_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(_file_cache._get_cache_dir()) == str(tmp_path / ".gemma")


# ---- gm.text --------------------------------------------------------------------------------------------------------


def test_template():
    assert _template.PROMPT.format("hi") == "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    assert _template.ANSWER.format("yes") == "yes<end_of_turn>"
    assert issubclass(_template.UserTurn, _template.Turn) and issubclass(_template.ModelTurn, _template.Turn)
    assert _template.UserTurn("hi").text == "hi" and _template.UserTurn("hi") == _template.UserTurn("hi")


def test_end_token_mask():
    tokens = jnp.array([[1, 2, 3, 10, 4, 5], [1, 2, 3, 3, 4, 5], [1, 2, 11, 3, 10, 5]])
    out = _sampler_loop._mask_tokens_after_end_tokens(tokens, end_tokens=(10, 11))
    assert out.tolist() == [[1, 2, 3, 10, 0, 0], [1, 2, 3, 3, 4, 5], [1, 2, 11, 0, 0, 0]]


def test_prefill(dummy):
    """The state before the first token: the last token of the prompt is processed again by the first step."""
    model, params = dummy
    prompt = inputs([gm.testing.DummyTokenizer().encode("Hello world")], support=False)
    state = _prefill.prefill(
        model=model,
        params=params,
        input=prompt,
        last_state=None,
        cache_length=64,
        max_out_length=12,
        pad_length=(8,),
        rng=jax.random.PRNGKey(0),
        sharding=None,
    )
    assert int(state.step) == 0 and state.done.tolist() == [False]
    assert int(state.init_cache_length) == int(state.used_cache_length) == 1
    assert state.predicted_tokens.shape == (1, 12) and not state.predicted_tokens.any()
    np.testing.assert_array_equal(state.last_token, prompt.last_token)
    np.testing.assert_array_equal(state.last_token_pos, prompt.last_token_pos)
    np.testing.assert_array_equal(state.attention_mask_for_step, [[1, 1] + [0] * 62])
    assert state.cache["layer_0"]["k"].shape[1] == 64


def turn(mask, used):
    return _full_loop.FullState(
        step=jnp.asarray(2),
        done=jnp.ones((2,), bool),
        last_token=jnp.asarray([1, 2]),
        last_token_pos=jnp.asarray([4, 2]),
        predicted_tokens=jnp.asarray([[7, 8, 0, 0], [7, 0, 0, 0]]),
        cache={},
        rng=jax.random.PRNGKey(0),
        init_cache_length=jnp.asarray(used),
        full_attention_mask=mask,
    )


def test_masks_over_turns():
    """Columns: the prompt (padding off), then what was predicted (off after the end), then the next prompt."""
    prompt = inputs([[1, 2, 3], [1, 2, 0]])
    none = _turn_utils.PrevTurns(last_state=None)
    assert not none
    mask = _prefill._make_full_attention_mask(input=prompt, prev_turns=none, cache_length=10)
    np.testing.assert_array_equal(mask, [[1] * 10, [1, 1, 0] + [1] * 7])
    state = turn(mask, used=2)
    np.testing.assert_array_equal(state.attention_mask_for_step, [[1] * 5 + [0] * 5, [1, 1, 0, 1, 1] + [0] * 5])
    masked = _sampler_loop._mask_full_attention_mask_prefix_for_next_turn(
        full_attention_mask=state.full_attention_mask,
        predicted_tokens=state.predicted_tokens,
        init_cache_length=state.init_cache_length,
    )
    np.testing.assert_array_equal(masked, [[1] * 5 + [0] * 5, [1, 1, 0, 1] + [0] * 6])
    state = dataclasses.replace(state, full_attention_mask=masked)
    turns = _turn_utils.PrevTurns(last_state=state)
    assert turns and turns.used_cache_length == 5
    second = _prefill._make_full_attention_mask(input=prompt, prev_turns=turns, cache_length=10)
    np.testing.assert_array_equal(second, [[1] * 10, [1, 1, 0, 1, 0, 1, 1, 0, 1, 1]])


def test_a_sampler_from_parts(small):
    """Two turns of a padded batch in which one row ends early, each token as one pass over its transcript has it."""
    model, params = small
    tokenizer = gm.testing.DummyTokenizer()
    parts = dict(model=model, forbidden_tokens=(0, 1, 2), sampling=gm.text.Greedy(), cache_length=64)

    def turn(words, last_state, end_tokens, count):
        rows = [tokenizer.encode(row) for row in words]
        longest = max(map(len, rows))
        text = np.array([row + [0] * (longest - len(row)) for row in rows])
        state = _prefill.prefill(
            model=model,
            params=params,
            input=inputs(text, support=False),
            last_state=last_state,
            cache_length=64,
            max_out_length=12,
            pad_length=(8, 16),
            rng=jax.random.key(0),
            sharding=None,
        )
        loop = _sampler_loop.SamplerLoop(end_tokens=end_tokens, special_tokens=tokenizer.special_tokens, **parts)
        state = loop.sample(params=params, init_state=state, max_new_tokens=jnp.asarray(count))
        return rows, [[int(i) for i in row if i] for row in state.predicted_tokens], state

    first = ["Hello world ! My name is", "input string"]
    _, free, _ = turn(first, None, (13,), 8)
    end = free[1][2]  # ends the second row after a few tokens; the first one, if it never says it, goes on
    rows, made, state = turn(first, None, (end,), 8)
    more, again, _ = turn(["there", "is My name !"], state, (13,), 5)
    assert len(made[1]) <= 3 and made[1][-1] == end
    for b in range(2):
        transcript = [*rows[b], *made[b], *more[b], *again[b]]
        padded = np.zeros(64, np.int32)
        padded[: len(transcript)] = transcript
        logits = np.array(call(model, params, jnp.asarray(padded)).logits)[:, 3:]
        best = (logits.argmax(-1) + 3)[: len(transcript) - 1].tolist()
        begin, then = len(rows[b]), len(rows[b]) + len(made[b]) + len(more[b])
        assert best[begin - 1 : begin - 1 + len(made[b])] == made[b]
        assert best[then - 1 : then - 1 + len(again[b])] == again[b] and len(again[b]) == 5


def test_streaming_from_parts(dummy):
    model, params = dummy
    state = _prefill.prefill(
        model=model,
        params=params,
        input=inputs([[5, 6]], support=False),
        last_state=None,
        cache_length=8,
        max_out_length=12,
        rng=jax.random.key(0),
        sharding=None,
    )
    loop = _sampler_loop.SamplerLoop(
        model=model,
        end_tokens=(99,),
        forbidden_tokens=None,
        sampling=gm.text.Greedy(),
        cache_length=8,
        special_tokens=gm.testing.DummyTokenizer.special_tokens,
    )
    states = list(loop.sample(params=params, init_state=state, max_new_tokens=12, stream=True))
    assert [int(state.step) for state in states] == [1, 2, 3, 4, 5, 6]  # until the cache is full
