# SPDX-License-Identifier: Apache-2.0
"""Generation by ids: what is cached, chunked, batched, grown or continued must equal whole forward passes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_text_helpers import PROMPT, logits_after, naive

from gemma.errors import ContextFull, PromptError, SamplingError
from gemma.gm import text
from gemma.gm.text import _cuts, _engine, _generate
from gemma.sampling import SamplingParams, sample, step_seed


def greedy(count: int, **more) -> SamplingParams:
    return SamplingParams(temperature=0, max_new_tokens=count, **more)


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_equals_whole_forward_passes(make, family):
    loaded = make(family, num_hidden_layers=2, layer_pattern="G" if family == "gemma" else "LG")
    expected = naive(loaded, PROMPT, 24)
    assert len(set(expected)) > 3  # not one token over and over
    for chunk in (1, 7):
        assert list(text.generate_ids(loaded, PROMPT, greedy(24), chunk=chunk)) == expected


def test_ends_at_an_end_id(loaded):
    free = naive(loaded, PROMPT, 24)
    end = next(token for i, token in enumerate(free) if i > 3 and token not in free[:i])
    at = free.index(end)
    for chunk in (1, 7):
        assert list(text.generate_ids(loaded, PROMPT, greedy(24), end_ids=[end, 5], chunk=chunk)) == free[: at + 1]


def test_a_first_token_that_ends(loaded):
    first = naive(loaded, PROMPT, 1)
    for chunk in (1, 7):
        assert list(text.generate_ids(loaded, PROMPT, greedy(9), end_ids=first, chunk=chunk)) == first


@pytest.mark.parametrize("buckets", [(4,), (3, 16)])
def test_chunks_of_the_prompt_do_not_matter(loaded, buckets):
    cuts, choice = _generate.picking(greedy(1), loaded, ())
    engine = _engine.Engine(loaded.model, loaded.params, 1, cache_length=64, buckets=buckets)
    key, u = jax.random.key(0), np.zeros(1, np.float32)
    made = engine.start([PROMPT], cuts, choice, reserve=8, key=key, u=u).tokens[0].tolist()
    made += engine.run(cuts, choice, 7, np.zeros((1, 7), np.float32)).tokens[0].tolist()
    assert made == naive(loaded, PROMPT, 8)


def test_rows_do_not_see_each_other(loaded):
    prompts = [PROMPT, PROMPT[:1], PROMPT[:6], [2, *range(60, 100)]]
    cuts, choice = _generate.picking(greedy(1), loaded, ())
    choice = choice._replace(knobs=_cuts.from_params([greedy(1)] * 4, 320)[1])
    engine = _engine.Engine(loaded.model, loaded.params, 4, cache_length=64, buckets=(16,))
    engine.start(prompts, cuts, choice, reserve=12, key=jax.random.key(0), u=np.zeros(4, np.float32))
    engine.run(cuts, choice, 11, np.zeros((4, 12), np.float32))
    for prompt, row in zip(prompts, engine.ids):
        assert row == prompt + naive(loaded, prompt, 12)
    stored = [int(n) for n in engine.cache["layer_0"]["end_index"]]
    assert stored == engine.stored == [len(row) - 1 for row in engine.ids]


def test_turns_equal_one_pass(loaded):
    session = text.Session(loaded)
    transcript: list[int] = []
    for turn, count in ((PROMPT, 7), ([77], 3), ([90, 91, 92], 1), ([50] * 20, 9)):
        made = list(session.append(turn, greedy(count)))
        assert made == naive(loaded, transcript + turn, count)
        transcript += turn + made
    assert session.ids == transcript


def test_tokens_reads_only_what_is_new(loaded, monkeypatch):
    read = []
    original = _engine.plan_chunks
    monkeypatch.setattr(
        _engine, "plan_chunks", lambda row, *, limit: read.append(len(row)) or original(row, limit=limit)
    )
    session = text.Session(loaded, context=60)
    made = list(session.tokens(PROMPT, greedy(4)))
    longer = [*PROMPT, *made, 80, 81]
    again = list(session.tokens(longer, greedy(4)))
    assert read == [len(PROMPT), 3]  # the pending token and two more
    assert again == naive(loaded, longer, 4)
    assert list(session.tokens(PROMPT, greedy(4))) == made  # not a continuation: read from the start
    assert read[2:] == [len(PROMPT)]
    held = session.ids
    assert list(session.tokens(held, greedy(2))) == naive(loaded, held, 2)  # nothing new but the pending token


def test_leaving_early_and_going_on(loaded):
    session = text.Session(loaded)
    pieces = session.append(PROMPT, greedy(20))
    made = [next(pieces) for _ in range(4)]
    pieces.close()
    assert session.ids == PROMPT + made
    assert list(session.append([70], greedy(3))) == naive(loaded, [*PROMPT, *made, 70], 3)


def test_a_growing_cache_and_ring(make):
    loaded = make("gemma2", num_hidden_layers=2, sliding_window=40, max_position_embeddings=2048)
    cuts, choice = _generate.picking(greedy(1), loaded, ())
    engine = _engine.Engine(loaded.model, loaded.params, 1, cache_length=16)  # shorter than the window
    assert engine.capacity == 16
    for turn in (PROMPT, [2, *range(60, 100)]):
        engine.start([turn], cuts, choice, reserve=2, key=jax.random.key(0), u=np.zeros(1, np.float32))
        assert engine.ids[0][-1:] == naive(loaded, engine.ids[0][:-1], 1)
    assert engine.capacity == 512


def test_the_limit_of_the_model(loaded):
    limit = loaded.config.max_position_embeddings
    session = text.Session(loaded)
    with pytest.raises(ContextFull) as caught:
        list(session.append(PROMPT, greedy(limit)))
    assert (caught.value.used, caught.value.limit) == (limit + len(PROMPT), limit)
    assert session.ids == []  # nothing was read
    made = list(session.append(PROMPT, greedy(limit - len(PROMPT))))
    assert made == naive(loaded, PROMPT, limit - len(PROMPT))
    with pytest.raises(ContextFull):
        list(session.append([], greedy(1)))


@pytest.mark.parametrize("chunk", [1, 7])
def test_seeded_sampling(loaded, chunk):
    params = SamplingParams(seed=5, top_p=0.9, top_k=40, repetition_penalty=1.2, max_new_tokens=12)
    made = list(text.generate_ids(loaded, PROMPT, params, chunk=chunk))
    ids = list(PROMPT)
    for index, token in enumerate(made):
        assert token == sample(logits_after(loaded, ids), params, ids, step_seed(5, index))
        ids.append(token)
    other = dataclasses.replace(params, seed=6)
    assert list(text.generate_ids(loaded, PROMPT, other, chunk=chunk)) != made


def test_penalty_and_bias_reach_the_loop(loaded):
    plain = naive(loaded, PROMPT, 12)
    banned = greedy(12, logit_bias=dict.fromkeys(plain, -np.inf))
    assert not set(text.generate_ids(loaded, PROMPT, banned)) & set(plain)
    spread = list(text.generate_ids(loaded, PROMPT, greedy(12, repetition_penalty=100.0)))
    assert not set(spread) & set(PROMPT) and len(set(spread)) == 12


def test_padding_and_unused_rows_are_never_picked(loaded):
    blocked = _generate.blocked_ids(320, 266, [9])
    assert blocked[0] and blocked[9] and blocked[266:].all() and blocked.sum() == 2 + 54
    params = greedy(6, logit_bias={0: 1e6, 300: 1e6})
    assert list(text.generate_ids(loaded, PROMPT, params)) == naive(loaded, PROMPT, 6)


def test_another_length_in_the_same_bucket_compiles_nothing(make):
    loaded = make("gemma3", num_hidden_layers=1, layer_pattern="L")  # no other test compiles for it
    work = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: work.append(name) if name.startswith("/jax/core/compile") else None
    )
    for chunk in (1, 8):
        list(text.generate_ids(loaded, PROMPT[:9], greedy(4), chunk=chunk))
    assert work  # the listener does listen
    work.clear()
    for length in (3, 9, 14):
        for chunk in (1, 8):
            list(text.generate_ids(loaded, PROMPT[:length], greedy(length), end_ids=[300, length], chunk=chunk))
    assert not work


@pytest.mark.parametrize(
    ("ids", "says"),
    [([], "prompt 0 is empty"), ([2, 0, 5], "id 0 is padding"), ([2, 320], r"0\.\.319, got 320"), ([-1], "got -1")],
)
def test_prompts_that_cannot_be_read(loaded, ids, says):
    session = text.Session(loaded)
    with pytest.raises(PromptError, match=says):
        list(session.append(ids, greedy(2)))
    assert list(session.append(PROMPT, greedy(2))) == naive(loaded, PROMPT, 2)  # the session is as good as before


def test_nan_weights_are_reported(loaded):
    params = jax.tree.map(lambda x: x, loaded.params)
    params["final_norm"] = {"scale": jnp.full_like(params["final_norm"]["scale"], jnp.nan)}
    broken = dataclasses.replace(loaded, params=params)
    for chunk in (1, 7):
        with pytest.raises(SamplingError, match="not finite"):
            list(text.generate_ids(broken, PROMPT, greedy(4), chunk=chunk))


def test_a_failed_step_reads_everything_again(loaded, monkeypatch):
    session = text.Session(loaded)
    made = list(session.append(PROMPT, greedy(3)))

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_engine._loop, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(session.append([70], greedy(5)))
    transcript = [*PROMPT, *made, 70]
    first = naive(loaded, transcript, 1)
    assert session.ids == transcript + first
    assert list(session.append([71], greedy(3))) == naive(loaded, [*transcript, *first, 71], 3)


def test_bfloat16_runs(loaded):
    model = type(loaded.model).from_config(loaded.config, dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), loaded.params)
    half = dataclasses.replace(loaded, model=model, params=params)
    made = list(text.generate_ids(half, PROMPT, greedy(6), chunk=7))
    assert len(made) == 6 and all(0 < token < loaded.tokenizer.vocab_size for token in made)


def test_a_fork_leaves_the_original_alone(loaded):
    cuts, choice = _generate.picking(greedy(1), loaded, ())
    engine = _engine.Engine(loaded.model, loaded.params, 1, cache_length=64)
    arguments = dict(reserve=2, key=jax.random.key(0), u=np.zeros(1, np.float32))
    engine.start([PROMPT], cuts, choice, **arguments)
    held = list(engine.ids[0])
    for turn in ([70, 71], [80]):
        twin = engine.fork()
        twin.start([turn], cuts, choice, **arguments)
        assert twin.ids[0] == [*held, *turn, *naive(loaded, [*held, *turn], 1)]
    assert engine.ids[0] == held


def test_uniforms_need_a_seed_only_when_drawing():
    assert not _cuts.uniforms(SamplingParams(temperature=0), 0, 3).any()
