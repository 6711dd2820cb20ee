# SPDX-License-Identifier: Apache-2.0
"""`gemma.sampling.SamplingParams` on the device: the same sets and the same draws as the numpy sampler, without a sort.

What the parameters mean is defined in `gemma/sampling.py`; the official sampling methods are `_sampling.py`.

A cut such as top-p is a threshold on the logits: the largest t for which the mass of {logit >= t} still reaches p. It
is found by bisection on the 32 bits of a float32, which is exact, needs 32 sums over V and no sort (a sort of 262,144
logits takes longer than a decode step of the smallest Gemma).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import SamplingError
from gemma.sampling import SamplingParams, fresh_seed, step_seed, uniform

Array = jax.Array

_BLOCK = 512  # logits per partial sum: keeps float32 sums over V accurate to a few 1e-7


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Which steps of `SamplingParams` are on: the static half of `from_params`; a step that is off costs nothing."""

    greedy: bool
    penalty: bool
    bias: bool
    top_k: bool
    top_p: bool
    min_p: bool


class Knobs(NamedTuple):
    """The values of `SamplingParams` as arrays, one per row: changing one compiles nothing."""

    greedy: Array  # bool [B]
    temperature: Array  # float32 [B], 1 where greedy
    penalty: Array  # float32 [B]
    top_k: Array  # int32 [B]
    top_p: Array  # float32 [B]
    min_p: Array  # float32 [B]
    bias: Array  # float32 [B, V], or [B, 0] where no bias was asked for


def from_params(params: Sequence[SamplingParams], vocab_size: int) -> tuple[Cuts, Knobs]:
    """`SamplingParams` of the rows of a batch: what must be compiled, and what may change between calls.

    A step that any row asks for is on; the other rows get the value with which it changes nothing, so a row's result
    does not depend on its neighbours.

    Args:
      params: by row, what was asked for.
      vocab_size: V, the number of logits.

    Raises:
      SamplingError: a biased id lies outside 0..V-1.
    """
    bias = np.zeros((len(params), vocab_size if any(p.logit_bias for p in params) else 0), np.float32)
    for row, p in zip(bias, params):
        for token, value in p.logit_bias.items():
            if token >= vocab_size:
                raise SamplingError(f"logit_bias: expected token ids in 0..{vocab_size - 1}, got {token}")
            row[token] = value
    drawn = [p for p in params if not p.greedy]
    cuts = Cuts(
        greedy=not drawn,
        penalty=any(p.repetition_penalty != 1.0 for p in params),
        bias=bias.shape[1] > 0,
        top_k=any(p.top_k is not None and p.top_k < vocab_size for p in drawn),
        top_p=any(p.top_p is not None and p.top_p < 1.0 for p in drawn),
        min_p=any(p.min_p for p in drawn),
    )
    knobs = Knobs(
        greedy=np.array([p.greedy for p in params]),
        temperature=np.array([p.temperature or 1.0 for p in params], np.float32),
        penalty=np.array([p.repetition_penalty for p in params], np.float32),
        top_k=np.array([min(p.top_k or vocab_size, vocab_size) for p in params], np.int32),
        top_p=np.array([1.0 if p.top_p is None else p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p or 0.0 for p in params], np.float32),
        bias=bias,
    )
    return cuts, knobs


def pick(cuts: Cuts, knobs: Knobs, logits: Array, seen: Array, u: Array) -> Array:
    """The next token of every row: int32 [B].

    Args:
      cuts: which steps are on.
      knobs: their values, by row.
      logits: float32 [B, V].
      seen: bool [B, V], or [B, 0] without a penalty.
      u: float32 [B], the uniform numbers.
    """

    def one(knobs, logits, seen, u):
        scores = process(logits, cuts, knobs, seen)
        best = jnp.argmax(scores).astype(jnp.int32)
        return best if cuts.greedy else jnp.where(knobs.greedy, best, draw(scores, cuts, u))

    return jax.vmap(one)(knobs, logits, seen, u)


def uniforms(params: SamplingParams, start: int, count: int) -> np.ndarray:
    """The random numbers of generated tokens start..start+count-1: float32 [count] in [0, 1).

    They depend on the seed and the token's index alone (`gemma.sampling.step_seed`), as in every backend. A `seed` of
    None has to be replaced with `gemma.sampling.fresh_seed()` before, once per sequence.
    """
    if params.greedy:
        return np.zeros(count, np.float32)
    seed = fresh_seed() if params.seed is None else params.seed
    numbers = np.array([uniform(step_seed(seed, start + i)) for i in range(count)], np.float64)
    return np.minimum(numbers, 1 - 2.0**-24).astype(np.float32)  # float32 would round the last few up to 1


