# SPDX-License-Identifier: Apache-2.0
"""One model, three counts: the formula of the configuration, the table of weights, and the shapes that the JAX network
really creates. They agree for every model, vision towers included, after the known difference in the rows of the
vocabulary."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest
from parity_harness import flatten_shapes

from gemma import gm
from gemma.config import PRESETS, text_only
from gemma.weights import tensors

# The totals of the published checkpoints (a tied head counted once).
PUBLISHED = {
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 4_300_079_472,
    "gemma3_12b": 12_187_325_040,
    "gemma3_27b": 27_432_406_640,
}
CLASSES = {
    "gemma_2b": "Gemma_2B",
    "gemma_7b": "Gemma_7B",
    "gemma2_2b": "Gemma2_2B",
    "gemma2_9b": "Gemma2_9B",
    "gemma2_27b": "Gemma2_27B",
    "gemma3_270m": "Gemma3_270M",
    "gemma3_1b": "Gemma3_1B",
    "gemma3_4b": "Gemma3_4B",
    "gemma3_12b": "Gemma3_12B",
    "gemma3_27b": "Gemma3_27B",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_formula_equals_the_published_total(name):
    assert PRESETS[name].num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", CLASSES)
def test_formula_table_and_network_agree(name):
    config = PRESETS[name]
    table = tensors(config)
    assert sum(math.prod(tensor.shape) for tensor in table) == config.num_parameters

    model = getattr(gm.nn, CLASSES[name])()
    tree = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    shapes = flatten_shapes(tree)
    extra_rows = (config.table_rows - config.vocab_size) * config.hidden_size
    assert sum(math.prod(shape) for shape in shapes.values()) == config.num_parameters + extra_rows

    named = {tensor.slots["flax"].name for tensor in table}
    assert named == set(shapes)


# What the official package counts: its table has no rows for the image tokens.
OFFICIAL = {"Gemma3_4B": 4_299_915_632, "Gemma3_12B": 12_187_079_280, "Gemma3_27B": 27_432_062_576}


@pytest.mark.parametrize("name", OFFICIAL)
def test_trees_with_and_without_the_tower(name):
    config = PRESETS[name.lower()]
    missing = (config.vocab_size - config.table_rows) * config.hidden_size
    assert config.num_parameters - missing == OFFICIAL[name]

    text = getattr(gm.nn, name)(text_only=True)
    tree = jax.eval_shape(text.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    size = sum(math.prod(shape) for shape in flatten_shapes(tree).values())
    assert size == text_only(config).num_parameters - missing
