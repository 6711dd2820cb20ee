# SPDX-License-Identifier: Apache-2.0
"""Evaluation: loss, perplexity and the objective's metrics over a loader, and what the model makes of some prompts.

Nothing here changes a run: there is no dropout, and the loader is read from its beginning by an iterator of its own.
Exact match and other task scores are `gm.evals`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gemma.errors import ConfigError, DataError
from gemma.gm.train._objectives import Objective
from gemma.gm.train._state import cast, merge_trainable
from gemma.gm.typing import Params

Sums = Callable[[Any, Any, Mapping[str, Any]], Any]


def make_sums(objective: Objective, compute_dtype: Any = None) -> Sums:
    """The compiled function (trained leaves, frozen leaves, batch) -> (loss sum, weight, metrics) without dropout."""

    def sums(params: Any, frozen: Any, batch: Mapping[str, Any]) -> Any:
        params = merge_trainable(frozen, cast(params, compute_dtype))
        return objective.loss(params, batch, key=jax.random.key(0), train=False)

    return jax.jit(sums)


def totals(parts: Iterable[Any]) -> dict[str, float]:
    """Means over all batches of what `make_sums` gave for each: loss, perplexity, weight, and the metrics.

    Raises:
      DataError: (a ValueError) nothing was counted.
    """
    loss, weight, metrics = 0.0, 0.0, {}
    for part, count, more in jax.device_get(list(parts)):  # waits once, at the end
        loss, weight = loss + float(part), weight + float(count)
        for name, (total, number) in more.items():
            old = metrics.get(name, (0.0, 0.0))
            metrics[name] = (old[0] + float(total), old[1] + float(number))
    if not weight:
        raise DataError("evaluation: no batch has a label; expected rows with a completion")
    mean = loss / weight
    result = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "weight": weight}
    return result | {name: total / number for name, (total, number) in metrics.items() if number}


def evaluate(
    objective: Objective, params: Params, loader: Iterable[Mapping[str, Any]], *, batches: int | None = None
) -> dict[str, float]:
    """Scores parameters on a loader.

    Args:
      objective: what is measured.
      params: the whole tree.
      loader: is read from its beginning; one that never ends needs `batches`. An objective that needs a reference
        finds its scores in the batches.
      batches: read at most so many; None: all.

    Returns:
      loss (mean over labels or rows), perplexity (its exponential), weight (how many were counted), and the metrics of the
      objective, such as accuracy.

    Raises:
      DataError: (a ValueError) there is no label.
    """
    sums = make_sums(objective)
    parts = (
        sums({}, params, {name: jnp.asarray(value) for name, value in batch.items()})
        for batch in first(loader, batches)
    )
    return totals(parts)


def first(loader: Any, batches: int | None) -> Iterable[Mapping[str, Any]]:
    """The first batches of a loader, from its beginning.

    Raises:
      ConfigError: (a ValueError) the loader says that it never ends, and no number was given.
    """
    if batches is None and getattr(loader, "epochs", 1) is None:
        raise ConfigError(
            "the loader for evaluation never ends (epochs=None): give it epochs=1, or a number of batches"
        )
    return itertools.islice(iter(loader), batches)


def sample(
    model: Any, params: Params, tokenizer: Any, prompts: Sequence[Any], *, tokens: int, mesh: Any = None
) -> list[tuple[Any, str]]:
    """Greedy continuations of prompts (texts, ids or turns, see `gm.text.Sampler`), at most `tokens` each."""
    from gemma.gm import sharding, text

    sampler = text.Sampler(model=model, params=params, tokenizer=tokenizer, cache_length=256)
    where = None if mesh is None else sharding.replicated(mesh)
    answers = sampler.sample(list(prompts), max_new_tokens=tokens, sharding=where)
    return list(zip(prompts, answers, strict=True))
