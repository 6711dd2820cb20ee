# SPDX-License-Identifier: Apache-2.0
"""Calls of `gm.text` as official scripts make them: tokenizers, sampling methods, samplers."""

from __future__ import annotations

import pickle
from types import GeneratorType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma import gm, testing

SPECIAL2 = dict(PAD=0, EOS=1, BOS=2, UNK=3, MASK=4, CUSTOM=7, START_OF_TURN=106, END_OF_TURN=107)
SPECIAL3 = dict(PAD=0, EOS=1, BOS=2, UNK=3, MASK=4, CUSTOM=6, START_OF_TURN=105, END_OF_TURN=106)
SPECIAL3 |= dict(START_OF_IMAGE=255999, END_OF_IMAGE=256000)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    config = testing.tiny_config("gemma3", query_pre_attn_scalar=None, rope_scaling_factor=1.0)
    return testing.write_tiny_gguf(tmp_path_factory.mktemp("vocabulary") / "tiny.gguf", config)


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def test_special_tokens():
    for cls, special, version in ((gm.text.Gemma2Tokenizer, SPECIAL2, 2), (gm.text.Gemma3Tokenizer, SPECIAL3, 3)):
        assert {name: int(value) for name, value in cls.special_tokens.__members__.items()} == special
        assert version == cls.VERSION and type(gm.text.Tokenizer.from_version(version)) is cls
    assert gm.text.Gemma2Tokenizer.FORBIDDEN_TOKENS == ()
    tokens = gm.text.Gemma3Tokenizer.special_tokens
    assert gm.text.Gemma3Tokenizer.FORBIDDEN_TOKENS == (tokens.START_OF_IMAGE, tokens.END_OF_IMAGE)
    with pytest.raises(AttributeError):
        assert gm.text.Gemma2Tokenizer.special_tokens.START_OF_IMAGE
    with pytest.raises(ValueError, match="Unsupported tokenizer version"):
        gm.text.Tokenizer.from_version(17)


def test_paths():
    """Constructing reads nothing; the default path is the official one."""
    assert gm.text.Gemma2Tokenizer().path == "gs://gemma-data/tokenizers/tokenizer_gemma2.model"
    assert gm.text.Gemma3Tokenizer().path == "gs://gemma-data/tokenizers/tokenizer_gemma3.model"
    assert gm.text.Gemma3Tokenizer() == gm.text.Gemma3Tokenizer() and hash(gm.text.Gemma3Tokenizer())


def test_tokenizer(file):
    tokenizer = gm.text.Gemma3Tokenizer(file)
    special = tokenizer.special_tokens
    ids = tokenizer.encode("ab c", add_bos=True, add_eos=True)
    assert isinstance(ids, list) and (ids[0], ids[-1]) == (special.BOS, special.EOS)
    inner = tokenizer.encode("ab c")
    assert inner == ids[1:-1] and tokenizer.decode(inner) == "ab c"
    assert tokenizer.decode(jnp.asarray(inner)) == tokenizer.decode(np.asarray(inner)) == "ab c"
    assert tokenizer.decode(inner[0]) == tokenizer.decode(jnp.asarray(inner[0])) == "a"
    with pytest.raises(ValueError, match="Array must be 0 or 1 dimensional"):
        tokenizer.decode(np.zeros((2, 2), np.int32))
    assert len(tokenizer.split("ab c")) == len(inner)
    assert tokenizer.vocab_size == len(tokenizer.tokens) and " " in tokenizer.tokens
    assert tokenizer.encode([" ", "<bos>"]) == [*tokenizer.encode(" "), 2]
    with pytest.raises(ValueError, match="Cannot tokenize .*unknown token"):
        tokenizer.encode(["ab"])
    assert pickle.loads(pickle.dumps(tokenizer)).encode("ab c") == inner


def test_custom_tokens(file):
    tokenizer = gm.text.Gemma3Tokenizer(path=file, custom_tokens={0: "<first>", 17: "<other>"})
    [first], [other] = tokenizer.encode("<first>"), tokenizer.encode("<other>")
    assert other == first + 17 == tokenizer.encode("a<other>b")[1]
    assert tokenizer.decode(other) == "<other>"
    assert gm.text.Gemma3Tokenizer(path=file).decode(other) == "<unused17>"
    assert hash(tokenizer) == hash(gm.text.Gemma3Tokenizer(path=file, custom_tokens={0: "<first>", 17: "<other>"}))


def test_plot_logits(file):
    """A plot where the plotting library is installed; the shapes are checked before it is looked for."""
    tokenizer = gm.text.Gemma3Tokenizer(file)
    for shape in ((2, 320), (1, 1, 320)):
        with pytest.raises(ValueError):
            tokenizer.plot_logits(jnp.zeros(shape))


# ---- sampling methods -----------------------------------------------------------------------------------------------

LOGITS = jax.random.normal(jax.random.key(1), (2, 3, 7))


