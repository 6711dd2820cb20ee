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

from gemma.errors import ConfigError, DataError, PromptError, TokenizerError
from gemma.gm.train._objectives import Objective
from gemma.gm.train._state import cast, merge_trainable
from gemma.gm.typing import Params

Sums = Callable[[Any, Any, Mapping[str, Any]], Any]
SAMPLE_TOKENS = 32  # of a continuation, where nothing else is said


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


def encode_prompts(
    prompts: Sequence[Any], tokenizer: Any, *, tokens: int, limit: int, chat: bool = False
) -> list[list[int]]:
    """The ids of the prompts to sample from, so that a bad one is found before the first step and not after hours.

    Args:
      prompts: texts, ids or turns, see `gm.text.Sampler`.
      tokenizer: of the model.
      tokens: that are to follow each.
      limit: tokens that the model was made for.
      chat: a text is what a user says in the model's chat template; otherwise it is taken as it stands.

    Raises:
      ConfigError: (a ValueError) one cannot be encoded, has no place in the context, or asks for a picture.
    """
    from gemma.chat import Turn
    from gemma.gm.text import _prompts

    rows = []
    for i, prompt in enumerate(prompts):
        try:
            (item,) = _prompts.parse([[Turn("user", prompt)] if chat and isinstance(prompt, str) else prompt]).items
            ids = _prompts.encode(item, tokenizer, held=(), images=0)
        except (PromptError, TokenizerError) as error:
            raise ConfigError(f"sample_prompts[{i}]: {error}") from error
        if len(ids) + tokens > limit:
            raise ConfigError(
                f"sample_prompts[{i}]: {len(ids)} tokens and {tokens} that follow, but the model was made for {limit}: "
                f"shorten the prompt"
            )
        if 0 in ids or tokenizer.special.start_of_image in ids:
            raise ConfigError(
                f"sample_prompts[{i}]: expected text without padding and image markers, got {prompt!r:.80}"
            )
        rows.append(ids)
    return rows


def sample(
    model: Any, params: Params, tokenizer: Any, prompts: Sequence[Sequence[int]], *, tokens: int, mesh: Any = None
) -> list[str]:
    """Greedy continuations of `encode_prompts`' rows, at most `tokens` each; an answer in a chat ends with its turn."""
    from gemma.fit import cache_bucket
    from gemma.gm import sharding, text

    room = cache_bucket(max(map(len, prompts)) + tokens, model.config.source.max_position_embeddings)
    sampler = text.Sampler(model=model, params=params, tokenizer=tokenizer, cache_length=room)
    where = None if mesh is None else sharding.replicated(mesh)
    return sampler.sample([list(ids) for ids in prompts], max_new_tokens=tokens, sharding=where)
