# SPDX-License-Identifier: Apache-2.0
"""Sampling on the device against the numpy sampler that defines it, and the official methods against their rules."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma import sampling as reference
from gemma.errors import SamplingError
from gemma.gm import text
from gemma.gm.text import _cuts
from gemma.sampling import SamplingParams

HISTORY = [1, 2, 3, 2, 5]
V = 1000  # no multiple of the block of 512

PARAMS = {
    "greedy": SamplingParams(temperature=0, repetition_penalty=1.5, logit_bias={9: 30.0}),
    "plain": SamplingParams(seed=1),
    "hot": SamplingParams(temperature=3.0, seed=2**64 - 1),
    "top_k": SamplingParams(top_k=40, seed=2),
    "top_k_all": SamplingParams(top_k=5000, seed=2),
    "top_p": SamplingParams(top_p=0.9, seed=3),
    "top_p_0": SamplingParams(top_p=0.0, seed=3),
    "top_p_tiny": SamplingParams(top_p=1e-6, seed=3),
    "min_p": SamplingParams(min_p=0.05, seed=4),
    "bias": SamplingParams(logit_bias={3: 5.0, 7: -np.inf, 999: -2.0}, seed=5),
    "penalty": SamplingParams(repetition_penalty=1.3, seed=6),
    "all": SamplingParams(
        temperature=0.7, top_k=50, top_p=0.95, min_p=0.02, repetition_penalty=0.8, logit_bias={3: 5.0}, seed=7
    ),
}
# Rounded logits have hundreds of ties at every bound; the last kind has few finite logits.
KINDS = ("smooth", "ties", "few")


def single(params: SamplingParams, vocab_size: int):
    """`from_params` of one row, without its axis."""
    cuts, knobs = _cuts.from_params([params], vocab_size)
    return cuts, _cuts.Knobs(*(value[0] for value in knobs))


def logits_of(kind: str) -> np.ndarray:
    values = (np.random.default_rng(KINDS.index(kind)).standard_normal(V) * 3).astype(np.float32)
    if kind == "ties":
        values = np.round(values)
    if kind == "few":
        values[np.arange(V) % 100 != 0] = -np.inf
    return values


process = functools.partial(jax.jit, static_argnums=1)(_cuts.process)  # compiled once for all with the same cuts
draw = functools.partial(jax.jit, static_argnums=1)(_cuts.draw)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PARAMS)
def test_equals_the_numpy_sampler(name, kind):
    params, logits = PARAMS[name], logits_of(kind)
    cuts, knobs = single(params, V)
    seen = np.zeros(V, bool)
    seen[HISTORY] = True
    got = np.asarray(process(logits, cuts, knobs, seen))
    expected = reference.process_logits(logits, params, HISTORY)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    kept = np.isfinite(expected)
    # two float32 roundings (penalty, temperature) of numbers up to 35: a few units in the last place
    np.testing.assert_allclose(got[kept], expected[kept], rtol=1e-6)
    for index, u in enumerate(_cuts.uniforms(params, 0, 50)):
        rng = reference.step_seed(params.seed or 0, index)
        assert int(draw(got, cuts, u)) == reference.sample(logits, params, HISTORY, rng)


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    cuts, knobs = single(SamplingParams(), 4)
    del knobs
    u = (np.arange(4000, dtype=np.float32) + 0.5) / 4000
    picked = jax.vmap(lambda u: _cuts.draw(jnp.asarray(logits), cuts, u))(u)
    np.testing.assert_array_equal(np.bincount(picked, minlength=4), [2000, 1000, 500, 500])


def test_draw_at_the_ends():
    scores = np.full(1200, -np.inf, np.float32)
    scores[[7, 700]] = 0.0
    cuts, _ = single(SamplingParams(), 1200)
    for u, token in ((0.0, 7), (0.49, 7), (0.5, 700), (1 - 2.0**-24, 700), (1.0, 700)):
        assert int(_cuts.draw(jnp.asarray(scores), cuts, np.float32(u))) == token


def test_uniforms_depend_on_seed_and_index_only():
    params = SamplingParams(seed=11)
    whole = _cuts.uniforms(params, 0, 10)
    np.testing.assert_array_equal(whole[4:7], _cuts.uniforms(params, 4, 3))
    assert (whole < 1).all() and len(set(whole)) == 10
    assert (whole != _cuts.uniforms(SamplingParams(seed=12), 0, 10)).all()


def test_changing_a_value_compiles_nothing():
    traced = []

    @jax.jit
    def run(logits, knobs):
        traced.append(1)
        return _cuts.process(logits, cuts, knobs, None)

    for p, t in ((0.9, 1.0), (0.5, 0.7), (0.1, 2.0)):
        cuts, knobs = single(SamplingParams(top_p=p, temperature=t), V)
        run(logits_of("smooth"), knobs)
    assert len(traced) == 1


def test_a_bias_outside_of_the_vocabulary():
    with pytest.raises(SamplingError, match=r"0\.\.999, got 1000"):
        single(SamplingParams(logit_bias={1000: 1.0}), V)


METHODS = [
    text.Greedy(),
    text.RandomSampling(temperature=0.5),
    text.TopkSampling(k=3),
    text.TopPSampling(p=0.5),
    text.MinPSampling(p=0.5),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_methods_take_any_batch(method, batch):
    logits = np.random.default_rng(0).standard_normal((*batch, 50)).astype(np.float32)
    got = method.get_next_tokens(jnp.asarray(logits), jax.random.key(0))
    assert got.shape == batch and jnp.issubdtype(got.dtype, jnp.integer)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_methods_are_static_arguments(method):
    assert hash(method) == hash(type(method)(**vars(method))) and method == type(method)(**vars(method))


def drawn(method, logits, count=400) -> set[int]:
    keys = jax.random.split(jax.random.key(1), count)
    picked = jax.vmap(lambda key: method.get_next_tokens(jnp.asarray(logits, jnp.float32), key))(keys)
    return set(np.asarray(picked).tolist())


def test_what_methods_may_draw():
    logits = np.log([0.4, 0.3, 0.2, 0.06, 0.04])
    assert drawn(text.Greedy(), logits) == {0}
    assert drawn(text.RandomSampling(), logits) == {0, 1, 2, 3, 4}
    assert drawn(text.TopkSampling(k=2), logits) == {0, 1}
    assert drawn(text.TopkSampling(k=99), logits) == {0, 1, 2, 3, 4}
    assert drawn(text.TopPSampling(p=0.6), logits) == {0, 1}  # the token that crosses p stays
    assert drawn(text.TopPSampling(p=0.8), logits) == {0, 1, 2}
    assert drawn(text.TopPSampling(p=1.0), logits) == {0, 1, 2, 3, 4}
    assert drawn(text.TopPSampling(p=0.0), logits) == {0}
    assert drawn(text.TopPSampling(p=0.3), np.zeros(5)) == {0, 1, 2, 3, 4}  # ties at the bound stay
    assert drawn(text.MinPSampling(p=0.4), logits) == {0, 1, 2}


def test_greedy_takes_the_first_of_equals():
    assert int(text.Greedy().get_next_tokens(jnp.asarray([1.0, 5.0, 5.0]), jax.random.key(0))) == 1


def test_temperature_changes_the_cut():
    logits = np.log([0.6, 0.3, 0.1])
    assert drawn(text.TopPSampling(p=0.5, temperature=1.0), logits) == {0}
    assert drawn(text.TopPSampling(p=0.5, temperature=100.0), logits) == {0, 1}


@pytest.mark.parametrize(
    "make",
    [
        lambda: text.RandomSampling(temperature=0.0),
        lambda: text.TopPSampling(temperature=-1.0),
        lambda: text.TopPSampling(p=1.5),
        lambda: text.TopkSampling(k=0),
        lambda: text.MinPSampling(p=float("nan")),
    ],
)
def test_out_of_range(make):
    with pytest.raises(SamplingError, match="expected a"):
        make()
