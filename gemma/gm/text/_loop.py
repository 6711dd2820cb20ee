# SPDX-License-Identifier: Apache-2.0
"""What runs on the device: reading a chunk of the prompt, one decoding step, and the loop of steps. Pure functions.

The host's side (padding, caches, what a row holds) is `_engine.py`; how a token is picked is `_sampling.py`.

The token picked last is not in the cache yet, it is `pending`; so n tokens take one prompt pass and n - 1 steps:

    prompt a b c    read:  cache a b c        pending d
                    step:  cache a b c d      pending e
                    step:  cache a b c d e    pending f

A row that has met an end token is `done`: it feeds padding, which is stored nowhere, until the others are done too.
Each function is compiled once per model, way of sampling and shape; the cache is donated, so it is updated in place.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gemma.gm.text import _sampling
from gemma.gm.typing import Array, Bool, Float, Int, Params

How = _sampling.SamplingMethod | _sampling.Cuts


class State(NamedTuple):
    """One batch between two steps."""

    cache: Any  # windowed layout
    pending: Int[Array, B]  # picked last, not in the cache; 0 in rows that were done before
    done: Bool[Array, B]
    seen: Bool[Array, "B V"]  # ids that the repetition penalty looks at; [B, 0] without one
    key: Array  # JAX key of the official sampling methods
    bad: Bool[Array, ""]  # logits were NaN, or no token could be picked


class Choice(NamedTuple):
    """What may be picked and what ends a row; arrays, so that another choice compiles nothing."""

    knobs: _sampling.Knobs | None
    blocked: Bool[Array, V]  # never picked
    ends: Int[Array, E]  # ids that end a row


def _forward(model: Any, params: Params, tokens: Int[Array, "B T"], cache: Any) -> tuple[Float[Array, "B V"], Any]:
    """The logits after the last real token of each row, and the new cache."""
    out = model.apply({"params": params}, tokens, cache=cache, return_last_only=True)
    return out.logits.astype(jnp.float32), out.cache


def _pick(how: How, choice: Choice, logits: Float[Array, "B V"], state: State, u: Float[Array, B]) -> State:
    """The state after picking the next token of each row."""
    logits = jnp.where(choice.blocked[None], -jnp.inf, logits)
    bad = ~jnp.isfinite(logits.max(axis=-1)).all()
    key = state.key
    if isinstance(how, _sampling.Cuts):
        pick = functools.partial(_pick_one, how, choice.knobs)
        tokens = jax.vmap(pick)(logits, state.seen, u)
    else:
        key, current = jax.random.split(key)  # as in the official sampler: one split per step for the whole batch
        tokens = how.get_next_tokens(logits, current).astype(jnp.int32)
    tokens = jnp.where(state.done, 0, tokens)
    seen = state.seen
    if seen.shape[1]:
        seen = seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
    done = state.done | (tokens[:, None] == choice.ends[None]).any(axis=1) | bad
    return State(state.cache, tokens, done, seen, key, state.bad | bad)


def _pick_one(cuts: _sampling.Cuts, knobs: _sampling.Knobs, logits: Array, seen: Array, u: Array) -> Array:
    return _sampling.draw(_sampling.process(logits, cuts, knobs, seen), cuts, u)


def _step(model: Any, how: How, params: Params, choice: Choice, state: State, u: Float[Array, B]) -> State:
    tokens = jnp.where(state.done, 0, state.pending)
    logits, cache = _forward(model, params, tokens[:, None], state.cache)
    return _pick(how, choice, logits, state._replace(cache=cache), u)


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("cache",))
def read(
    model: Any, params: Params, tokens: Int[Array, "B T"], cache: Any, carried: Float[Array, "B V"] | None
) -> tuple[Float[Array, "B V"], Any]:
    """Stores a chunk of the prompt, padded on the right.

    Args:
      model: the network.
      params: its parameters.
      tokens: ids, 0 where a row has none.
      cache: what the rows hold so far.
      carried: the logits of the chunk before, kept for rows that have no token in this one.

    Returns:
      The logits after each row's last token, float32, and the cache.
    """
    logits, cache = _forward(model, params, tokens, cache)
    if carried is not None:
        logits = jnp.where((tokens != 0).any(axis=1, keepdims=True), logits, carried)
    return logits, cache


@functools.partial(jax.jit, static_argnames=("model", "how"), donate_argnames=("cache",))
def read_and_pick(
    model: Any,
    how: How,
    params: Params,
    choice: Choice,
    tokens: Int[Array, "B T"],
    cache: Any,
    carried: Float[Array, "B V"] | None,
    seen: Bool[Array, "B V"],
    key: Array,
    u: Float[Array, B],
) -> State:
    """As `read`, for the last chunk: also picks the first new token of each row."""
    logits, cache = read.__wrapped__(model, params, tokens, cache, carried)
    rows = tokens.shape[0]
    empty = State(cache, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), seen, key, jnp.zeros((), bool))
    return _pick(how, choice, logits, empty, u)


@functools.partial(jax.jit, static_argnames=("model", "how"), donate_argnames=("state",))
def step(model: Any, how: How, params: Params, choice: Choice, state: State, u: Float[Array, B]) -> State:
    """Stores the pending tokens and picks the next ones."""
    return _step(model, how, params, choice, state, u)


@functools.partial(jax.jit, static_argnames=("model", "how"), donate_argnames=("state",))
def steps(
    model: Any, how: How, params: Params, choice: Choice, state: State, count: Int[Array, ""], u: Float[Array, "B M"]
) -> tuple[State, Int[Array, "B M"], Int[Array, ""]]:
    """Up to `count` steps without returning to the host; ends early when every row is done.

    Args:
      model: the network.
      how: how tokens are picked.
      params: of the network.
      choice: what may be picked.
      state: the rows.
      count: steps at most, no more than M.
      u: the random numbers of the steps; M decides the size of the result and is a compiled-in shape.

    Returns:
      The state, the picked tokens (0 after a row's end and beyond the last step), and the number of steps made.
    """
    tokens = jnp.zeros(u.shape, jnp.int32)

    def going(carry):
        state, _, made = carry
        return (made < count) & ~state.done.all()

    def one(carry):
        state, tokens, made = carry
        state = _step(model, how, params, choice, state, jax.lax.dynamic_index_in_dim(u, made, axis=1, keepdims=False))
        return state, jax.lax.dynamic_update_slice_in_dim(tokens, state.pending[:, None], made, axis=1), made + 1

    return jax.lax.while_loop(going, one, (state, tokens, jnp.zeros((), jnp.int32)))
