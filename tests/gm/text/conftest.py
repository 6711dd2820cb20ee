# SPDX-License-Identifier: Apache-2.0
"""Tiny random models with a tokenizer of bytes."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma import testing
from gemma.gm import ckpts, nn
from gemma.gm.text import LoadedModel


@pytest.fixture(autouse=True, scope="module")
def quick_compiles():
    """Tiny programs, each run a few times: compiling them is the cost, so XLA optimizes little."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@functools.cache
def tiny(family: str, folder: Path, **changes) -> LoadedModel:
    config = testing.tiny_config(family, **changes)
    # Layers that outweigh the embedding: a tied head would otherwise repeat the last token, which proves little.
    tensors = testing.random_tensors(config, std=0.4)
    testing.write_tiny_safetensors(folder, config, tensors=tensors | {"embed": tensors["embed"] * np.float32(0.1)})
    model = nn.Transformer.from_config(config, dtype=jnp.float32)
    return LoadedModel(model, ckpts.load_params(folder), testing.ByteTokenizer(), config, folder)


@pytest.fixture(scope="session")
def make(tmp_path_factory):
    """`make(family)`: a loaded tiny model, made once per session."""
    return functools.cache(lambda family="gemma3", **changes: tiny(family, tmp_path_factory.mktemp(family), **changes))


@pytest.fixture(scope="session")
def loaded(make) -> LoadedModel:
    """A local and a global layer of a Gemma 3: every trait, quickly compiled."""
    return make("gemma3", num_hidden_layers=2, layer_pattern="LG")


@pytest.fixture(scope="session")
def scripted(loaded):
    """A sampling method that says what it is told."""
    from jax_text_helpers import Scripted

    return Scripted(loaded.tokenizer)
