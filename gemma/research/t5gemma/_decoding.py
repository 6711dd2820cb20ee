# SPDX-License-Identifier: Apache-2.0
"""One batch while it is written: the input read once, then a token per row and step. The host's side of sampling.

How a token is picked and what a step does on the device is `gemma/gm/text/_loop.py`, for this network as for the
decoder-only ones; texts are `sampling.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma.errors import SamplingError
from gemma.gm.text import _cuts, _loop, _placement
from gemma.gm.typing import Array, Float, Int, Params
from gemma.research.t5gemma.t5gemma import T5Gemma, T5GemmaCache


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """A T5Gemma whose input is in the cache, with the call of a decoder-only network."""

    model: T5Gemma

    def apply(self, variables: Any, tokens: Int[Array, "B T"], *, cache: T5GemmaCache, return_last_only: bool) -> Any:
        return self.model.apply(variables, tokens, cache=cache, return_last_only=return_last_only)


@functools.partial(jax.jit, static_argnames=("net",), donate_argnames=("cache",))
def _start(
    net: _loop.Network,
    params: Params,
    bos: Int[Array, "B 1"],
    inputs: Int[Array, "B S"],
    cache: T5GemmaCache,
    images: Array | None,
) -> tuple[Float[Array, "B V"], T5GemmaCache]:
    """Reads the input and the decoder's bos: the logits of the first token, float32, and the cache."""
    model = net.model.model
    out = model.apply({"params": params}, bos, inputs, cache, images=images, return_last_only=True)
    cache = out.cache
    if net.rows is not None:
        cache = jax.lax.with_sharding_constraint(cache, net.rows)
    return out.logits.astype(jnp.float32), cache


class Decoding:
    """A batch of inputs and what is written for them.

    Attributes:
      tokens: int32 [B, n], picked so far; 0 after a row's end.
      logprobs: float32 [B, n], of these under the network itself.
    """

    def __init__(
        self,
        model: T5Gemma,
        params: Params,
        inputs: np.ndarray,
        *,
        how: _loop.How,
        choice: _loop.Choice,
        bos: int,
        length: int,
        key: jax.Array,
        uniforms: Any,
        images: Any = None,
        sharding: Any = None,
    ):
        """Reads the inputs and picks the first token.

        Args:
          inputs: int32 [B, S], 0 is padding.
          how, choice: as in `_loop`.
          bos: what the decoder starts with.
          length: tokens that may be written.
          uniforms: (start, count) to the random numbers of these tokens, float32 [B, count].
          images, sharding: as in `Sampler.sample`.
        """
        rows = _placement.by_rows(sharding)
        self._net = _loop.network(_Decoder(model), rows)
        self._params, self._how, self._choice, self._uniforms = params, how, choice, uniforms
        cache = model.init_cache(
            batch_size=len(inputs),
            prefill_length=inputs.shape[1],
            generation_length=length,
            dtype=_dtype(model, params),
        )
        arrays = (jnp.full((len(inputs), 1), bos, jnp.int32), jnp.asarray(inputs))
        if rows is not None:
            _placement.check_rows(rows, len(inputs))
            self._params = _placement.place_params(params, rows)
            arrays, cache = jax.device_put((arrays, cache), rows)
        logits, self._cache = _start(self._net, self._params, *arrays, cache, images)
        penalty = how.penalty if isinstance(how, _cuts.Cuts) else how.needs_seen
        seen = np.zeros((len(inputs), logits.shape[1] if penalty else 0), bool)
        self._state = _loop.pick(how, choice, logits, seen, key, uniforms(0, 1)[:, 0])
        self.tokens, self.logprobs = np.zeros((len(inputs), 0), np.int32), np.zeros((len(inputs), 0), np.float32)
        self._keep(self._state.pending[:, None], self._state.logprob[:, None])

    @property
    def done(self) -> np.ndarray:
        """Which rows have met an end token, bool [B]."""
        return np.asarray(self._state.done)

    @property
    def rng(self) -> jax.Array:
        return self._state.key

    @property
    def cache(self) -> T5GemmaCache:
        return self._cache

    def step(self) -> None:
        """One more token for each row."""
        u = self._uniforms(self.tokens.shape[1], 1)[:, 0]
        self._cache, self._state = _loop.step(
            self._net, self._how, self._params, self._choice, self._cache, self._state, u
        )
        self._keep(self._state.pending[:, None], self._state.logprob[:, None])

    def run(self, count: int, width: int) -> None:
        """Up to `count` more tokens without coming back; `width` is the compiled-in size, no smaller."""
        u = np.zeros((len(self.tokens), width), np.float32)
        u[:, :count] = self._uniforms(self.tokens.shape[1], count)
        arguments = (self._net, self._how, self._params, self._choice, self._cache, self._state)
        self._cache, self._state, tokens, logprobs, made = _loop.steps(*arguments, jnp.int32(count), u)
        self._keep(tokens[:, : int(made)], logprobs[:, : int(made)])

    def _keep(self, tokens: Any, logprobs: Any) -> None:
        if bool(self._state.bad):
            raise SamplingError(
                "logits: expected a finite highest logit, got NaN or nothing left to pick: the weights are damaged, or "
                "too much is forbidden"
            )
        self.tokens = np.concatenate([self.tokens, np.asarray(tokens)], axis=1)
        self.logprobs = np.concatenate([self.logprobs, np.asarray(logprobs)], axis=1)


def _dtype(model: T5Gemma, params: Params) -> Any:
    """That of the embedding, unless it is kept packed."""
    side = params if model.config.merged else params["decoder"]
    dtype = jnp.dtype(getattr(side["embedder"]["input_embedding"], "dtype", model.dtype))
    return dtype if jnp.issubdtype(dtype, jnp.floating) else model.dtype
