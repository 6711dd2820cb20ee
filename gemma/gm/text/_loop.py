# SPDX-License-Identifier: Apache-2.0
"""What runs on the device: reading a chunk of the prompt, picking a token, one decoding step, and the loop of steps.

Pure functions. The host's side (padding, caches, what a row holds) is `_engine.py`; how a token is picked is
`_sampling.py` and `_cuts.py`.

The token picked last is not in the cache yet, it is `pending`; so n tokens take one prompt pass and n - 1 steps:

    prompt a b c    read:  cache a b c        pick: pending d
                    step:  cache a b c d      pending e
                    step:  cache a b c d e    pending f

A row that has met an end token is `done`: it feeds padding, which is stored nowhere, until the others are done too.
Each function is compiled once per network, way of sampling and shape; the cache is donated, so it is updated in place.
Reading does not depend on the way of sampling.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen import module as flax_module

from gemma.errors import SamplingError
from gemma.gm.text import _cuts, _sampling
from gemma.gm.typing import Array, Bool, Float, Int, Params

How = _sampling.SamplingMethod | _cuts.Cuts


class Network(NamedTuple):
    """A model as a static argument, together with everything outside of it that changes what it computes.

    Attributes:
      model: the network; a wrapper such as LoRA is another module, hence another value.
      around: the method interceptors that are active, so that a program traced under one is never run without it.
      rows: how arrays with an axis of rows are laid out over devices, or None.
    """

    model: Any
    around: tuple
    rows: jax.sharding.NamedSharding | None = None


def network(model: Any, rows: jax.sharding.NamedSharding | None = None) -> Network:
    """The model as it would compute if it were called now."""
    return Network(model, tuple(flax_module._global_interceptor_stack), rows)


class State(NamedTuple):
    """What is known of one batch between two steps, besides the cache."""

    pending: Int[Array, " B"]  # picked last, not in the cache; 0 in rows that were done before
    logprob: Float[Array, " B"]  # its natural log-probability under the network, before any penalty or cut
    done: Bool[Array, " B"]
    seen: Bool[Array, "B V"]  # ids that a repetition penalty looks at; [B, 0] without one
    key: Array  # JAX key of the official sampling methods
    bad: Bool[Array, ""]  # logits were NaN, or no token could be picked


class Choice(NamedTuple):
    """What may be picked and what ends a row; arrays, so that another choice compiles nothing."""

    knobs: _cuts.Knobs | None
    blocked: Bool[Array, " V"]  # never picked
    ends: Int[Array, " E"]  # ids that end a row


def forward(
    net: Network, params: Params, tokens: Int[Array, "B T"], cache: Any, soft: Float[Array, "B I Q D"] | None = None
) -> tuple[Float[Array, "B V"], Any]:
    """The logits after the last real token of each row, float32, and the new cache."""
    more = {} if soft is None else {"soft_tokens": soft}
    last = {} if getattr(net.model, "return_last_only", None) else {"return_last_only": True}
    out = net.model.apply({"params": params}, tokens, cache=cache, **more, **last)
    cache = out.cache
    if net.rows is not None:  # the same layout after every call, so that the next one is compiled for it already
        cache = jax.lax.with_sharding_constraint(cache, net.rows)
    return out.logits.astype(jnp.float32), cache


def _pick(how: How, choice: Choice, logits: Float[Array, "B V"], state: State, u: Float[Array, " B"]) -> State:
    """The state after picking the next token of each row."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    allowed = jnp.where(choice.blocked[None], -jnp.inf, logits)
    bad = ~jnp.isfinite(allowed.max(axis=-1)).all()
    key, seen = state.key, state.seen
    if isinstance(how, _cuts.Cuts):
        tokens = _cuts.pick(how, choice.knobs, allowed, seen, u)
    else:
        key, current = jax.random.split(key)  # as in the official sampler: one split per step for the whole batch
        tokens = how.pick(allowed, current, seen if how.needs_seen else None)
        if tokens.shape != logits.shape[:1] or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise SamplingError(
                f"{type(how).__name__}: expected one integer per row, shape {logits.shape[:1]}, got {tokens.dtype} of "
                f"shape {tokens.shape}"
            )
        tokens = tokens.astype(jnp.int32)
    logprob = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0] - log_total
    tokens = jnp.where(state.done, 0, tokens)
    if seen.shape[1]:
        seen = seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
    done = state.done | (tokens[:, None] == choice.ends[None]).any(axis=1) | bad
    return State(tokens, jnp.where(state.done, 0, logprob), done, seen, key, state.bad | bad)


