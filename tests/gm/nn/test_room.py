# SPDX-License-Identifier: Apache-2.0
"""More tokens than a cache has room for, and parameters of another model: one error each, never wrong numbers."""

import jax
import jax.numpy as jnp
import pytest

from gemma import gm, testing
from gemma.errors import ContextFull, ShapeError
from gemma.gm.text import _engine


@pytest.fixture(scope="module")
def tiny():
    model = gm.nn.Transformer.from_config(testing.tiny_config("gemma2"), dtype=jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 3), jnp.int32))["params"]
    return model, params


@pytest.mark.parametrize("windowed", [False, True])
def test_a_cache_that_is_full(tiny, windowed):
    model, params = tiny
    cache = model.init_cache(batch_size=2, dtype=jnp.float32, cache_length=4, windowed=windowed)
    tokens = jnp.array([[2, 5, 6, 7], [2, 5, 6, 7]])
    cache = jax.jit(model.apply)({"params": params}, tokens, cache=cache).cache
    with pytest.raises(ContextFull, match="5 tokens, but the context holds 4"):
        model.apply({"params": params}, jnp.array([[8], [9]]), cache=cache)


def test_a_chunk_longer_than_the_cache(tiny):
    model, params = tiny
    cache = model.init_cache(batch_size=1, dtype=jnp.float32, cache_length=4)
    for apply in (model.apply, jax.jit(model.apply)):
        with pytest.raises(ContextFull, match="6"):
            apply({"params": params}, jnp.ones((1, 6), jnp.int32), cache=cache)


def test_padding_takes_no_room_in_the_windowed_layout(tiny):
    model, params = tiny
    cache = model.init_cache(batch_size=1, dtype=jnp.float32, cache_length=4, windowed=True)
    out = model.apply({"params": params}, jnp.array([[2, 5, 6, 0, 0, 0]]), cache=cache)
    assert out.cache["layer_0"]["end_index"].tolist() == [3]


def test_parameters_of_another_model(tiny):
    model, params = tiny
    with pytest.raises(ShapeError, match=r'params\["params"\]'):
        _engine.check_params(model.config, {"params": params})
    with pytest.raises(ShapeError, match=r"input_embedding.*\(320, 72\).*\(321, 72\)"):
        table = jnp.zeros((321, 72))
        _engine.check_params(model.config, params | {"embedder": {"input_embedding": table}})
    with pytest.raises(ShapeError, match="4 layers, the parameters 3"):
        _engine.check_params(model.config, {k: v for k, v in params.items() if k != "layer_3"})
    with pytest.raises(ShapeError, match="NoneType"):
        _engine.check_params(model.config, None)
    _engine.check_params(model.config, params)
    with pytest.raises(ShapeError):  # and the engine asks, before anything is compiled
        _engine.Engine(model, {"params": params}, 1, cache_length=8)