def process(logits: Array, cuts: Cuts, knobs: Knobs, seen: Array | None) -> Array:
    """`gemma.sampling.process_logits` on the device, for one sequence.

    Args:
      logits: float [V].
      cuts: which steps are on.
      knobs: their values for this sequence, each without its axis B.
      seen: bool [V], the ids of the prompt and of what was generated; only read when the penalty is on.

    Returns:
      float32 [V]; what may not be picked is -inf.
    """
    scores = logits.astype(jnp.float32)
    if cuts.penalty:
        penalized = jnp.where(scores < 0, scores * knobs.penalty, scores / knobs.penalty)
        scores = jnp.where(seen, penalized, scores)
    if cuts.bias:
        scores = scores + knobs.bias
    if cuts.greedy:
        return scores
    scores = scores / knobs.temperature
    if cuts.top_k:
        keys = order(scores)
        bound = _largest(lambda t: (keys >= t).sum(dtype=jnp.int32) >= knobs.top_k)
        scores = jnp.where(keys >= bound, scores, -jnp.inf)
    if cuts.top_p:
        # p = 1 keeps all, exactly: in a batch, another row may be why this step is on.
        scores = jnp.where(_in_top_p(scores, knobs.top_p) | (knobs.top_p >= 1), scores, -jnp.inf)
    if cuts.min_p:
        scores = jnp.where(jnp.exp(scores - scores.max()) < knobs.min_p, -jnp.inf, scores)
    return scores


def draw(scores: Array, cuts: Cuts, u: Array) -> Array:
    """The id that `gemma.sampling.sample` picks with the uniform number `u`: int32 [].

    It is the first id, in id order, at which the summed probabilities exceed u; the sum runs over blocks of 512.
    """
    if cuts.greedy:
        return jnp.argmax(scores).astype(jnp.int32)
    weights = jnp.exp(scores - scores.max())
    blocks = jnp.pad(weights, (0, -weights.size % _BLOCK)).reshape(-1, _BLOCK)
    upto = jnp.cumsum(blocks.sum(axis=1))  # [V / 512], through each block
    target = u * upto[-1]
    # Rounding may leave the target at or past a sum: the clips then name the last id that is possible.
    last_block = (jnp.where(blocks.max(axis=1) > 0, jnp.arange(upto.size), 0)).max()
    block = jnp.minimum((upto <= target).sum(), last_block)
    row = blocks[block]
    inside = jnp.cumsum(row) + jnp.where(block > 0, upto[block - 1], 0.0)
    last = jnp.where(row > 0, jnp.arange(_BLOCK), 0).max()
    return (block * _BLOCK + jnp.minimum((inside <= target).sum(), last)).astype(jnp.int32)


def _in_top_p(scores: Array, p: Array) -> Array:
    """bool [V]: the smallest set that reaches probability `p`; of ids equal at the bound the lower go in first."""
    keys = order(scores)
    bound = top_p_bound(scores, p)
    weights = jnp.exp(scores - scores.max())
    above, ties = keys > bound, keys == bound
    # Ids at the bound still wanted: those before whom the probability is below p. One at least.
    each = jnp.where(ties, weights, 0).max()
    missing = p * _sum(weights) - _sum(jnp.where(above, weights, 0))
    wanted = jnp.maximum(jnp.ceil(missing / each), 1).astype(jnp.int32)
    ids = jnp.arange(scores.size)
    # The id of the wanted-th tie; with no ties to break (nearly always) the loop ends at once.
    many = ties.sum(dtype=jnp.int32) > wanted
    low, high = jnp.where(many, 0, scores.size - 1), scores.size - 1

    def halve(bounds):
        low, high = bounds
        middle = (low + high) // 2
        enough = (ties & (ids <= middle)).sum(dtype=jnp.int32) >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    _, last = jax.lax.while_loop(lambda b: b[0] < b[1], halve, (low, jnp.asarray(high)))
    return above | (ties & (ids <= last))


def top_p_bound(scores: Array, p: Array) -> Array:
    """The order key of the logit at which the probability, summed from the likeliest down, first reaches `p`."""
    keys = order(scores)
    weights = jnp.exp(scores - scores.max())
    need = jnp.maximum(p * _sum(weights), jnp.finfo(jnp.float32).tiny)  # p = 0 keeps the likeliest
    return _largest(lambda t: _sum(jnp.where(keys >= t, weights, 0)) >= need)


def order(x: Array) -> Array:
    """int32 keys in the order of the float32 values `x` (both zeros alike)."""
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _largest(holds: Callable[[Array], Array]) -> Array:
    """The largest int32 t for which the monotone `holds(t)` is true (it is for the smallest, not for the largest)."""
    info = jnp.iinfo(jnp.int32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean without overflow
        yes = holds(middle)
        return jnp.where(yes, middle, low), jnp.where(yes, high, middle)

    return jax.lax.fori_loop(0, 32, halve, (jnp.int32(info.min), jnp.int32(info.max)))[0]


def _sum(x: Array) -> Array:
    """A float32 sum in two steps: one running sum over V would lose the last digits."""
    return jnp.pad(x, (0, -x.size % _BLOCK)).reshape(-1, _BLOCK).sum(axis=1).sum()
