# SPDX-License-Identifier: Apache-2.0
"""The official sampling methods, two more, and the protocol for a user's own: logits in, one token per row out.

`gemma.sampling.SamplingParams` on the device are `_cuts.py`; the decode loop that calls either is `_loop.py`.

A method of your own is a frozen dataclass; the samplers compile once per value of it:

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class NoRepeat(gm.text.SamplingMethod):
        needs_seen: ClassVar[bool] = True                 # only where the earlier tokens matter

        def pick(self, logits, rng, seen):                # [B, V], key, bool [B, V]
            return jnp.argmax(jnp.where(seen, -jnp.inf, logits), axis=-1)

        def get_next_tokens(self, logits, rng):           # without `needs_seen`, this one alone is enough
            return jnp.argmax(logits, axis=-1)
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from gemma.errors import SamplingError
from gemma.gm.text._cuts import order, top_p_bound

Array = jax.Array


class SamplingMethod(abc.ABC):
    """How the next token follows from the logits. Subclasses are frozen dataclasses, used as static arguments.

    Attributes:
      needs_seen: whether `pick` looks at the earlier tokens of its row.
    """

    needs_seen: ClassVar[bool] = False

    @abc.abstractmethod
    def get_next_tokens(self, logits: Array, rng: Array) -> Array:
        """Picks one token per row.

        Args:
          logits: float [*B, V].
          rng: a JAX key.

        Returns:
          int [*B].
        """

    def pick(self, logits: Array, rng: Array, seen: Array | None) -> Array:
        """What the samplers call; replace it where the earlier tokens of a row matter.

        Args:
          logits: float32 [B, V]; what may not be picked is -inf.
          rng: a JAX key, for this step of the whole batch.
          seen: bool [B, V], the ids of the prompt and of what was generated; None unless the class `needs_seen`.

        Returns:
          int [B].
        """
        del seen
        return self.get_next_tokens(logits, rng)


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
            cut = jnp.vectorize(top_p_bound, signature="(v),()->()")(logits.astype(jnp.float32), self.p)
            logits = jnp.where(order(logits) >= cut[..., None], logits, jnp.finfo(logits.dtype).min)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepetitionPenalty(SamplingMethod):
    """Makes tokens of the prompt and of what was generated less likely, then picks with another method.

    Their logits are divided by `penalty` where positive and multiplied where negative, once per token however often it
    was seen: step 1 of `gemma.sampling`.
    """

    penalty: float = 1.1
    sampling: SamplingMethod = Greedy()

    needs_seen: ClassVar[bool] = True

    def __post_init__(self):
        check_method(self.sampling)
        number = isinstance(self.penalty, (int, float)) and not isinstance(self.penalty, bool)
        if not number or not 0.01 <= self.penalty <= 100:
            raise SamplingError(f"RepetitionPenalty.penalty: expected a number in 0.01..100, got {self.penalty!r}")

    def get_next_tokens(self, logits: Array, rng: Array) -> Array:
        raise SamplingError("RepetitionPenalty needs the tokens seen so far: call pick(logits, rng, seen)")

    def pick(self, logits: Array, rng: Array, seen: Array | None) -> Array:
        penalized = jnp.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return self.sampling.pick(jnp.where(seen, penalized, logits), rng, seen)


def check_method(method: object) -> None:
    """Refuses what is no sampling method, or none that can be a static argument.

    Raises:
      SamplingError: with what came.
    """
    if not isinstance(method, SamplingMethod):
        raise SamplingError(
            f"sampling: expected a gm.text.SamplingMethod such as gm.text.Greedy(), or gemma.sampling.SamplingParams, "
            f"got {method!r:.100}"
        )
    try:
        hash(method)
    except TypeError as error:
        raise SamplingError(
            f"sampling: {type(method).__name__} cannot be hashed ({error}): make it a frozen dataclass whose fields "
            f"are numbers, strings or tuples"
        ) from error


def _check_temperature(value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e4:
        raise SamplingError(f"temperature: expected a number above 0 (use Greedy() for none), got {value!r}")


def _check_share(field: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise SamplingError(f"{field}: expected a number in 0..1, got {value!r}")
