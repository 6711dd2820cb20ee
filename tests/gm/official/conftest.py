# SPDX-License-Identifier: Apache-2.0
"""Small models as a user of the official package would write them: a subclass of `Transformer` and a configuration."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from official_models import small_model

from gemma import gm, testing


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Tiny programs, each run a few times: compiling them is the cost, so XLA optimizes little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def small():
    """(model, params): a local layer (window 6) and a global one in float32, every parameter random."""
    return small_model()


@pytest.fixture(scope="session")
def talker():
    """(model, params, tokenizer) of a small model whose vocabulary is bytes and the marks of turns."""
    return *small_model(num_embed=320), testing.ByteTokenizer()


@pytest.fixture(scope="session")
def dummy():
    """(model, params) of `gm.testing.DummyGemma`."""
    model = gm.testing.DummyGemma()
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((5,), jnp.int32))["params"]
    return model, params


@pytest.fixture(scope="session")
def sampler(small):
    """`sampler(**changes)`: a Sampler of the small model; made once for each set of changes."""
    model, params = small

    @functools.cache
    def make(**changes):
        settings = dict(cache_length=128, max_out_length=16, pad_length=(16,)) | changes
        return gm.text.Sampler(model=model, params=params, tokenizer=gm.testing.DummyTokenizer(), **settings)

    return make
