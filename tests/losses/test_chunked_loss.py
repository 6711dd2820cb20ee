# SPDX-License-Identifier: Apache-2.0
"""Chunked cross-entropy equals the one of all logits, in value and gradient, for every kind of head; and is smaller.

The reference builds all logits with `Head.__call__`, which is compared with the model's own in `test_model_losses.py`.
"""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma import quants
from gemma.errors import ConfigError, ShapeError
from gemma.gm import losses
from gemma.gm.losses import _chunked
from gemma.gm.losses._head import Head
from gemma.gm.nn import PackedArray

B, T, D, V = 4, 6, 32, 96


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three blocks of the table, so that their loop runs."""
    monkeypatch.setattr(_chunked, "_BLOCK_ROWS", 40)
    monkeypatch.setattr(_chunked, "_FEWEST_ROWS", 8)
    assert _chunked._largest_divisor(V) == 32


def random(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def batch(kept=0.5, seed=1):
    rng = np.random.default_rng(seed)
    mask = rng.random((B, T)) < kept
    mask[1] = False  # a row without labels
    targets = np.where(mask, rng.integers(0, V, (B, T)), -100)  # what does not count may be anything
    hidden = np.where(mask[..., None], rng.standard_normal((B, T, D)), np.nan).astype(np.float32)  # even NaN
    return jnp.asarray(hidden), jnp.asarray(targets), jnp.asarray(mask)


def packed_table():
    tensor = quants.quantize(np.asarray(random(V, D) * 0.3), quants.QuantType.Q8_0)
    return PackedArray.of(tensor, (V, D), (1, 1), jnp.float32)


HEADS = {
    "adapter": lambda: Head(random(V, D), random(V, 3, seed=2), random(3, D, seed=3), 0.5, 5.0),
    "bfloat16": lambda: Head(random(V, D, dtype=jnp.bfloat16), cap=30.0),
    "packed": lambda: Head(packed_table(), random(V, 2, seed=2), random(2, D, seed=3), 2.0),
}


def floats(head):
    """The leaves that a gradient is taken of, and how to put them back."""
    names = [name for name in ("table", "a", "b") if isinstance(getattr(head, name), jax.Array)]
    return {name: getattr(head, name) for name in names}


@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_are_those_of_all_logits(kind):
    head, (hidden, targets, mask) = HEADS[kind](), batch()
    place = random(B, T, seed=6)  # what each position counts is known to the backward pass only

    def full(leaves, hidden):
        logits = head.replace(**leaves)(jnp.where(mask[..., None], hidden, 0))
        log_p = jnp.where(mask, losses.logits_logps(logits, jnp.where(mask, targets, 0)), 0)
        return -log_p.sum() + jnp.sum(place * log_p)

    def chunked(leaves, hidden):
        whole = head.replace(**leaves)
        total, _ = losses.token_nll(whole, None, hidden, targets, mask, chunk=3, shards=2)
        return total + jnp.sum(place * losses.token_logps(whole, None, hidden, targets, mask, chunk=5))

    @jax.jit
    def both(leaves, hidden):
        return [jax.value_and_grad(function, argnums=(0, 1))(leaves, hidden) for function in (full, chunked)]

    (value, expected), (other, found) = both(floats(head), hidden)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    # The reference rounds slopes to bfloat16 before they meet a table of that dtype, the chunks on a CPU do not.
    tolerance = 1e-5 if kind != "bfloat16" else 2e-2
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a).max() > 0.1
        np.testing.assert_allclose(b, a, atol=tolerance * np.abs(a).max())


def test_against_numpy_with_weights():
    head, (hidden, targets, mask) = Head(random(V, D), cap=3.0), batch()
    weights = np.where(mask, np.random.default_rng(4).random((B, T)), 0).astype(np.float32)
    x = np.where(mask[..., None], hidden, 0).astype(np.float64) @ np.asarray(head.table, np.float64).T
    x = np.tanh(x / 3) * 3
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_p, np.where(mask, targets, 0)[..., None], -1)[..., 0]

    @jax.jit
    def ours(hidden):
        logits = head(jnp.where(mask[..., None], hidden, 0))
        mean = losses.sequence_logps(head, None, hidden, targets, mask, average=True)
        chunked = losses.token_nll(head, None, hidden, targets, weights, chunk=4)
        return *chunked, losses.cross_entropy(logits, targets, weights)[0], mean

    total, count, plain, mean = ours(hidden)
    np.testing.assert_allclose(total, (nll * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(count, weights.sum(), rtol=1e-6)
    np.testing.assert_allclose(plain, total, rtol=1e-6)
    np.testing.assert_allclose(mean, -np.where(mask, nll, 0).sum(1) / np.maximum(mask.sum(1), 1), rtol=1e-5)


def test_masked_positions_never_meet_the_head(monkeypatch):
    """As many rounds as the labels fill, none without labels, in one compiled program."""
    rounds, own = [], _chunked._chunk

    def counted(*args):
        jax.debug.callback(lambda: rounds.append(1))
        return own(*args)

    monkeypatch.setattr(_chunked, "_chunk", counted)
    head, traces = Head(random(V, D)), []

    @jax.jit
    def gradient(hidden, targets, mask):
        traces.append(1)
        return jax.value_and_grad(lambda h: losses.token_nll(head, None, h, targets, mask, chunk=4)[0])(hidden)

    for kept in (0.0, 0.3, 1.0):
        hidden, targets, mask = batch(kept)
        rounds.clear()
        value, slope = jax.block_until_ready(gradient(hidden, targets, mask))
        jax.effects_barrier()
        labels = int(mask.sum())
        assert len(rounds) == -(-labels // 4)
        assert not np.asarray(slope)[~np.asarray(mask)].any()
        assert bool(value > 0) == bool(labels)
    assert len(traces) == 1


def _products(function, *args) -> int:
    return str(jax.make_jaxpr(function)(*args)).count("dot_general")


def test_a_frozen_head_costs_no_gradient():
    head, (hidden, targets, mask) = Head(random(V, D)), batch()

    def loss(table, hidden):
        return losses.token_nll(head.replace(table=table), None, hidden, targets, mask)[0]

    def logps(table, hidden):
        return losses.sequence_logps(head.replace(table=table), None, hidden, targets, mask).sum()

    table = head.table
    for function, trained in ((loss, 3), (logps, 4)):  # logits, dh, dW; of rows: logits once more
        assert _products(function, table, hidden) == 1
        assert _products(jax.grad(function, argnums=1), table, hidden) == 2
        assert _products(jax.jit(jax.grad(function, argnums=1)), table, hidden) == 2
        assert _products(jax.grad(function, argnums=(0, 1)), table, hidden) == trained


def test_less_than_a_quarter_of_the_memory(monkeypatch):
    """The real vocabulary: bytes of temporaries, as the compiler reports them, and the values."""
    monkeypatch.undo()
    vocab, length, width = 262144, 24, 4
    table, hidden = random(vocab, width), random(1, length, width, seed=1)
    targets = jnp.asarray(np.random.default_rng(2).integers(0, vocab, (1, length)))
    place = jnp.arange(length)
    mask = ((place % 3 > 0) & (place // 4 != 2))[None]  # the third chunk has no label at all

    def full(hidden):
        return losses.cross_entropy(Head(table, cap=30.0)(hidden), targets, mask)[0]

    def chunked(hidden):
        return losses.token_nll(Head(table, cap=30.0), None, hidden, targets, mask, chunk=4)[0]

    found = []
    for function in (full, chunked):
        program = jax.jit(jax.value_and_grad(function)).lower(hidden).compile()
        found.append((program.memory_analysis().temp_size_in_bytes, *program(hidden)))
    (all_bytes, value, slope), (few_bytes, other, found_slope) = found
    assert all_bytes >= 4 * vocab * length and few_bytes < all_bytes / 4
    np.testing.assert_allclose(other, value, rtol=1e-5)
    np.testing.assert_allclose(found_slope, slope, atol=1e-5 * float(jnp.abs(slope).max()))


def test_bad_input_is_named():
    head, (hidden, targets, mask) = Head(random(V, D)), batch()
    with pytest.raises(ShapeError, match=r"targets: expected ids in 0..95 where mask is True, got -100"):
        losses.token_nll(head, None, hidden, targets, jnp.ones_like(mask))
    with pytest.raises(ShapeError, match=r"hidden: expected \[..., T, 32\]"):
        losses.token_nll(head, None, hidden[..., :5], targets, mask)
    with pytest.raises(ShapeError, match=r"mask: expected \(4, 6\)"):
        losses.sequence_logps(head, None, hidden, targets, mask[:, :2])
    with pytest.raises(ShapeError, match="targets: expected integers"):
        losses.token_nll(head, None, hidden, mask, mask)
    with pytest.raises(ShapeError, match="shards: 3 devices cannot share"):
        losses.token_nll(head, None, hidden, targets, mask, shards=3)
    with pytest.raises(ConfigError, match="chunk: expected a whole number"):
        losses.token_nll(head, None, hidden, targets, mask, chunk=0)
    with pytest.raises(ConfigError, match="model: expected a decoder"):
        losses.head(types.SimpleNamespace(), {})
    # under jit a label is not known: the loss says so
    loose = jax.jit(lambda targets: losses.token_nll(head, None, jnp.zeros_like(hidden), targets, jnp.ones_like(mask)))
    assert np.isnan(loose(targets)[0])
