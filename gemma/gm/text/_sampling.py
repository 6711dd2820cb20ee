# SPDX-License-Identifier: Apache-2.0
"""Picks the next token on the device: by the official sampling methods, or by `gemma.sampling.SamplingParams`.

What the parameters mean is defined by the numpy sampler in `gemma/sampling.py`; this file gives the same sets and the
same draws without sorting the vocabulary. The decode loop that calls it is `_loop.py`.

A cut such as top-p is a threshold on the logits: the largest t for which the mass of {logit >= t} still reaches p. It
is found by bisection on the 32 bits of a float32, which is exact, needs 32 sums over V and no sort (a sort of 262,144
logits takes longer than a decode step of the smallest Gemma).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import SamplingError
from gemma.sampling import SamplingParams, fresh_seed, step_seed, uniform

Array = jax.Array

_BLOCK = 512  # logits per partial sum: keeps float32 sums over V accurate to a few 1e-7


class SamplingMethod(abc.ABC):
    """How the next token follows from the logits. Subclasses are frozen dataclasses, used as static arguments."""

    @abc.abstractmethod
    def get_next_tokens(self, logits: Array, rng: Array) -> Array:
        """Picks one token per row.

        Args:
          logits: float [*B, V].
          rng: a JAX key.

        Returns:
          int [*B].
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy(SamplingMethod):
    """The likeliest token, of equals the lowest id."""

    def get_next_tokens(self, logits: Array, rng: Array) -> Array:
        del rng
        return jnp.argmax(logits, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSampling(SamplingMethod):
    """A draw from the whole distribution, at `temperature`."""

    temperature: float = 1.0

    def __post_init__(self):
        _check_temperature(self.temperature)

    def get_next_tokens(self, logits: Array, rng: Array) -> Array:
        return jax.random.categorical(rng, logits / self.temperature, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopkSampling(SamplingMethod):
    """A draw from the `k` likeliest tokens, at `temperature`."""

    temperature: float = 1.0
    k: int = 1

    def __post_init__(self):
        _check_temperature(self.temperature)
        if not isinstance(self.k, int) or self.k < 1:
            raise SamplingError(f"TopkSampling.k: expected a whole number of at least 1, got {self.k!r}")

    def get_next_tokens(self, logits: Array, rng: Array) -> Array:
        values, ids = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))  # [*B, k]
        picked = jax.random.categorical(rng, values / self.temperature, axis=-1)  # [*B], in 0..k-1
        return jnp.take_along_axis(ids, picked[..., None], axis=-1)[..., 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopPSampling(SamplingMethod):
    """A draw from the likeliest tokens whose probability, at `temperature`, reaches `p`; ties at the bound stay."""

    p: float = 0.9
    temperature: float = 1.0

    def __post_init__(self):
        _check_temperature(self.temperature)
        _check_share("TopPSampling.p", self.p)

    def get_next_tokens(self, logits: Array, rng: Array) -> Array:
        logits = logits / self.temperature
        if self.p < 1.0:
            cut = jnp.vectorize(_top_p_bound, signature="(v),()->()")(logits.astype(jnp.float32), self.p)
            logits = jnp.where(_order(logits) >= cut[..., None], logits, jnp.finfo(logits.dtype).min)
        return jax.random.categorical(rng, logits, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinPSampling(SamplingMethod):
    """A draw from the tokens at least `p` times as likely as the likeliest, at `temperature`."""

    p: float = 0.05
    temperature: float = 1.0

    def __post_init__(self):
        _check_temperature(self.temperature)
        _check_share("MinPSampling.p", self.p)

    def get_next_tokens(self, logits: Array, rng: Array) -> Array:
        logits = logits / self.temperature
        ratio = jnp.exp(logits - logits.max(axis=-1, keepdims=True))  # 1 at the likeliest
        return jax.random.categorical(rng, jnp.where(ratio < self.p, jnp.finfo(logits.dtype).min, logits), axis=-1)


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
    """The values of `SamplingParams` as arrays: changing one compiles nothing."""

    temperature: Array  # float32 []
    penalty: Array  # float32 []
    top_k: Array  # int32 []
    top_p: Array  # float32 []
    min_p: Array  # float32 []
    bias: Array  # float32 [V], or [0] where no bias was asked for


def from_params(params: SamplingParams, vocab_size: int) -> tuple[Cuts, Knobs]:
    """`SamplingParams` for `process` and `draw`: what must be compiled, and what may change between calls.

    Args:
      params: what was asked for.
      vocab_size: V, the number of logits.

    Raises:
      SamplingError: a biased id lies outside 0..V-1.
    """
    bias = np.zeros(vocab_size if params.logit_bias else 0, np.float32)
    for token, value in params.logit_bias.items():
        if token >= vocab_size:
            raise SamplingError(f"logit_bias: expected token ids in 0..{vocab_size - 1}, got {token}")
        bias[token] = value
    cuts = Cuts(
        greedy=params.greedy,
        penalty=params.repetition_penalty != 1.0,
        bias=bool(params.logit_bias),
        top_k=not params.greedy and params.top_k is not None and params.top_k < vocab_size,
        top_p=not params.greedy and params.top_p is not None and params.top_p < 1.0,
        min_p=not params.greedy and bool(params.min_p),
    )
    knobs = Knobs(
        temperature=np.float32(params.temperature or 1.0),
        penalty=np.float32(params.repetition_penalty),
        top_k=np.int32(min(params.top_k or vocab_size, vocab_size)),
        top_p=np.float32(1.0 if params.top_p is None else params.top_p),
        min_p=np.float32(params.min_p or 0.0),
        bias=bias,
    )
    return cuts, knobs


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
      knobs: their values.
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
        keys = _order(scores)
        bound = _largest(lambda t: (keys >= t).sum(dtype=jnp.int32) >= knobs.top_k)
        scores = jnp.where(keys >= bound, scores, -jnp.inf)
    if cuts.top_p:
        scores = jnp.where(_in_top_p(scores, knobs.top_p), scores, -jnp.inf)
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
    keys = _order(scores)
    bound = _top_p_bound(scores, p)
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


def _top_p_bound(scores: Array, p: Array) -> Array:
    """The order key of the logit at which the probability, summed from the likeliest down, first reaches `p`."""
    keys = _order(scores)
    weights = jnp.exp(scores - scores.max())
    need = jnp.maximum(p * _sum(weights), jnp.finfo(jnp.float32).tiny)  # p = 0 keeps the likeliest
    return _largest(lambda t: _sum(jnp.where(keys >= t, weights, 0)) >= need)


def _order(x: Array) -> Array:
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


def _check_temperature(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e4:
        raise SamplingError(f"temperature: expected a number above 0 (use Greedy() for none), got {value!r}")


def _check_share(field: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise SamplingError(f"{field}: expected a number in 0..1, got {value!r}")