def methods():
    return [
        gm.text.Greedy(),
        gm.text.RandomSampling(),
        gm.text.RandomSampling(temperature=0.5),
        gm.text.TopkSampling(k=3),
        gm.text.TopPSampling(p=0.8, temperature=0.9),
    ]


@pytest.mark.parametrize("method", methods(), ids=repr)
def test_sampling_methods(method):
    rng = jax.random.PRNGKey(0)
    for logits in (LOGITS, LOGITS[0], LOGITS[0, 0]):
        tokens = jax.eval_shape(method.get_next_tokens, logits, rng)
        assert tokens.shape == logits.shape[:-1] and jnp.issubdtype(tokens.dtype, jnp.integer)
    assert isinstance(method, gm.text.SamplingMethod) and hash(method) == hash(type(method)(**vars(method)))
    assert jax.eval_shape(lambda: method.get_next_tokens(logits, rng=rng)).shape == ()


def test_draws_are_the_official_ones():
    """The same key draws the same tokens as the official formulas."""
    rng, logits = jax.random.PRNGKey(3), LOGITS[0]
    draw = lambda method: method.get_next_tokens(logits, rng).tolist()
    assert draw(gm.text.Greedy()) == draw(gm.text.TopkSampling()) == logits.argmax(-1).tolist()
    assert draw(gm.text.RandomSampling(temperature=2.0)) == jax.random.categorical(rng, logits / 2.0).tolist()
    values, places = jax.lax.top_k(logits, 3)
    picked = jax.random.categorical(rng, values / 0.7)
    expected = jnp.take_along_axis(places, picked[:, None], -1)[:, 0].tolist()
    assert draw(gm.text.TopkSampling(k=3, temperature=0.7)) == expected
    assert draw(gm.text.TopPSampling(p=1.0)) == jax.random.categorical(rng, logits).tolist()


def test_nucleus():
    """Tokens stay until their cumulated probability reaches p; the one that reaches it stays as well."""
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 200)
    for p, kept in ((0.4, {0}), (0.7, {0, 1}), (0.9, {0, 1, 2})):
        method = gm.text.TopPSampling(p=p)
        drawn = jax.jit(jax.vmap(method.get_next_tokens, in_axes=(None, 0)))(logits, keys)
        assert set(drawn.tolist()) == kept


# ---- Sampler --------------------------------------------------------------------------------------------------------


def test_results_by_prompt(sampler):
    """`str` gives `str`, a sequence gives a list; arrays of strings as well."""
    sample = sampler().sample
    one, other = sample("Hello world", max_new_tokens=4), sample("!", max_new_tokens=4)
    assert isinstance(one, str) and one
    for prompts in (["Hello world", "!"], ("Hello world", "!"), np.array(["Hello world", "!"])):
        assert sample(prompts, max_new_tokens=4) == [one, other]
    assert sample(np.array("Hello world"), max_new_tokens=4) == one


def test_state(sampler):
    out = sampler().sample("Hello world", max_new_tokens=4, return_state=True)
    assert isinstance(out, gm.text.SamplerOutput) and isinstance(out.text, str)
    assert out.tokens.ndim == 1 and out.state is not None
    out = sampler().sample(["Hello world", "!"], max_new_tokens=4, return_state=True)
    assert isinstance(out.text, list) and out.tokens.ndim == 2


def test_what_scripts_read_from_a_state(sampler):
    """The state is an object of its own (the cache is windowed, so there is no mask of all its slots)."""
    state = sampler().sample(["Hello world", "!"], max_new_tokens=4, return_state=True).state
    assert int(state.step) == 4 and state.predicted_tokens.shape == (2, 4) and state.done.shape == (2,)
    assert state.last_token_pos.tolist() == [2 + 4, 1 + 4]  # after a bos
    assert state.last_token.tolist() == state.predicted_tokens[:, -1].tolist()
    assert state.used_cache_length.tolist() == [6, 5] and state.init_cache_length.tolist() == [3, 2]
    assert set(state.cache) == {"layer_0", "layer_1"} and jax.random.split(state.rng).shape == (2,)


def test_streaming(sampler):
    stream = sampler().sample("Hello world", max_new_tokens=6, stream=True)
    assert isinstance(stream, GeneratorType)
    parts = list(stream)
    assert all(isinstance(part, str) for part in parts)
    assert "".join(parts) == sampler().sample("Hello world", max_new_tokens=6)
    states = list(sampler().sample("Hello world", max_new_tokens=3, stream=True, return_state=True))
    assert all(isinstance(part, gm.text.SamplerOutput) for part in states)


def test_random_numbers(sampler):
    sample = lambda **rng: sampler().sample("Hello", sampling=gm.text.RandomSampling(), max_new_tokens=8, **rng)
    assert sample(rng=7) == sample(rng=7) == sample(rng=jax.random.key(7))
    assert len({sample(rng=i) for i in range(6)}) > 1
    assert len({sample() for _ in range(6)}) > 1  # no key: another one each time


