# SPDX-License-Identifier: Apache-2.0
"""A decode loop over caches of the full layout, for scripts that build a sampler from the official package's parts.

`_prefill.py` makes its first state. `gm.text.Sampler` does not use it: its own loop (`_loop.py`) works on windowed caches
of any length and gives back the states of `_sampler_loop.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp

from gemma.gm.text import _loop
from gemma.gm.text._sampling import SamplingMethod
from gemma.gm.typing import Array, Bool, Int, Params
from gemma.gm.utils import _cache_helper


@flax.struct.dataclass
class FullState:
    """Between two steps. S slots of cache, L the most tokens that a call may make.

        slots    | earlier turns | prompt, its last token apart | last token, predicted tokens | free |
                                                                ^ init_cache_length

    Attributes:
      step: int [], tokens made so far.
      done: bool [B], rows that made an end token.
      last_token: int32 [B], input of the next step; it is not in the cache yet.
      last_token_pos: int32 [B], its position, padding not counted.
      predicted_tokens: int32 [B, L], 0 where nothing was made yet.
      cache: of the full layout, S slots.
      rng: a JAX key.
      init_cache_length: int [], slots used before the first step.
      full_attention_mask: bool [B, S], False on padding; slots that are not written yet count as True.
    """

    step: Int[Array, ""]
    done: Bool[Array, " B"]
    last_token: Int[Array, " B"]
    last_token_pos: Int[Array, " B"]
    predicted_tokens: Int[Array, "B L"]
    cache: Any
    rng: Array
    init_cache_length: Int[Array, ""]
    full_attention_mask: Bool[Array, "B S"]

    @property
    def used_cache_length(self) -> Int[Array, ""]:
        """Slots that are written."""
        return self.init_cache_length + self.step

    @property
    def attention_mask_for_step(self) -> Bool[Array, "B S"]:
        """What the next step may see: everything written, and itself."""
        slots = jnp.arange(self.full_attention_mask.shape[-1])
        return self.full_attention_mask & (slots <= self.used_cache_length)[None, :]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerLoop:
    """One way to sample; a value, so that it is compiled once.

    Attributes:
      model: a network of `gm.nn`.
      end_tokens: ids that end a row.
      forbidden_tokens: ids that are never picked.
      sampling: how tokens are picked.
      cache_length: S.
      special_tokens: of the tokenizer.
    """

    model: Any
    end_tokens: tuple[int, ...]
    forbidden_tokens: tuple[int, ...] | None
    sampling: SamplingMethod
    cache_length: int
    special_tokens: Any

    def sample(
        self, *, params: Params, init_state: FullState, max_new_tokens: Int[Array, ""] | int, stream: bool = False
    ) -> FullState | Iterator[FullState]:
        """Runs until every row has ended, the cache is full or `max_new_tokens` are made.

        Args:
          params: of the model.
          init_state: of `_prefill.prefill`.
          max_new_tokens: at most L of the state.
          stream: return an iterator of the states after each step.
        """
        net = _loop.network(self.model)
        if stream:
            return self._stream(net, params, init_state, int(max_new_tokens))
        return _run(self, net, params, init_state, jnp.asarray(max_new_tokens))

    def _stream(self, net: _loop.Network, params: Params, state: FullState, most: int) -> Iterator[FullState]:
        for _ in range(most):
            if bool(jnp.all(state.done)) or bool(_cache_helper.Cache(state.cache).is_full):
                return
            state = _step(self, net, params, state)
            yield _ended(state, self.end_tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    loop: SamplerLoop, net: _loop.Network, params: Params, state: FullState, max_new_tokens: Int[Array, ""]
) -> FullState:
    def goes_on(state: FullState) -> Bool[Array, ""]:
        full = _cache_helper.Cache(state.cache).is_full
        return (state.step < max_new_tokens) & ~jnp.all(state.done) & ~full

    state = jax.lax.while_loop(goes_on, lambda state: _step(loop, net, params, state), state)
    return _ended(state, loop.end_tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(loop: SamplerLoop, net: _loop.Network, params: Params, state: FullState) -> FullState:
    out = net.model.apply(
        {"params": params},
        tokens=state.last_token[:, None],
        cache=state.cache,
        positions=state.last_token_pos[:, None],
        attention_mask=state.attention_mask_for_step[:, None, :],
    )
    logits = out.logits[:, 0]
    if loop.forbidden_tokens:
        logits = logits.at[:, jnp.asarray(loop.forbidden_tokens)].set(-jnp.inf)
    rng, key = jax.random.split(state.rng)
    token = loop.sampling.get_next_tokens(logits, rng=key).astype(jnp.int32)
    return state.replace(
        step=state.step + 1,
        done=state.done | jnp.isin(token, jnp.asarray(loop.end_tokens, jnp.int32)),
        last_token=token,
        # A row that had ended before stays where it is: what it makes from here on is masked.
        last_token_pos=state.last_token_pos + (~state.done).astype(state.last_token_pos.dtype),
        predicted_tokens=state.predicted_tokens.at[:, state.step].set(token),
        cache=out.cache,
        rng=rng,
    )


def _ended(state: FullState, end_tokens: tuple[int, ...]) -> FullState:
    """The state with nothing after the first end token of each row, ready for a next turn."""
    tokens = state.predicted_tokens
    ends = jnp.isin(tokens, jnp.asarray(end_tokens, tokens.dtype)).astype(jnp.int32)
    tokens = jnp.where(jnp.cumsum(ends, axis=-1) - ends == 0, tokens, 0)
    mask = mask_full_attention_mask_prefix_for_next_turn(
        full_attention_mask=state.full_attention_mask,
        predicted_tokens=tokens,
        init_cache_length=state.init_cache_length,
    )
    return state.replace(predicted_tokens=tokens, full_attention_mask=mask)


def mask_full_attention_mask_prefix_for_next_turn(
    *,
    full_attention_mask: Bool[Array, "B S"],
    predicted_tokens: Int[Array, "B L"],
    init_cache_length: Int[Array, ""],
) -> Bool[Array, "B S"]:
    """The mask of all slots, without those after a row's last token: a next turn must not see what came after its end."""
    made = jnp.sum(predicted_tokens != 0, axis=-1)  # [B]
    slots = jnp.arange(full_attention_mask.shape[-1])
    return full_attention_mask & (slots[None, :] < (init_cache_length + 1 + made)[:, None])
