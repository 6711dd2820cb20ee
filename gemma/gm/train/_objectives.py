# SPDX-License-Identifier: Apache-2.0
"""Objectives: what a step minimizes, as a sum over labels or rows and the number of them.

    objective = Supervised(model)
    loss_sum, weight, metrics = objective.loss(params, batch, key=key, train=True)

The formulas are `gm.losses`; here they meet a model and a batch of `gm.data`. Gradients and the division of the two
sums are `_step.py`. Axis letters: B rows, T tokens, D width, V ids.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import ConfigError, ShapeError
from gemma.gm import losses
from gemma.gm.nn import LoRA
from gemma.gm.train._scores import label_scores
from gemma.gm.typing import Array, Params
from gemma.peft import split_params

Batch = Mapping[str, Any]
Sums = dict[str, tuple[Array, Array]]

REFERENCE = "reference_logps"  # a field of batches that `Objective.reference` fills


class Objective(abc.ABC):
    """What is minimized. Subclasses are frozen dataclasses with a `model`; they hold no arrays.

    Attributes:
      model: a network of `gm.nn`, or a wrapper of one.
      shards: a field of those that look at all positions: over how many devices rows are spread. The result is the same
        for every number; `Trainer` fills it in.
    """

    model: Any

    @property
    def reference_fields(self) -> tuple[str, ...]:
        """Fields of a batch that hold what the untrained model makes of it; none where it is not asked."""
        return ()

    @abc.abstractmethod
    def loss(self, params: Params, batch: Batch, *, key: Array, train: bool) -> tuple[Array, Array, Sums]:
        """The loss of a batch, as sums: batches may be cut or joined, and the sums of their parts added.

        Args:
          params: the whole tree, trained and frozen leaves.
          batch: arrays of `gm.data.Loader`.
          key: for dropout, in training only.
          train: False: no dropout, and metrics that would slow a step down.

        Returns:
          float32 [], the sum; float32 [], the number of labels or rows in it; and (sum, number) of each metric.
        """

    def reference(self, params: Params, batch: Batch) -> dict[str, Array]:
        """The fields `reference_fields`, computed with the untrained parameters."""
        del params, batch
        return {}


@dataclasses.dataclass(frozen=True)
class Supervised(Objective):
    """Cross-entropy of the labels, nats per label; accuracy among all ids where it evaluates.

    Attributes:
      model: see `Objective`.
      shards: see `Objective`.
    """

    model: Any
    shards: int = 1

    def loss(self, params: Params, batch: Batch, *, key: Array, train: bool) -> tuple[Array, Array, Sums]:
        """See `Objective`. The batch is "supervised", packed or not."""
        hidden = losses.hidden_states(self.model, params, batch, rngs=dropout(key, train))
        if train:
            labels = batch["targets"], batch["loss_mask"]
            total, count = losses.token_nll(self.model, params, hidden, *labels, shards=self.shards)
            return total, count, {}
        head = losses.head(self.model, params)
        total, count, right = label_scores(head, hidden, batch["targets"], batch["loss_mask"])
        return total, count, {"accuracy": (right, count)}


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """Cross-entropy of one label token per row; accuracy among the labels.

    Attributes:
      model: see `Objective`.
      label_ids: the token of each label, `Loader.label_ids`.
      among_labels: probabilities among the labels only. False: among all ids, so that the model that is trained also
        says the label when it is asked in a chat.
    """

    model: Any
    label_ids: tuple[int, ...]
    among_labels: bool = False

    def __post_init__(self):
        object.__setattr__(self, "label_ids", tuple(int(i) for i in np.asarray(self.label_ids).reshape(-1)))
        if len(set(self.label_ids)) < max(len(self.label_ids), 2):
            raise ConfigError(f"label_ids: expected two different tokens or more, got {list(self.label_ids)}")

    def loss(self, params: Params, batch: Batch, *, key: Array, train: bool) -> tuple[Array, Array, Sums]:
        """See `Objective`. The batch is "classification"."""
        hidden = losses.hidden_states(self.model, params, batch, rngs=dropout(key, train))
        here = jnp.argmax(batch["loss_mask"], axis=1)  # the one position whose next token is the label
        rows = jnp.any(batch["loss_mask"], axis=1)
        logits = losses.head(self.model, params)(jnp.take_along_axis(hidden, here[:, None, None], axis=1)[:, 0])
        logits = logits.astype(jnp.float32)
        few = jnp.take(logits, jnp.asarray(self.label_ids, jnp.int32), axis=1)
        at_label = jnp.take_along_axis(few, batch["label"][:, None], axis=1)[:, 0]
        nll = jax.nn.logsumexp(few if self.among_labels else logits, axis=1) - at_label
        count = jnp.sum(rows, dtype=jnp.float32)
        right = jnp.sum(rows & (jnp.argmax(few, axis=1) == batch["label"]), dtype=jnp.float32)
        return jnp.sum(jnp.where(rows, nll, 0.0)), count, {"accuracy": (right, count)}


def dropout(key: Array, train: bool) -> dict[str, Array] | None:
    """The random streams of a forward pass."""
    return {"dropout": key} if train else None


def base_of(model: Any, params: Params) -> tuple[Any, Params]:
    """The model and parameters without their adapters: what an adapter is compared with."""
    return (model.model, split_params(params).original) if isinstance(model, LoRA) else (model, params)


def real_rows(batch: Batch, axes: int) -> Array:
    """bool [B]: rows with a label in each of their sequences; the others only fill the batch up."""
    mask = jnp.asarray(batch["loss_mask"])
    if mask.ndim != axes:
        raise ShapeError(f"loss_mask: expected {axes} axes, got the shape {tuple(mask.shape)}")
    some = jnp.any(mask, axis=-1)
    return some if axes == 2 else jnp.all(some, axis=1)
