# SPDX-License-Identifier: Apache-2.0
"""What a layer forgets is really forgotten in the compiled program, and is the same when it is computed again."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gemma.gm.nn import _remat

LAYERS, WIDTH, WIDER, TOKENS = 4, 128, 1024, 64  # products over 128 values and more are those that "dots" keeps


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        first = self.param("first", nn.initializers.zeros, (WIDTH, WIDER))
        second = self.param("second", nn.initializers.zeros, (WIDER, WIDTH))
        inner = x @ first
        inner = jnp.tanh(inner) * jnp.cos(inner) + jnp.sin(inner)
        inner = nn.Dropout(0.3)(inner, deterministic=False)
        return None, x + (inner @ second) * mask[..., None]


class Network(nn.Module):
    how: str

    @nn.compact
    def __call__(self, x, mask):
        call = {
            "none": lambda f: f,
            "block": _remat.checkpoint,
            "dots": functools.partial(_remat.checkpoint, policy=_remat.products),
        }[self.how](Layer.__call__)
        for _ in range(LAYERS):
            _, x = call(Layer(parent=self), x, mask)
        return x


@pytest.fixture(scope="module")
def compiled():
    """Value, gradients and temporary bytes by the way of remembering."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, TOKENS, WIDTH)), jnp.float32)
    mask = jnp.asarray(rng.random((2, TOKENS)) < 0.8)
    keys = dict(params=jax.random.key(0), dropout=jax.random.key(1))
    shapes = jax.eval_shape(Network("none").init, keys, x, mask)["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.03, leaf.shape), jnp.float32), shapes)
    frozen = {name: {"first": leaf["first"]} for name, leaf in params.items()}
    trained = {name: {"second": leaf["second"]} for name, leaf in params.items()}
    found = {}
    for how in ("none", "block", "dots"):

        def loss(trained, x, frozen, how=how):
            params = {name: frozen[name] | trained[name] for name in frozen}
            return jnp.mean(
                jnp.square(Network(how).apply({"params": params}, x, mask, rngs={"dropout": keys["dropout"]}))
            )

        program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(trained, x, frozen).compile()
        found[how] = (*program(trained, x, frozen), program.memory_analysis().temp_size_in_bytes)
    return found


def test_forgetting_changes_no_number(compiled):
    value, grads, _ = compiled["none"]
    for how in ("block", "dots"):
        other, found, _ = compiled[how]
        assert float(other) == pytest.approx(float(value), rel=1e-6)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(found), strict=True):
            assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a) > 0


def test_forgetting_frees_memory(compiled):
    """`jax.checkpoint` fails this on a CPU: its second computations all run before the first gradient."""
    one = 2 * TOKENS * WIDER * 4  # bytes of one wide activation
    none, block, dots = (compiled[how][2] for how in ("none", "block", "dots"))
    assert none > LAYERS * 2 * one
    assert max(block, dots) < 0.6 * none and block <= dots
