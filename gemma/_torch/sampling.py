# SPDX-License-Identifier: Apache-2.0
"""Picks the next token on the device, as the numpy sampler in `gemma/sampling.py` defines it, number for number.

Only the work is another one: after a cut, what follows sees the survivors alone, and top-p sorts the whole vocabulary
only if the likeliest thousand do not reach p. The loop that calls this is `generate.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gemma.errors import SamplingError
from gemma.sampling import SamplingParams

_LIKELIEST = 1024  # ids looked at before all of them are sorted


def pick(logits: Tensor, params: SamplingParams, history: Sequence[int] = (), u: float = 0.0) -> int:
    """The next id of one sequence: what `gemma.sampling.sample` picks with the uniform number `u`.

    Args:
      logits: [V], finite or -inf; not changed.
      params: what was asked for.
      history: ids of the prompt and of what was generated; only the repetition penalty looks at them.
      u: in [0, 1), see `gemma.sampling.uniform`; unused when greedy.

    Raises:
      SamplingError: NaN or +inf logits, nothing left to pick, or an id past V.
    """
    scores = adjusted(logits, params, history)
    if params.greedy:
        return int(scores.argmax())
    ids, scores = survivors(scores, params)
    cumulative = _softmax(scores).cumsum(0)
    place = int(torch.searchsorted(cumulative, cumulative[-1:] * u, right=True))
    # Rounding may leave u * total equal to the total: then the last possible id is meant, not one past the end.
    return int(ids[min(place, int(scores.isfinite().nonzero()[-1]))])


def greedy(logits: Tensor, params: SamplingParams) -> Tensor:
    """The arg-max of each row: [B, V] to [B], of equals the lowest id; for parameters that ask for nothing else."""
    check_finite(logits.amax(-1))
    return logits.argmax(-1)


def adjusted(logits: Tensor, params: SamplingParams, history: Sequence[int] = ()) -> Tensor:
    """Steps 1 and 2, repetition penalty and bias: float32 [V], a copy."""
    scores = logits.to(torch.float32, copy=True)
    check_finite(scores.amax())
    if params.repetition_penalty != 1.0 and len(history):
        seen = _ids(sorted(set(history)), scores, "history")
        picked, penalty = scores[seen], params.repetition_penalty
        scores[seen] = torch.where(picked < 0, picked * penalty, picked / penalty)
    if params.logit_bias:
        ids = _ids(list(params.logit_bias), scores, "logit_bias")
        scores[ids] += torch.tensor(list(params.logit_bias.values()), dtype=scores.dtype, device=scores.device)
        if scores.amax() == -torch.inf:
            raise SamplingError("logits: expected at least one finite logit to pick from, got -inf for every token")
    return scores


def survivors(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Steps 3 to 6: (ids that stay, ascending [n], their logits over the temperature [n])."""
    scores = scores / params.temperature
    ids = torch.arange(len(scores), device=scores.device)
    if params.top_k is not None and params.top_k < len(scores):
        kept = (scores >= scores.topk(params.top_k).values[-1]).nonzero()[:, 0]
        ids, scores = ids[kept], scores[kept]
    if params.top_p is not None and params.top_p < 1.0:
        kept = _nucleus(scores, params.top_p)
        ids, scores = ids[kept], scores[kept]
    if params.min_p:
        probabilities = _softmax(scores)
        kept = (probabilities >= params.min_p * probabilities.max()).nonzero()[:, 0]
        ids, scores = ids[kept], scores[kept]
    return ids, scores


def check_finite(highest: Tensor) -> None:
    """Refuses NaN and +inf, which the highest logit shows, and rows of -inf."""
    if not bool(highest.isfinite().all()):
        raise SamplingError(
            "logits: expected a finite highest logit, got NaN or infinity: the weights are damaged, or the dtype is "
            "too small for this model; try float32"
        )


def _nucleus(scores: Tensor, p: float) -> Tensor:
    """Ascending places of the smallest set whose probability reaches p, the one that crosses p included."""
    probabilities = _softmax(scores)
    if len(scores) > 2 * _LIKELIEST:
        bound = scores.topk(_LIKELIEST).values[-1]
        part = (scores > bound).nonzero()[:, 0]  # all that are likelier than the bound: nothing between is missing
        if len(part) and float(probabilities[part].sum()) >= p:
            return part[_cut(scores[part], probabilities[part], p)]
    return _cut(scores, probabilities, p)


def _cut(scores: Tensor, probabilities: Tensor, p: float) -> Tensor:
    order = torch.sort(scores, descending=True, stable=True).indices  # stable: of equals the lower id first
    likelier = probabilities[order].cumsum(0)[:-1]  # probability of everything before the second, the third, ...
    return order[: 1 + int((likelier < p).sum())].sort().values


def _softmax(scores: Tensor) -> Tensor:
    values = torch.exp(scores.double() - scores.max().double())
    return values / values.sum()


def _ids(ids: list[int], scores: Tensor, field: str) -> Tensor:
    outside = [i for i in ids if not 0 <= i < len(scores)]
    if outside:
        raise SamplingError(f"{field}: expected token ids in 0..{len(scores) - 1}, got {outside[0]}")
    return torch.tensor(ids, dtype=torch.long, device=scores.device)
