# SPDX-License-Identifier: Apache-2.0
"""`Sampler`: texts and batches, streaming, stopping, states, and what it refuses."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax_text_helpers import naive

from gemma.errors import ContextFull, PromptError, SamplingError, ShapeError, TokenizerError
from gemma.gm import nn, text
from gemma.sampling import SamplingParams

TEXTS = ["The history", "a", "one two three four five six seven eight"]


@pytest.fixture(scope="module")
def sampler(loaded):
    return text.Sampler(
        model=loaded.model, params=loaded.params, tokenizer=loaded.tokenizer, cache_length=128, pad_length=16,
        max_out_length=32,
    )  # fmt: skip


def ids_of(loaded, prompt: str, count: int) -> list[int]:
    special = loaded.tokenizer.special
    return naive(loaded, loaded.tokenizer.encode(prompt, add_bos=True), count, (special.eos, special.end_of_turn))


def text_of(loaded, ids: list[int]) -> str:
    special = loaded.tokenizer.special
    return loaded.tokenizer.decode([i for i in ids if i not in (special.pad, special.bos, special.eos)])


def test_kinds_of_prompt(sampler, loaded):
    expected = [text_of(loaded, ids_of(loaded, prompt, 8)) for prompt in TEXTS]
    assert sampler.sample(TEXTS[0], max_new_tokens=8) == expected[0]
    assert sampler.sample(np.array(TEXTS[0]), max_new_tokens=8) == expected[0]
    for prompts in (TEXTS, tuple(TEXTS), np.array(TEXTS)):
        assert sampler.sample(prompts, max_new_tokens=8) == expected
    assert sampler.sample([TEXTS[0]], max_new_tokens=8) == [expected[0]]
    assert sampler.sample([]) == [] and list(sampler.sample([], stream=True)) == []


def test_an_empty_text_continues_from_bos(sampler, loaded):
    assert sampler.sample("", max_new_tokens=5) == text_of(loaded, ids_of(loaded, "", 5))


def test_streaming_gives_the_same(sampler):
    whole = sampler.sample(TEXTS, max_new_tokens=8)
    pieces = list(sampler.sample(TEXTS, max_new_tokens=8, stream=True))
    assert ["".join(row) for row in zip(*pieces)] == whole and len(pieces) == 8
    single = list(sampler.sample(TEXTS[0], max_new_tokens=8, stream=True))
    assert "".join(single) == whole[0] and all(isinstance(piece, str) for piece in single)


def test_stop_tokens(sampler, loaded):
    free = ids_of(loaded, TEXTS[0], 12)
    stop = next(i for n, i in enumerate(free) if n > 2 and i not in free[:n])
    stopping = dataclasses.replace(sampler, stop_tokens=[stop])
    out = stopping.sample(TEXTS[0], max_new_tokens=12, return_state=True)
    assert out.tokens.tolist() == free[: free.index(stop) + 1]  # the stop token stays
    batch = stopping.sample(TEXTS, max_new_tokens=12, return_state=True)
    for row, prompt in zip(batch.tokens, TEXTS):
        expected = naive(loaded, loaded.tokenizer.encode(prompt, add_bos=True), 12, (stop, 1, 6))
        assert row.tolist() == expected + [0] * (len(row) - len(expected))
    streamed = list(stopping.sample(TEXTS, max_new_tokens=12, stream=True))
    assert ["".join(row) for row in zip(*streamed)] == batch.text


def test_forbidden_tokens(sampler, loaded):
    free = ids_of(loaded, TEXTS[0], 6)
    out = dataclasses.replace(sampler, forbidden_tokens=free).sample(TEXTS[0], max_new_tokens=6, return_state=True)
    assert not set(out.tokens.tolist()) & set(free)
    image = loaded.tokenizer.special.start_of_image
    forced = SamplingParams(temperature=0, logit_bias={image: 1e6})
    assert image not in sampler.sample(TEXTS[0], max_new_tokens=4, sampling=forced, return_state=True).tokens


def test_a_second_turn_equals_one_pass(sampler, loaded):
    encode = loaded.tokenizer.encode
    first = sampler.sample(TEXTS, max_new_tokens=6, return_state=True)
    second = sampler.sample(["x", "yy", "zzz"], max_new_tokens=6, last_state=first.state, return_state=True)
    for b, (one, two) in enumerate(zip(TEXTS, ("x", "yy", "zzz"))):
        held = encode(one, add_bos=True) + [int(i) for i in first.tokens[b] if i]
        assert [int(i) for i in second.tokens[b] if i] == naive(loaded, [*held, *encode(two)], 6, (1, 6))
    again = sampler.sample(["x", "yy", "zzz"], max_new_tokens=6, last_state=first.state)  # a state is not used up
    assert again == second.text
    transcripts = second.state.transcripts
    assert [row[-1] for row in transcripts] == second.state.last_token.tolist()
    assert [len(row) - 1 for row in transcripts] == second.state.used_cache_length.tolist()


def test_states_of_a_stream(sampler):
    outputs = list(sampler.sample(TEXTS[0], max_new_tokens=4, stream=True, return_state=True))
    assert [out.tokens.size for out in outputs] == [1, 2, 3, 4]
    whole = sampler.sample(TEXTS[0], max_new_tokens=4, return_state=True)
    assert outputs[-1].tokens.tolist() == whole.tokens.tolist()
    rest = sampler.sample("", max_new_tokens=2, last_state=outputs[1].state, return_state=True)
    assert rest.tokens.tolist() == whole.tokens.tolist()[2:]


def test_random_sampling(sampler):
    method = text.RandomSampling(temperature=2.0)
    one = sampler.sample(TEXTS, max_new_tokens=8, sampling=method, rng=3)
    assert one == sampler.sample(TEXTS, max_new_tokens=8, sampling=method, rng=jax.random.key(3))
    assert one != sampler.sample(TEXTS, max_new_tokens=8, sampling=method, rng=4)
    seeded = SamplingParams(seed=9, temperature=2.0)
    rows = sampler.sample([TEXTS[0]] * 3, max_new_tokens=8, sampling=seeded)
    assert len(set(rows)) == 3 and rows[0] == sampler.sample([TEXTS[0], "b", "c"], max_new_tokens=8, sampling=seeded)[0]


def test_max_new_tokens(sampler, loaded):
    for unset in (None, 0):
        out = dataclasses.replace(sampler, max_out_length=5).sample(TEXTS[0], max_new_tokens=unset, return_state=True)
        assert out.tokens.size == 5
    with pytest.raises(ValueError, match=r"smaller or equal to max_out_length. Got: 33 and 32"):
        sampler.sample(TEXTS[0], max_new_tokens=33)
    limit = loaded.config.max_position_embeddings
    long = "x" * (limit - 4)  # with <bos>, three tokens are left
    assert sampler.sample(long, return_state=True).tokens.size == 3
    with pytest.raises(ContextFull) as caught:
        sampler.sample(long, max_new_tokens=4)
    assert (caught.value.used, caught.value.limit) == (limit + 1, limit)
    with pytest.raises(ContextFull):
        sampler.sample("x" * limit)


def test_what_is_refused(sampler, loaded):
    with pytest.raises(PromptError, match="does not have vision encoder"):
        sampler.sample("x", images=np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ShapeError, match="expected a jax.sharding.NamedSharding"):
        sampler.sample("x", sharding=object())
    for wrong in (3, None, ["x", None], [1.5], [[1], [None]], [True]):
        with pytest.raises(PromptError, match="expected a text, token ids, the turns"):
            sampler.sample(wrong)
    for wrong in (0, -1, True, 1.5):
        with pytest.raises(SamplingError, match="num_samples"):
            sampler.sample("x", num_samples=wrong)
    with pytest.raises(SamplingError, match=r"expected a gm.text.SamplingMethod.*got 'greedy'"):
        sampler.sample("x", sampling="greedy")
    with pytest.raises(SamplingError, match="expected an int or a JAX key, got str"):
        sampler.sample("x", rng="a")
    with pytest.raises(PromptError, match="empty list"):
        sampler.sample([], return_state=True)
    state = sampler.sample("x", max_new_tokens=1, return_state=True).state
    with pytest.raises(PromptError, match="last_state holds 1 conversations; expected as many prompts, got 2"):
        sampler.sample(["x", "y"], last_state=state)
    with pytest.raises(TokenizerError, match=r"Invalid token: 'two words'"):
        dataclasses.replace(sampler, stop_tokens=["two words"]).sample("x")
    with pytest.raises(SamplingError, match="use `stop_tokens`"):
        sampler.sample("x", sampling=SamplingParams(stop=("x",)))


def test_constructor(loaded):
    with pytest.raises(ValueError, match="The model does not specify a tokenizer to use"):
        text.Sampler(model=loaded.model, params=loaded.params)
    with pytest.raises(ValueError, match="Incompatible model and tokenizer: Got Gemma2_2B and ByteTokenizer"):
        text.Sampler(model=nn.Gemma2_2B(), params={}, tokenizer=loaded.tokenizer)
    for wrong in (dict(cache_length=0), dict(max_out_length=0), dict(pad_length=(0, 16))):
        with pytest.raises(SamplingError, match="at least 1"):
            text.Sampler(model=loaded.model, params={}, tokenizer=loaded.tokenizer, **wrong)


def test_the_cache_length_does_not_matter(sampler):
    short = dataclasses.replace(sampler, cache_length=4)
    assert short.sample(TEXTS, max_new_tokens=8) == sampler.sample(TEXTS, max_new_tokens=8)
