# SPDX-License-Identifier: Apache-2.0
"""Optimizers against optax and torch, schedules against their formulas, and what never decays."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma.errors import ConfigError
from gemma.gm import train

PEAK = 0.5


def config(**fields):
    return train.OptimizerConfig(**(dict(learning_rate=PEAK, schedule="constant", clip_norm=None) | fields))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_schedules_are_exact_at_their_corners(kind):
    warm, total, end = 4, 24, 0.1
    schedule = train.make_schedule(
        config(schedule=kind, warmup_steps=warm, total_steps=total, end_ratio=end, decay_share=0.25)
    )
    assert schedule(0) == pytest.approx(PEAK / 5, rel=1e-6)
    assert schedule(warm - 1) == pytest.approx(PEAK * 4 / 5, rel=1e-6)
    assert schedule(warm) == pytest.approx(PEAK, rel=1e-6)
    start = {"wsd": 18}.get(kind, warm)
    gone = (total - 1 - start) / (total - start)
    last = {"constant": 1.0, "cosine": end + (1 - end) * (1 + math.cos(math.pi * gone)) / 2}
    assert schedule(total - 1) == pytest.approx(PEAK * last.get(kind, end + (1 - end) * (1 - gone)), rel=1e-5)
    assert schedule(total) == schedule(total + 9) == pytest.approx(PEAK * (1 if kind == "constant" else end), rel=1e-6)
    if kind == "wsd":
        assert schedule(18) == PEAK > schedule(19)
    assert jax.jit(schedule)(jnp.int32(warm)) == pytest.approx(PEAK)


def test_without_a_warm_up_the_first_step_is_whole():
    assert train.make_schedule(config(schedule="cosine", total_steps=9))(0) == PEAK


def test_adamw_is_that_of_optax_and_torch():
    torch = pytest.importorskip("torch")
    fields = dict(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1)
    rng = np.random.default_rng(0)
    first = {"a": {"w": rng.normal(size=(3, 4))}, "norm": {"scale": rng.normal(size=4)}}
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), first)
    ours = train.make_optimizer(config(learning_rate=0.001, **fields))
    mask = {"a": {"w": True}, "norm": {"scale": False}}
    theirs = optax.adamw(0.001, **fields, mask=mask)
    # In double precision: float32 rounds torch's factor 1 - 0.001 * 0.1 the same way at each of 100 steps.
    tensors = [torch.tensor(np.asarray(leaf, np.float64)) for leaf in (first["a"]["w"], first["norm"]["scale"])]
    groups = [dict(params=[tensors[0]], weight_decay=0.1), dict(params=[tensors[1]], weight_decay=0.0)]
    peer = torch.optim.AdamW(groups, lr=0.001, betas=(0.8, 0.95), eps=1e-6)

    @jax.jit
    def both(params, states, grads):
        new = [rule.update(grads, state, p) for rule, state, p in zip((ours, theirs), states, params)]
        return [optax.apply_updates(p, update) for p, (update, _) in zip(params, new)], [state for _, state in new]

    params, states = [first, first], [ours.init(first), theirs.init(first)]
    for _ in range(100):
        grads = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), first)
        params, states = both(params, states, grads)
        for tensor, grad in zip(tensors, (grads["a"]["w"], grads["norm"]["scale"])):
            tensor.grad = torch.tensor(grad, dtype=torch.float64)
        peer.step()
    for mine, other, torchs in zip(*map(jax.tree.leaves, params), tensors):
        np.testing.assert_array_equal(mine, other)
        np.testing.assert_allclose(mine, torchs.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd", "lion"])
def test_only_weights_decay(name):
    leaves = {
        "attn": {
            "w": (2, 3),
            "bias": (2, 3),
            "_query_norm": {"scale": (3,)},
            "lora": {"a": (2, 2), "magnitude": (2, 3)},
        },
        "LayerNorm_0": {"scale": (2, 2)},
    }
    params = jax.tree.map(jnp.ones, leaves, is_leaf=lambda leaf: isinstance(leaf, tuple))
    optimizer = train.make_optimizer(config(name=name, weight_decay=0.1))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for path, leaf in jax.tree.leaves_with_path(updates):
        kept = jax.tree_util.keystr(path, simple=True, separator="/") not in ("attn/w", "attn/lora/a")
        np.testing.assert_allclose(leaf, 0.0 if kept else -PEAK * 0.1, rtol=1e-6)


def test_gradients_are_clipped_by_their_common_norm():
    optimizer = train.make_optimizer(config(name="sgd", momentum=0.0, clip_norm=2.0))
    grads = {"a": jnp.full((3, 4), 3.0), "b": jnp.full((4,), 3.0)}  # together 12 long
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    np.testing.assert_allclose(updates["a"], -PEAK * 3.0 * 2 / 12, rtol=1e-6)
    assert optax.global_norm(updates) == pytest.approx(PEAK * 2)


@pytest.mark.parametrize(
    "fields",
    [
        dict(name="adam"),
        dict(schedule="step"),
        dict(learning_rate=float("nan")),
        dict(weight_decay=-1.0),
        dict(clip_norm=0.0),
        dict(total_steps=0),
        dict(schedule="cosine", warmup_steps=5, total_steps=5),
    ],
)
def test_settings_that_make_no_sense_are_named(fields):
    with pytest.raises(ConfigError, match=next(iter(set(fields) & {"warmup_steps"}), next(iter(fields)))):
        config(**fields)


def test_a_schedule_that_ends_has_to_know_where():
    with pytest.raises(ConfigError, match="total_steps"):
        train.make_optimizer(config(schedule="cosine"))
