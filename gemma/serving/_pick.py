# SPDX-License-Identifier: Apache-2.0
"""`gemma.sampling` on few candidates: the same picks from the likeliest ids, without sorting the whole vocabulary.

The native library finds the k likeliest ids and log sum exp in one pass. Greedy, top_k and top_p need no more than
those; min_p needs the ids above a bound. Where the candidates do not decide (equals at the end of the list, a flat
distribution, no cut at all) the numpy sampler does, on the whole vocabulary. Steps and their order: `gemma/sampling.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gemma.sampling import SamplingParams, process_logits, sample, uniform
from gemma.serving.runner import StepIn, StepOut

# (logits, k) -> ids int32 [k], logits float32 [k] in order, log sum exp of all
TopK = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray, float]]

_GREEDY = SamplingParams(temperature=0)
_SPARE = 8  # candidates beyond top_k: equals of the k-th belong to it
_NUCLEUS = 512  # candidates among which the set of top_p is looked for
_MANY = 4096  # a larger top_k is no small set of candidates
_SLACK = 1e-3  # of a logit: the bound of min_p is decided on probabilities, this only finds who may pass it


def pick(logits: np.ndarray, step: StepIn, top_k: TopK, top: int) -> StepOut:
    """Samples one token.

    Args:
      logits: float32 [V] after the slot's last token; -inf for ids that cannot come. Not changed.
      step: `params`, `rng` and `history` of it.
      top_k: the native function.
      top: how many likeliest pairs the result carries; 0 is none.

    Raises:
      SamplingError: NaN or +inf, or every id is forbidden.
    """
    params = step.params or _GREEDY
    edited = bool(params.logit_bias) or (params.repetition_penalty != 1.0 and len(step.history) > 0)
    count = max(top, 1) if edited else max(top, _wanted(params))
    ids, values, total = top_k(logits, count)
    if edited:
        # Greedy asks for steps 1 and 2 alone; what follows is the same on any logits.
        scores = process_logits(logits, _only_edits(params), step.history)
        best = top_k(scores, _wanted(params))
    else:
        scores, best = logits, (ids, values, total)
    token = _token(scores, params, step.rng, top_k, *best)
    logprob = float(logits[token]) - total
    return StepOut(token, logprob, tuple((int(i), float(v) - total) for i, v in zip(ids[:top], values[:top])))


def _only_edits(params: SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=0, repetition_penalty=params.repetition_penalty, logit_bias=params.logit_bias, seed=params.seed
    )


def _wanted(params: SamplingParams) -> int:
    """Candidates to ask for."""
    if params.greedy:
        return 1
    if params.top_k is not None and params.top_k <= _MANY:
        return params.top_k + _SPARE
    return _NUCLEUS if params.top_p is not None and params.top_p < 1.0 else 1


def _token(
    scores: np.ndarray,
    params: SamplingParams,
    rng: int,
    top_k: TopK,
    ids: np.ndarray,
    values: np.ndarray,
    total: float,
) -> int:
    """The pick, from the candidates if they decide it. `scores` are logits after penalties and biases."""
    if params.greedy:
        return int(ids[0])
    temperature = np.float32(params.temperature)
    kept, top_p = None, params.top_p
    if params.top_k is not None and params.top_k < scores.size:
        kept = _top_k(ids, values / temperature, params.top_k, scores.size) if params.top_k <= _MANY else None
    elif params.top_p is not None and params.top_p < 1.0:
        mass = total if temperature == 1 else top_k(scores / temperature, 0)[2]
        kept, top_p = _nucleus(ids, values / temperature, params.top_p, mass), None
    elif params.min_p:
        bound = (float(values[0]) / params.temperature + np.log(params.min_p) - _SLACK) * params.temperature
        near = np.flatnonzero(scores >= np.float32(bound - _SLACK * params.temperature))
        kept = near, scores[near] / temperature
    if kept is None:
        rest = SamplingParams(
            temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p
        )
        return sample(scores, rest, (), rng)
    return _draw(*kept, top_p, params.min_p, rng)


def _top_k(ids: np.ndarray, scores: np.ndarray, k: int, size: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The candidates of top_k, in order; None where equals of the k-th may lie beyond them."""
    keep = len(scores) if len(scores) <= k else int(np.count_nonzero(scores >= scores[k - 1]))
    if k < keep == len(scores) < size:
        return None
    return _in_order(ids[:keep], scores[:keep])


def _nucleus(ids: np.ndarray, scores: np.ndarray, top_p: float, mass: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The smallest set that reaches top_p of a distribution with this log sum exp; None where it has more members."""
    ids, scores = _in_order(ids, scores)
    before = np.cumsum(np.exp(scores.astype(np.float64) - mass))
    before = np.concatenate([[0.0], before[:-1]])
    keep = int(np.count_nonzero(before[1:] < top_p)) + 1
    # One candidate beyond the set shows that it is complete; equals of it at the end might come before it by their id.
    return None if keep == len(ids) or scores[keep] == scores[-1] else (ids[:keep], scores[:keep])


def _in_order(ids: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By score, of equals the lower id first: dividing by a temperature makes equals of what was not."""
    order = np.lexsort((ids, -scores))
    return ids[order], scores[order]


def _draw(ids: np.ndarray, scores: np.ndarray, top_p: float | None, min_p: float | None, rng: int) -> int:
    """Steps 5 to 7 on few ids, which are in order where there is a top_p."""
    weights = np.exp(scores.astype(np.float64) - scores.max())
    weights /= weights.sum()
    alive = np.ones(len(ids), bool)
    if top_p is not None and top_p < 1.0:
        before = np.concatenate([[0.0], np.cumsum(weights)[:-1]])
        alive[1:] = before[1:] < top_p
    if min_p:
        left = np.where(alive, weights, 0.0)
        left /= left.sum()
        alive &= left >= min_p * left.max()
    ids, weights = ids[alive], weights[alive]
    by_id = np.argsort(ids)
    cumulative = np.cumsum(weights[by_id])
    at = int(np.searchsorted(cumulative, uniform(rng) * cumulative[-1], side="right"))
    return int(ids[by_id][min(at, len(ids) - 1)])
