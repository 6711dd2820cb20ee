# SPDX-License-Identifier: Apache-2.0
"""Reading a prompt into a cache of the full layout, under the official names, for samplers built from parts.

The loop that goes on from the state is `_full_loop.py`. `gm.text.Sampler` reads prompts through `_engine.py` instead.

A second turn begins with the token that the first one left pending: it is written to the slot that is its own, the new
prompt to the slots after it, one position further each. (The official package writes the prompt over it.)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from gemma.errors import ContextFull
from gemma.gm.nn._packed import Packed
from gemma.gm.text import _loop
from gemma.gm.text._full_loop import FullState
from gemma.gm.text._turn_utils import PrevTurns
from gemma.gm.typing import Array, Bool, Int, Params, UInt8
from gemma.gm.utils import _cache_helper, _types


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillInput:
    """Arguments of the network. T tokens as given, T' with images expanded, S slots of the cut cache."""

    tokens: Int[Array, "B T"]
    images: UInt8[Array, "B I H W C"] | None
    positions: Int[Array, "B T'"]
    attention_mask: Bool[Array, "B T' S"]
    cache: _cache_helper.Cache


def prefill(
    *,
    model: Any,
    params: Params,
    input: _types.Input,
    last_state: FullState | None,
    cache_length: int,
    max_out_length: int,
    pad_length: int | tuple[int, ...] | None = None,
    rng: Array,
    sharding: Any,
) -> FullState:
    """The state before the first token of a turn.

    The last token of the prompt is its `last_token`: the first step processes it again.

    Args:
      model: a network of `gm.nn`.
      params: its parameters.
      input: the new prompts, padded on the right.
      last_state: of the turn before, or None.
      cache_length: S, slots of a new cache.
      max_out_length: L, the most tokens that a call may make.
      pad_length: the prompt is padded to the smallest of these that is long enough.
      rng: a JAX key.
      sharding: of a new cache.

    Raises:
      ContextFull: (a ValueError) the cache has no room for the prompt.
    """
    turns = PrevTurns(last_state=last_state)
    cache = _get_or_init_cache(
        inputs=input, prev_turns=turns, model=model, params=params, cache_length=cache_length, sharding=sharding
    )
    used = turns.used_cache_length + input.length_with_mm
    if used > cache.total_cache_length:
        raise ContextFull(used, cache.total_cache_length)
    lengths = (pad_length,) if isinstance(pad_length, int) else pad_length
    made = _make_prefill_input(input=input, cache=cache, prev_turns=turns, pad_lengths=lengths)
    arguments = {name: getattr(made, name) for name in ("tokens", "images", "positions", "attention_mask")}
    written = _cache_helper.Cache(_read(_loop.network(model), params, made.cache.cache, arguments))
    cache = cache.at[:, : written.total_cache_length].set_kv(written).set_end_index(used - 1)
    begin = 0 if last_state is None else last_state.last_token_pos + 1
    return FullState(
        step=jnp.asarray(0),
        done=jnp.zeros((input.batch_size,), bool),
        last_token=input.last_token,
        last_token_pos=input.last_token_pos + begin,
        predicted_tokens=jnp.zeros((input.batch_size, max_out_length), jnp.int32),
        cache=cache.cache,
        rng=rng,
        init_cache_length=jnp.asarray(used - 1),
        full_attention_mask=_make_full_attention_mask(
            input=input, prev_turns=turns, cache_length=cache.total_cache_length
        ),
    )


@functools.partial(jax.jit, static_argnums=0)
def _read(net: _loop.Network, params: Params, cache: Any, arguments: dict[str, Any]) -> Any:
    return net.model.apply({"params": params}, cache=cache, return_last_only=True, **arguments).cache


def _get_or_init_cache(
    *, inputs: _types.Input, prev_turns: PrevTurns, model: Any, params: Params, cache_length: int, sharding: Any
) -> _cache_helper.Cache:
    """The cache of the turns before, or a new one in the dtype of the parameters."""
    if prev_turns:
        return _cache_helper.Cache(prev_turns.last_state.cache)
    dtype = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Packed))[0].dtype
    return _cache_helper.Cache(
        model.init_cache(batch_size=inputs.batch_size, dtype=dtype, cache_length=cache_length, sharding=sharding)
    )


def _make_prefill_input(
    input: _types.Input,
    cache: _cache_helper.Cache,
    prev_turns: PrevTurns,
    pad_lengths: tuple[int, ...] | None,
) -> PrefillInput:
    """What the network is called with: the pending token of the turn before, the prompt, padding."""
    state, used = prev_turns.last_state, 0
    if state is not None:
        input = input.replace(text=jnp.concatenate([state.last_token[:, None], input.text], axis=-1))
        used = prev_turns.used_cache_length - 1  # written slots; the pending token comes next
    room = cache.total_cache_length - used
    fits = [length for length in pad_lengths or () if input.length_with_mm <= length <= room]
    input = input.pad(min(fits, default=input.length_with_mm))
    positions, mask = input.positions, input.attention_mask
    if state is not None:
        positions = positions + state.last_token_pos[:, None]
        # The pending token's column is the earlier turns' business: it is off in a row that had ended before the others.
        before = state.full_attention_mask[:, None, : used + 1]
        before = jnp.broadcast_to(before, (*mask.shape[:2], used + 1))
        mask = jnp.concatenate([before, mask[..., 1:]], axis=-1)
    return PrefillInput(
        tokens=input.text,
        images=input.images,
        positions=positions,
        attention_mask=mask,
        cache=cache[:, : used + input.length_with_mm],
    )


def _make_full_attention_mask(*, input: _types.Input, prev_turns: PrevTurns, cache_length: int) -> Bool[Array, "B S"]:
    """By slot whether it holds (or will hold) a token: False on padding and on what came after a row's end.

    | earlier turns | prompt, padded | 1 1 1 ... |
    """
    mask = input.inputs_mask
    if prev_turns:
        before = prev_turns.last_state.full_attention_mask[:, : prev_turns.used_cache_length]
        mask = jnp.concatenate([before, mask], axis=-1)
    return jnp.pad(mask, ((0, 0), (0, cache_length - mask.shape[-1])), constant_values=True)
