# SPDX-License-Identifier: Apache-2.0
"""Rows, a loader whose position is one number, checkpoints in memory, and an objective that compiles at once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma.gm import train

IDS, LENGTH, WIDTH = 64, 12, 6


def batch(rows: int = 4, seed: int = 0, labels=None):
    """Random rows; row r has as many labels as `labels` says, else all."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(10, IDS, (rows, LENGTH + 1)).astype(np.int32)
    mask = np.ones((rows, LENGTH), bool)
    if labels is not None:
        mask = np.arange(LENGTH)[None] >= LENGTH - np.asarray(labels)[:, None]
    positions = np.array(np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, LENGTH)))
    return dict(tokens=ids[:, :-1], targets=ids[:, 1:], loss_mask=mask, positions=positions)


@dataclasses.dataclass
class Rows:
    """Batch n is drawn with seed n; `change(n, batch)` may spoil some of them."""

    rows: int = 4
    count: int | None = None
    epochs: int | None = None
    seed: int = 0
    change: Any = None

    def __iter__(self):
        return Position(self)


@dataclasses.dataclass
class Position:
    of: Rows
    at: int = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.of.count is not None and self.at >= self.of.count:
            raise StopIteration
        self.at += 1
        made = batch(self.of.rows, self.of.seed + self.at)
        return self.of.change(self.at, made) if self.of.change else made

    def get_state(self):
        return {"at": self.at}

    def set_state(self, state):
        self.at = state["at"]


@dataclasses.dataclass(frozen=True)
class Bigram(train.Objective):
    """Predicts a token from the one before it, through a few numbers and with noise like dropout; `weigh` is optional."""

    model: Any = None

    def loss(self, params, batch, *, key, train):
        inner = params["in"]["w"][batch["tokens"]]
        if train:
            inner = inner * jax.random.bernoulli(key, 0.9, inner.shape)
        logits = (inner * params["norm"]["scale"]).astype(jnp.float32) @ params["out"]["w"].astype(jnp.float32)
        nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        nll = nll * batch.get("weigh", 1.0)
        return jnp.sum(nll * batch["loss_mask"]), jnp.sum(batch["loss_mask"], dtype=jnp.float32), {}


def bigram_params(dtype="float32"):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(0, 0.3, shape), dtype)

    return {
        "in": {"w": normal(IDS, WIDTH)},
        "norm": {"scale": 1 + normal(WIDTH)},
        "out": {"w": normal(WIDTH, IDS)},
        "unused": {"w": normal(3)},
    }


TRAINED = ("in", "norm", "out")


def equal(a, b) -> bool:
    """Whether two trees have the same bytes."""
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(*leaves, strict=True)
    )