def _step(net: Network, how: How, params: Params, choice: Choice, cache: Any, state: State, u: Array):
    tokens = jnp.where(state.done, 0, state.pending)
    logits, cache = forward(net, params, tokens[:, None], cache)
    return cache, _pick(how, choice, logits, state, u)


@functools.partial(jax.jit, static_argnames=("net",), donate_argnames=("cache",))
def read(
    net: Network,
    params: Params,
    tokens: Int[Array, "B T"],
    cache: Any,
    carried: Float[Array, "B V"] | None,
    soft: Float[Array, "B I Q D"] | None = None,
) -> tuple[Float[Array, "B V"], Any]:
    """Stores a chunk of the prompt, padded on the right.

    Args:
      net: the network.
      params: its parameters.
      tokens: ids, 0 where a row has none.
      cache: what the rows hold so far.
      carried: the logits of the chunk before, kept for rows that have no token in this one.
      soft: vectors of the images in this chunk, in their order; rows with fewer are filled up.

    Returns:
      The logits after each row's last token, float32, and the cache.
    """
    logits, cache = forward(net, params, tokens, cache, soft)
    if carried is not None:
        logits = jnp.where((tokens != 0).any(axis=1, keepdims=True), logits, carried)
    return logits, cache


@functools.partial(jax.jit, static_argnames=("net",))
def encode(net: Network, params: Params, images: Float[Array, "B I H W C"]) -> Float[Array, "B I Q D"]:
    """The vectors that stand for pictures in a prompt; compiled once, since prepared pictures have one size."""
    return net.model.apply({"params": params}, images, method="encode_images")


@functools.partial(jax.jit, static_argnames=("copies",))
def spread(arrays: Any, copies: int) -> Any:
    """Every row `copies` times, one after the other: several samples go on from one prompt that is read once."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, copies, axis=0), arrays)


@functools.partial(jax.jit, static_argnames=("how",))
def pick(
    how: How,
    choice: Choice,
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    key: Array,
    u: Float[Array, " B"],
) -> State:
    """Picks the first new token of each row, after its prompt."""
    rows = logits.shape[0]
    none = State(
        pending=jnp.zeros(rows, jnp.int32),
        logprob=jnp.zeros(rows, jnp.float32),
        done=jnp.zeros(rows, bool),
        seen=seen,
        key=key,
        bad=jnp.zeros((), bool),
    )
    return _pick(how, choice, logits, none, u)


@functools.partial(jax.jit, static_argnames=("net", "how"), donate_argnames=("cache",))
def step(
    net: Network, how: How, params: Params, choice: Choice, cache: Any, state: State, u: Float[Array, " B"]
) -> tuple[Any, State]:
    """Stores the pending tokens and picks the next ones: the cache and the state."""
    return _step(net, how, params, choice, cache, state, u)


@functools.partial(jax.jit, static_argnames=("net", "how"), donate_argnames=("cache",))
def steps(
    net: Network,
    how: How,
    params: Params,
    choice: Choice,
    cache: Any,
    state: State,
    count: Int[Array, ""],
    u: Float[Array, "B M"],
) -> tuple[Any, State, Int[Array, "B M"], Float[Array, "B M"], Int[Array, ""]]:
    """Up to `count` steps without returning to the host; ends early when every row is done.

    Args:
      net: the network.
      how: how tokens are picked.
      params: of the network.
      choice: what may be picked.
      cache: what the rows hold.
      state: of the rows.
      count: steps at most, no more than M.
      u: the random numbers of the steps; M decides the size of the results and is a compiled-in shape.

    Returns:
      The cache, the state, the picked tokens and their log-probabilities (0 after a row's end and beyond the last
      step), and the number of steps made.
    """

    def going(carry):
        _, state, _, _, made = carry
        return (made < count) & ~state.done.all()

    def one(carry):
        cache, state, tokens, logprobs, made = carry
        now = jax.lax.dynamic_index_in_dim(u, made, axis=1, keepdims=False)
        cache, state = _step(net, how, params, choice, cache, state, now)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, state.pending[:, None], made, axis=1)
        logprobs = jax.lax.dynamic_update_slice_in_dim(logprobs, state.logprob[:, None], made, axis=1)
        return cache, state, tokens, logprobs, made + 1

    empty = jnp.zeros(u.shape, jnp.int32), jnp.zeros(u.shape, jnp.float32)
    return jax.lax.while_loop(going, one, (cache, state, *empty, jnp.zeros((), jnp.int32)))