def test_forbidden_and_stop_tokens(sampler):
    first = sampler().sample("Hello world", max_new_tokens=1)
    assert sampler(forbidden_tokens=(first,)).sample("Hello world", max_new_tokens=1) != first
    ids = gm.testing.DummyTokenizer().encode(first)
    assert sampler(forbidden_tokens=tuple(ids)).sample("Hello world", max_new_tokens=1) != first
    stopped = sampler(stop_tokens=(first,)).sample("Hello world", max_new_tokens=8)
    assert stopped == first  # the stop token stays in the text
    with pytest.raises(ValueError):
        sampler(stop_tokens=("Hello world",)).sample("!")


def test_lengths(sampler):
    with pytest.raises(ValueError, match="max_new_tokens should be smaller or equal to max_out_length. Got: 17"):
        sampler().sample("Hello", max_new_tokens=17)
    assert sampler().sample("Hello", max_new_tokens=0) == sampler().sample("Hello", max_new_tokens=None)


def test_tokenizers_must_fit(small, dummy):
    model, params = dummy
    with pytest.raises(ValueError, match="The model does not specify a tokenizer to use"):
        gm.text.Sampler(model=model, params=params)
    with pytest.raises(ValueError, match="Incompatible model and tokenizer: Got .*Gemma3_1B.* and .*Gemma2Tokenizer"):
        gm.text.Sampler(model=gm.nn.Gemma3_1B(), params={}, tokenizer=gm.text.Gemma2Tokenizer())
    tokenizer = gm.text.Sampler(model=gm.nn.Gemma3_1B(), params={}).tokenizer
    assert tokenizer == gm.text.Gemma3Tokenizer()


def test_a_bucket_larger_than_the_cache(dummy):
    """The official defaults with a short cache: an error there, an answer here."""
    model, params = dummy
    for pad_length in ({}, {"pad_length": None}):
        sampler = gm.text.Sampler(
            model=model,
            params=params,
            tokenizer=gm.testing.DummyTokenizer(),
            cache_length=128,
            max_out_length=128,
            **pad_length,
        )
        assert isinstance(sampler.sample("Hello world", max_new_tokens=2), str)


def test_no_prompts(sampler):
    """An error of `max()` there."""
    assert sampler().sample([]) == []
    with pytest.raises(ValueError, match="empty"):
        sampler().sample([], return_state=True)


def test_images_for_a_model_without_vision(sampler):
    with pytest.raises(ValueError, match="vision"):
        sampler().sample("Hello", images=jnp.zeros((8, 8, 3), jnp.uint8))


# ---- ChatSampler ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(talker):
    """`chat(**settings)`: a ChatSampler."""
    model, params, tokenizer = talker
    return lambda **settings: gm.text.ChatSampler(
        model=model, params=params, tokenizer=tokenizer, cache_length=128, max_out_length=16, **settings
    )


def test_chat(chat):
    sampler = chat()
    answer = sampler.chat("hi", max_new_tokens=5)
    assert isinstance(answer, str) and not answer.endswith("<end_of_turn>")
    assert [type(turn).__name__ for turn in sampler.turns] == ["UserTurn", "ModelTurn"]
    assert [turn.text for turn in sampler.turns] == ["hi", answer] and sampler.last_state is not None
    assert isinstance(sampler.sampler, gm.text.Sampler) and sampler.sampler is sampler.sampler
    sampler.chat("again", max_new_tokens=5)
    assert len(sampler.turns) == 2  # not multi-turn: it starts over
    sampler.chat("and?", max_new_tokens=5, multi_turn=True)
    assert [turn.text for turn in sampler.turns][::2] == ["again", "and?"]
    assert chat() != chat()  # `eq=False`


def test_chat_prompt_is_the_template(chat):
    sampler = chat()
    prompt = "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    text = sampler.sampler.sample(prompt, max_new_tokens=5)
    assert sampler.chat("hi", max_new_tokens=5) == text.removesuffix("<end_of_turn>")


def test_chat_prints(chat, capsys):
    answer = chat(print_stream=True).chat("hi", max_new_tokens=5)
    assert capsys.readouterr().out.rstrip("\n") == answer.rstrip("\n")
    assert chat().chat("hi", max_new_tokens=5, print_stream=True) == answer


def test_chat_starts_empty(chat):
    said = "Currently initializing the sampler with previous conversation is not supported."
    from gemma.gm.text import _template

    with pytest.raises(ValueError, match=said):
        chat(turns=[_template.UserTurn("hi")])


def test_defaults_of_the_method(chat):
    """A call's `sampling` wins over the sampler's."""
    greedy = chat().chat("hi", max_new_tokens=8)
    hot = gm.text.RandomSampling(temperature=5.0)
    assert len({chat(sampling=hot).chat("hi", max_new_tokens=8, rng=i) for i in range(4)}) > 1
    assert chat(sampling=hot).chat("hi", max_new_tokens=8, sampling=gm.text.Greedy(), rng=1) == greedy
