# SPDX-License-Identifier: Apache-2.0
"""What a training step is made of: loss and every gradient of `gm.train.Supervised` against Hugging Face and torch.

Float32, every parameter random, rows of different length, labels on a part of the positions, longer than the window.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from parity_harness import BASES, VARIANTS, flatten, gap, pair

from gemma import gm, weights

LENGTH = 24


def rows(seed=5):
    """(tokens, targets, loss_mask): the second row ends early, and one label in three counts."""
    random = np.random.default_rng(seed)
    tokens = random.integers(3, 290, (2, LENGTH)).astype(np.int32)
    tokens[1, 17:] = 0
    mask = random.random((2, LENGTH)) < 0.34
    mask[:, -1] = mask[1, 16:] = False
    return tokens, np.roll(tokens, -1, axis=1), mask


def theirs(its, tokens, mask):
    """(loss, {path: gradient}) of the Hugging Face model; its label of position t + 1 is our target of t."""
    labels = np.full(tokens.shape, -100)
    labels[:, 1:][mask[:, :-1]] = tokens[:, 1:][mask[:, :-1]]
    its.hf.zero_grad()
    ids, seen = torch.tensor(tokens).long(), torch.tensor(tokens != 0).long()
    loss = its.hf(input_ids=ids, attention_mask=seen, labels=torch.tensor(labels)).loss
    loss.backward()
    state = {name: value.grad.numpy().copy() for name, value in its.hf.named_parameters() if name != "lm_head.weight"}
    its.hf.zero_grad()
    tree = weights.pack(weights.unpack(state, its.config, format="hf"), its.config, format="flax")
    return float(loss.detach()), tree


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.supports(VARIANTS[n].family, "JAX", "train")) for n in BASES]
)
def test_loss_and_gradients_are_hugging_faces(name):
    its = pair(name)
    tokens, targets, mask = rows()
    batch = dict(tokens=tokens, targets=targets, loss_mask=mask)
    objective = gm.train.Supervised(its.model)

    def loss(params):
        total, count, _ = objective.loss(params, batch, key=jax.random.key(0), train=True)
        return total / count

    options = {"xla_backend_optimization_level": 0}
    ours, grads = jax.jit(jax.value_and_grad(loss), compiler_options=options)(its.params)
    expected, wanted = theirs(its, tokens, mask)
    assert abs(float(ours) - expected) < 2e-6 * expected
    grads = flatten(grads)
    assert set(grads) == set(wanted)
    for path, value in wanted.items():
        found = np.asarray(grads[path])[tuple(slice(n) for n in value.shape)]  # rows of the table that pad it
        assert np.abs(value).max() > 0, path
        assert gap(found, value) < 1e-6 + 1e-4 * np.abs(value).max(), path
