# SPDX-License-Identifier: Apache-2.0
"""One step: accumulation, the guard against NaN, the moving average, wide masters, and what is trained at all."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_helpers import TRAINED, Bigram, batch, bigram_params, equal

from gemma.errors import ConfigError, ShapeError
from gemma.gm import train
from gemma.gm.train._state import init_state

SGD = optax.sgd(1.0, momentum=0.5)  # whose state after one step is the gradient
UNEVEN = [12, 1, 1, 2, 12, 1, 1, 1, 9, 1, 1, 1, 12, 12, 1, 1]


@dataclasses.dataclass(frozen=True)
class Quiet(Bigram):
    """Without noise: what is drawn depends on how a batch is cut."""

    def loss(self, params, batch, *, key, train):
        return super().loss(params, batch, key=key, train=False)


@dataclasses.dataclass(frozen=True)
class MeanOfMeans(Quiet):
    """What accumulation must not be."""

    def loss(self, params, batch, *, key, train):
        total, weight, metrics = super().loss(params, batch, key=key, train=train)
        return total / weight, jnp.float32(1), metrics


def stepped(objective, data, *, accumulate=1, trainable=TRAINED, optimizer=SGD, params=None, steps=1, **options):
    split = train.split_trainable(bigram_params() if params is None else params, trainable)
    names = ("master_dtype",)
    state = init_state(
        split.trainable,
        optimizer,
        ema="ema" in options,
        **{name: options.pop(name) for name in names if name in options},
    )
    step = train.make_step(objective, optimizer, accumulate=accumulate, **options)
    for _ in range(steps):
        state, metrics = step(state, split.frozen, data)
    return state, metrics


def gradient(objective, accumulate):
    state, metrics = stepped(objective, batch(16, labels=UNEVEN), accumulate=accumulate)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), state.opt_state[0].trace), metrics


def apart(one, other) -> float:
    """The longest difference over the longest gradient."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    return max(np.abs(a - b).max() for a, b in pairs) / max(np.abs(a).max() for a, _ in pairs)


def test_accumulation_is_one_big_batch():
    one, metrics = gradient(Quiet(), 1)
    assert metrics["weight"] == sum(UNEVEN)
    for parts in (4, 16):
        several, other = gradient(Quiet(), parts)
        assert apart(one, several) < 1e-6
        assert other["weight"] == metrics["weight"]
        np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-6)
    assert apart(one, gradient(MeanOfMeans(), 4)[0]) > 1e-2  # the check above can fail


def test_rows_that_parts_do_not_divide_are_refused():
    with pytest.raises(ShapeError, match="4 parts divide"):
        stepped(Quiet(), batch(6), accumulate=4)
    with pytest.raises(ConfigError, match="accumulate"):
        train.make_step(Quiet(), SGD, accumulate=0)


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    optimizer = train.make_optimizer(train.OptimizerConfig(learning_rate=0.1, schedule="linear", total_steps=9))
    schedule = train.make_schedule(train.OptimizerConfig(learning_rate=0.1, schedule="linear", total_steps=9))
    split = train.split_trainable(bigram_params(), TRAINED)
    step = train.make_step(Bigram(), optimizer, ema=0.5, schedule=schedule)
    state = init_state(split.trainable, optimizer, ema=True)
    rates = []
    for weigh in (1.0, np.nan, np.inf, 0.0, 1.0):
        before = jax.device_get(state)
        data = batch(labels=[0] * 4 if weigh == 0 else None) | {"weigh": np.float32(weigh)}
        state, metrics = step(state, split.frozen, data)
        good = weigh == 1
        assert metrics["skipped"] == (not good)
        assert equal((state.params, state.opt_state, state.ema), (before.params, before.opt_state, before.ema)) != good
        assert np.isfinite(jax.tree.leaves(state.params)[0]).all()
        rates.append(float(metrics["learning_rate"]))
    assert (int(state.step), int(state.skipped)) == (5, 3)
    assert rates[1:] == [rates[1]] * 4 and rates[1] < rates[0]  # the schedule waits


def test_the_moving_average_is_its_closed_form():
    split = train.split_trainable(bigram_params(), TRAINED)
    step = train.make_step(Bigram(), optax.sgd(0.5), ema=0.7)
    state = init_state(split.trainable, optax.sgd(0.5), ema=True)
    seen = [jax.device_get(state.params)]
    for n in range(6):
        state, _ = step(state, split.frozen, batch(seed=n))
        seen.append(jax.device_get(state.params))
    powers = [0.7**6] + [0.3 * 0.7 ** (6 - n) for n in range(1, 7)]
    expected = jax.tree.map(lambda *leaves: sum(p * leaf for p, leaf in zip(powers, leaves)), *seen)
    for ours, theirs in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_wide_master_keeps_small_updates():
    params = bigram_params("bfloat16")
    split = train.split_trainable(params, TRAINED)
    kinds = jax.tree.map(lambda leaf: leaf.dtype, split.trainable)
    tiny = optax.sgd(1e-3)
    wide, _ = stepped(
        Quiet(), batch(), params=params, optimizer=tiny, steps=20, master_dtype="float32", compute_dtype=kinds
    )
    narrow, _ = stepped(Quiet(), batch(), params=params, optimizer=tiny, steps=20)
    exact, _ = stepped(Quiet(), batch(), params=jax.tree.map(lambda leaf: leaf.astype("float32"), params), optimizer=tiny,
                       steps=20)  # fmt: skip
    start = np.asarray(params["out"]["w"], np.float32)
    moved = {name: np.abs(np.asarray(state.params["out"]["w"], np.float32) - start).sum() for name, state in
             dict(wide=wide, narrow=narrow, exact=exact).items()}  # fmt: skip
    assert wide.params["out"]["w"].dtype == jnp.float32 and narrow.params["out"]["w"].dtype == jnp.bfloat16
    assert moved["wide"] == pytest.approx(moved["exact"], rel=0.02)
    assert abs(moved["narrow"] / moved["exact"] - 1) > 0.1
    adam, _ = stepped(Quiet(), batch(), params=params, optimizer=optax.adam(1e-3))
    assert {leaf.dtype for leaf in jax.tree.leaves(adam.opt_state[0].nu)} == {jnp.dtype("float32")}


def test_the_trained_leaves_are_chosen_and_the_others_are_no_part_of_the_state():
    params = bigram_params() | {"packed": {"w": jnp.zeros((2, 2), jnp.int8)}}
    for wanted in ("out", ("out",), lambda name, leaf: name.startswith("out/")):
        split = train.split_trainable(params, wanted)
        assert set(split.trainable) == {"out"} and set(split.frozen) == {"in", "norm", "unused", "packed"}
        assert equal(train.merge_trainable(split.frozen, split.trainable), params)
    labels = jax.tree.map(lambda _: "freeze", params) | {"out": {"w": "train"}}
    assert equal(train.split_trainable(params, labels), split)
    assert set(train.split_trainable(params, "all").frozen) == {"packed"}
    state, _ = stepped(Bigram(), batch(), params=params, trainable="out")
    assert set(state.params) == {"out"}
    for wrong, text in (
        ("lorra", "lorra"),
        ("packed", "packed"),
        (lambda *_: False, "none"),
        ({"out": 1}, "tree like"),
    ):
        with pytest.raises(ConfigError, match=text):
            train.split_trainable(params, wrong)
