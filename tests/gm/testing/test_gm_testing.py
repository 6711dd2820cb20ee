# SPDX-License-Identifier: Apache-2.0
"""The doubles of `gm.testing` go wherever the real ones go."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma import gm
from gemma.errors import TokenizerError

use_hermetic_tokenizer = gm.testing.use_hermetic_tokenizer  # as official test files take it


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Tiny programs, each run a few times: compiling them is the cost, so XLA optimizes little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def dummy():
    model = gm.testing.DummyGemma()
    params = jax.jit(model.init)(jax.random.PRNGKey(0), jnp.zeros((5,), jnp.int32))["params"]
    return dict(model=model, params=params, tokenizer=gm.testing.DummyTokenizer(), cache_length=64, max_out_length=8)


def test_the_official_sizes(dummy):
    config = gm.testing.DummyGemma().config
    assert (config.num_embed, config.embed_dim, config.hidden_dim, config.head_dim) == (13, 32, 128, 128)
    assert (config.num_heads, config.num_kv_heads) == (2, 2) and config.num_layers == 1
    assert config.attention_types == (gm.nn.AttentionType.GLOBAL,)
    assert not config.use_post_attn_norm and not config.use_post_ffw_norm
    assert {leaf.dtype for leaf in jax.tree.leaves(dummy["params"])} == {jnp.dtype(jnp.bfloat16)}


def test_the_official_words():
    tokenizer = gm.testing.DummyTokenizer()
    assert tokenizer.vocab_size == len(tokenizer.tokens) == 14 and tokenizer.VERSION == 0
    assert tokenizer.encode("hello world") == [5, 6] and tokenizer.encode("Hello there !") == [7, 8, 9]
    assert tokenizer.encode("Hello", add_bos=True, add_eos=True) == [2, 7, 1]
    assert tokenizer.encode(["My", "name"]) == [10, 11] and tokenizer.split("My name") == ["My", "name"]
    assert tokenizer.decode(np.array([10, 11, 12, 13])) == "My name is Morgane" and tokenizer.decode(0) == "<pad>"
    assert tokenizer.special_tokens is gm.text.Gemma3Tokenizer.special_tokens
    assert tokenizer == gm.testing.DummyTokenizer() and hash(tokenizer) == hash(gm.testing.DummyTokenizer())
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, [7, 8]), stream.flush()]) == "Hello there"


def test_what_it_does_not_know_is_an_error():
    tokenizer = gm.testing.DummyTokenizer()
    with pytest.raises(TokenizerError, match="unknown word 'Goodbye'; expected some of .*Morgane"):
        tokenizer.encode("Goodbye world")
    with pytest.raises(TokenizerError, match=r"expected ids in 0\.\.13, got 14"):
        tokenizer.decode([14])
    with pytest.raises(TokenizerError, match="Array must be 0 or 1 dimensional"):
        tokenizer.decode(np.zeros((1, 1), np.int32))


def test_in_a_sampler(dummy):
    sampler = gm.text.Sampler(**dummy)
    one = sampler.sample("Hello world", max_new_tokens=4)
    assert "".join(sampler.sample("Hello world", max_new_tokens=4, stream=True)) == one
    assert set(one.split()) <= set(gm.testing.DummyTokenizer().tokens)


def test_a_chat_needs_a_vocabulary_with_turns(dummy):
    """Fourteen words have no marks of turns: said at the first turn, with the reason."""
    with pytest.raises(ValueError, match="unknown word.*take gm.testing.tiny_model"):
        gm.text.ChatSampler(**dummy).chat("Hello world", max_new_tokens=2)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_tiny_models(family):
    loaded = gm.testing.tiny_model(family, dtype="bfloat16")
    tokens = jnp.asarray(loaded.tokenizer.encode("ab", add_bos=True))
    out = jax.eval_shape(lambda: loaded.model.apply({"params": loaded.params}, tokens))
    assert out.logits.shape == (3, loaded.config.vocab_size) and out.logits.dtype == jnp.bfloat16
    assert loaded.config.model_type.startswith(family) and loaded.config.vision is None


def test_a_tiny_model_chats_about_pictures():
    loaded = gm.testing.tiny_model(images=True, num_hidden_layers=1, layer_pattern="G")
    settings = dict(model=loaded.model, params=loaded.params, tokenizer=loaded.tokenizer, cache_length=128)
    chat = gm.text.ChatSampler(multi_turn=True, max_out_length=8, **settings)
    pictures = [np.full((20, 30, 3), value, np.uint8) for value in (10, 240)]
    answers = {chat.chat("<start_of_image>?", images=p, max_new_tokens=4, multi_turn=False) for p in pictures}
    assert len(answers) == 2  # the picture matters
    assert chat.chat("more", max_new_tokens=4) and len(chat.turns) == 4


def test_tiny_models_are_reproducible():
    same = [gm.testing.tiny_model(num_hidden_layers=1, layer_pattern="G", seed=3).params for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *same)
    other = gm.testing.tiny_model(num_hidden_layers=1, layer_pattern="G", seed=4).params
    assert not np.array_equal(other["final_norm"]["scale"], same[0]["final_norm"]["scale"])
