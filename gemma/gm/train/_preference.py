# SPDX-License-Identifier: Apache-2.0
"""Objectives of preferences: pairs (`Preference`: DPO and its kin, NPO, ORPO, SimPO) and single answers (`Kto`).

What the untrained model makes of a batch comes in with the batch: `reference` computes it before the step, with the
base weights themselves where only adapters are trained. Formulas are `gm.losses`, supervised objectives `_objectives.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma.errors import ConfigError
from gemma.gm import losses
from gemma.gm.losses._preference import KINDS, mismatched
from gemma.gm.train._objectives import REFERENCE, Batch, Objective, Sums, base_of, dropout, real_rows
from gemma.gm.typing import Array, Params

_FREE = ("orpo", "simpo")  # of a reference
_MEANS = ("ipo", "sigmoid_norm", *_FREE)


@dataclasses.dataclass(frozen=True)
class Preference(Objective):
    """Pairs of a better and a worse answer, [B, 2, T]; the weight is the number of pairs.

    Attributes:
      model: see `Objective`.
      kind: "dpo" (or "sigmoid"), "ipo", "hinge" and the other kinds of `gm.losses.dpo`; "npo" (unlearns the rejected
        answers); "orpo" and "simpo", which need no reference.
      beta: strength, see the function of the kind; None: its default.
      label_smoothing: share of pairs that are taken to be the wrong way round.
      gamma: of SimPO, the margin.
      shards: see `Objective`.
    """

    model: Any
    kind: str = "dpo"
    beta: float | None = None
    label_smoothing: float = 0.0
    gamma: float = 1.0
    shards: int = 1

    def __post_init__(self):
        kinds = ("dpo", *KINDS, "npo", *_FREE)
        if self.kind not in kinds:
            raise ConfigError(f"kind: expected one of {', '.join(kinds)}, got {self.kind!r}")
        if self.label_smoothing and self.kind in ("npo", "orpo"):
            raise ConfigError(f"label_smoothing: {self.kind} has none; leave it at 0")

    @property
    def reference_fields(self) -> tuple[str, ...]:
        """See `Objective`."""
        return () if self.kind in _FREE else (REFERENCE,)

    def loss(self, params: Params, batch: Batch, *, key: Array, train: bool) -> tuple[Array, Array, Sums]:
        """See `Objective`. The batch is "preference"; metrics: accuracies, margins, rewards_chosen, rewards_rejected."""
        logps = self._logps(self.model, params, batch, dropout(key, train))
        beta = {} if self.beta is None else dict(beta=self.beta)
        if self.kind == "orpo":
            each, metrics = losses.orpo(logps, **beta)
        elif self.kind == "simpo":
            each, metrics = losses.simpo(logps, gamma=self.gamma, label_smoothing=self.label_smoothing, **beta)
        elif self.kind == "npo":
            each, metrics = losses.npo(logps[:, 1], batch[REFERENCE][:, 1], **beta)
        else:
            kind = "sigmoid" if self.kind == "dpo" else self.kind
            each, metrics = losses.dpo(logps, batch[REFERENCE], kind=kind, label_smoothing=self.label_smoothing, **beta)
        return row_sums(each, metrics, real_rows(batch, 3))

    def reference(self, params: Params, batch: Batch) -> dict[str, Array]:
        """See `Objective`: reference_logps [B, 2]."""
        return {REFERENCE: self._logps(*base_of(self.model, params), batch, None)}

    def _logps(self, model: Any, params: Params, batch: Batch, rngs: Any) -> Array:
        hidden = losses.hidden_states(model, params, batch, rngs=rngs)
        how = dict(average=self.kind in _MEANS, shards=self.shards)
        return losses.sequence_logps(model, params, hidden, batch["targets"], batch["loss_mask"], **how)


@dataclasses.dataclass(frozen=True)
class Kto(Objective):
    """Answers that are good or bad, without pairs; the weight is the number of rows.

    The point that rewards are measured from is that of the rows that are in memory together, as in TRL: of a part of the
    batch where gradients are accumulated.

    Attributes:
      model: see `Objective`.
      beta: see `gm.losses.kto`, likewise the next three.
      desirable_weight: see there.
      undesirable_weight: see there.
      kind: see there.
      shards: see `Objective`.
    """

    model: Any
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kind: str = "kto"
    shards: int = 1

    @property
    def reference_fields(self) -> tuple[str, ...]:
        """See `Objective`. Those with `kl` are of answers to the prompts of other rows."""
        own = (REFERENCE,)
        return own if self.kind != "kto" else (*own, "kl_tokens", "kl_targets", "kl_mask", "kl_logps")

    def loss(self, params: Params, batch: Batch, *, key: Array, train: bool) -> tuple[Array, Array, Sums]:
        """See `Objective`. The batch is "KTO"; metrics: accuracies, rewards, kl."""
        logps = self._logps(self.model, params, batch, dropout(key, train))
        rows, kl = real_rows(batch, 2), 0.0
        if self.kind == "kto":
            # No gradient flows through the reference point: nothing of this pass is kept.
            other = self._logps(self.model, jax.lax.stop_gradient(params), _swapped(batch), None)
            some = jnp.any(batch["kl_mask"], axis=1)
            gained = jnp.sum(jnp.where(some, other - batch["kl_logps"], 0.0))
            kl = jnp.maximum(gained / jnp.maximum(jnp.sum(some, dtype=jnp.float32), 1.0), 0.0)
        weights = dict(desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight)
        each, metrics = losses.kto(
            logps, batch[REFERENCE], batch["good"], kl, beta=self.beta, kind=self.kind, **weights
        )
        return row_sums(each, metrics, rows)

    def reference(self, params: Params, batch: Batch) -> dict[str, Array]:
        """See `Objective`."""
        model, params = base_of(self.model, params)
        found = {REFERENCE: self._logps(model, params, batch, None)}
        if self.kind == "kto":
            found |= {f"kl_{name.removeprefix('loss_')}": value for name, value in mismatched(batch).items()}
            found["kl_logps"] = self._logps(model, params, _swapped({**batch, **found}), None)
        return found

    def _logps(self, model: Any, params: Params, batch: Batch, rngs: Any) -> Array:
        hidden = losses.hidden_states(model, params, batch, rngs=rngs)
        return losses.sequence_logps(model, params, hidden, batch["targets"], batch["loss_mask"], shards=self.shards)


def _swapped(batch: Batch) -> dict[str, Any]:
    other = {"tokens": batch["kl_tokens"], "targets": batch["kl_targets"], "loss_mask": batch["kl_mask"]}
    return {**batch, **other}


def row_sums(each: Array, metrics: Mapping[str, Array], rows: Array) -> tuple[Array, Array, Sums]:
    """Losses and metrics of each row, [B], as sums over the rows that count."""
    count = jnp.sum(rows, dtype=jnp.float32)
    sums = {name: (jnp.sum(jnp.where(rows, value, 0.0)), count) for name, value in metrics.items()}
    return jnp.sum(jnp.where(rows, each, 0.0)), count, sums
