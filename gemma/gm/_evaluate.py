# SPDX-License-Identifier: Apache-2.0
"""How well a model predicts a text, and how far it is from another model: perplexity, KL divergence, same choice.

Logits are made for a few tokens at a time, so nothing of the size tokens x vocabulary exists. Cutting the text into
windows is `_windows.py`; the command line is `gemma/cli/eval.py`. Axis letters: B windows, T tokens, D width, V ids.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gemma.errors import CheckpointError, ShapeError
from gemma.gm import losses
from gemma.gm._windows import Batch
from gemma.gm.typing import Array, Params

_ROWS = 32  # tokens whose logits exist at the same time


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its parameters, packed or not."""

    net: nn.Module
    params: Params


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a model makes of a text.

    Attributes:
      tokens: that count.
      nll: mean of -ln p(token), nats.
      error: standard error of that mean, nats, as if tokens were independent.
      kl: mean KL(reference || model), nats; None without a reference, likewise the next three.
      worst_kl: the largest KL of one token, nats.
      agreement: share of tokens at which both models find the same id likeliest.
      reference_nll: mean of the reference's -ln p(token), nats.
    """

    tokens: int
    nll: float
    error: float
    kl: float | None = None
    worst_kl: float | None = None
    agreement: float | None = None
    reference_nll: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)

    @property
    def reference_perplexity(self) -> float | None:
        """exp(reference_nll)."""
        return None if self.reference_nll is None else math.exp(self.reference_nll)


class Reference:
    """A model to compare others with: what it computes of a text, up to its last layer, is computed once.

    Args:
      model: the reference.
      batches: of the text; float32 [B, T, D] is kept for each.
    """

    def __init__(self, model: Model, batches: Sequence[Batch]):
        self.model = model
        self.hidden = [np.asarray(_hidden(model.net, model.params, batch.tokens)) for batch in batches]


def evaluate(
    model: Model,
    batches: Sequence[Batch],
    *,
    reference: Reference | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Scores a model on a text.

    Args:
      model: to be scored.
      batches: of `_windows.batches`.
      reference: of the same batches.
      progress: called with (batches done, batches in all).

    Raises:
      ShapeError: the two models have vocabularies of different sizes.
      CheckpointError: the model computes NaN.
    """
    if reference is not None and _rows(reference.model) != _rows(model):
        raise ShapeError(
            f"the models cannot be compared: {_rows(model)} ids, and {_rows(reference.model)} in the reference"
        )
    found = []
    for number, batch in enumerate(batches):
        hidden = _hidden(model.net, model.params, batch.tokens)
        where = np.flatnonzero(batch.counts.reshape(-1))
        other = None if reference is None else reference.hidden[number]
        for start in range(0, len(where), _ROWS):
            rows = np.resize(where[start : start + _ROWS], _ROWS)  # the last run repeats itself: one program for all
            taken = min(_ROWS, len(where) - start)
            targets = batch.targets.reshape(-1)[rows]
            values = _compare(
                model.net,
                None if reference is None else reference.model.net,
                model.params,
                None if reference is None else reference.model.params,
                _take(hidden, rows),
                None if other is None else _take(other, rows),
                targets,
            )
            found.append(np.stack([np.asarray(value)[:taken] for value in values]))
        if progress is not None:
            progress(number + 1, len(batches))
    return _summary(np.concatenate(found, axis=1).astype(np.float64), reference is not None)


def _rows(model: Model) -> int:
    return int(model.params["embedder"]["input_embedding"].shape[0])


def _take(hidden: Any, rows: np.ndarray) -> Array:
    return jnp.asarray(hidden).reshape(-1, hidden.shape[-1])[rows]


def _summary(values: np.ndarray, compared: bool) -> Scores:
    nll, other, kl, same = values
    if not np.isfinite(nll).all():
        raise CheckpointError(f"the model gives NaN at {int((~np.isfinite(nll)).sum())} of {nll.size} tokens")
    error = float(nll.std(ddof=1) / math.sqrt(nll.size)) if nll.size > 1 else 0.0
    scores = Scores(nll.size, float(nll.mean()), error)
    if not compared:
        return scores
    return dataclasses.replace(
        scores,
        kl=float(kl.mean()),
        worst_kl=float(kl.max()),
        agreement=float(same.mean()),
        reference_nll=float(other.mean()),
    )


@functools.partial(jax.jit, static_argnums=0)
def _hidden(net: nn.Module, params: Params, tokens: Array) -> Array:
    """float32 [B, T, D] after the final norm; the logits of the call are never computed."""
    return net.apply({"params": params}, tokens, return_hidden_states=True).hidden_states


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare(net, other_net, params, other_params, hidden, other_hidden, targets) -> tuple[Array, Array, Array, Array]:
    """Per token: -ln p of the target, the same of the reference, KL, whether the arg-max is the same; float32 [R]."""
    log_p = _log_probabilities(net, params, hidden)
    nll = -jnp.take_along_axis(log_p, targets[:, None], axis=1)[:, 0]
    if other_net is None:
        nothing = jnp.zeros_like(nll)
        return nll, nothing, nothing, nothing
    log_q = _log_probabilities(other_net, other_params, other_hidden)
    other = -jnp.take_along_axis(log_q, targets[:, None], axis=1)[:, 0]
    q = jnp.exp(log_q)
    kl = jnp.sum(jnp.where(q > 0, q * (log_q - log_p), 0), axis=1)
    same = jnp.argmax(log_p, axis=1) == jnp.argmax(log_q, axis=1)
    return nll, other, kl, same.astype(jnp.float32)


def _log_probabilities(net: nn.Module, params: Params, hidden: Array) -> Array:
    """float32 [R, V]; the cap of Gemma 2 included."""
    return jax.nn.log_softmax(losses.head(net, params)(hidden), axis=-1)
