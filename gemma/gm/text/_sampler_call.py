# SPDX-License-Identifier: Apache-2.0
"""One call of a sampler, checked and ready to run: at once or streamed, and its results in the shape of the prompts.

What is checked before is in `_sampler.py`; the rows themselves are the engine's (`_engine.py`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gemma.errors import SamplingError
from gemma.gm.text import _cuts, _loop
from gemma.gm.text._engine import Engine, Picked
from gemma.gm.text._sampler_loop import SamplerOutput, SamplingState
from gemma.gm.text._tokenizer import visible
from gemma.gm.vision import _token_utils


@dataclasses.dataclass
class Call:
    """What one call asks for. `result` or `stream` runs it, once.

    Attributes:
      tokenizer: of `gm.text` or `gemma.tokenizer`.
      engine: the rows that are gone on from.
      new: expanded ids, by prompt.
      pixels: prepared pictures, by prompt.
      drop: ids to give up after the first one, by prompt.
      count: tokens to generate at most.
      width: the most that any call may ask for; a compiled-in shape.
      how: how tokens are picked.
      choice: what may be picked.
      params: by row `SamplingParams`, or the sampling method.
      key: for the official sampling methods.
      nest: (prompts, samples of each, whether one prompt was given and not a list).
    """

    tokenizer: Any
    engine: Engine
    new: list[list[int]]
    pixels: list[list[np.ndarray]]
    drop: list[int]
    count: int
    width: int
    how: _loop.How
    choice: _loop.Choice
    params: Any
    key: jax.Array
    nest: tuple[int, int, bool]

    def result(self, return_state: bool) -> Any:
        """Texts, or a `SamplerOutput`."""
        made = self._start()
        if self.count > 1 and not self.engine.done.all():
            made = _joined(made, self.engine.run(self.how, self.choice, self.count - 1, self._uniforms(1, self.width)))
        texts = [self.tokenizer.decode(visible(self.tokenizer, _real(row))) for row in made.tokens]
        return self._output(texts, made, return_state)

    def stream(self, return_state: bool) -> Iterator[Any]:
        """Pieces of text, or a `SamplerOutput` with them, step by step; a character comes when it is complete."""
        made = self._start()
        decoders = [self.tokenizer.stream() for _ in made.tokens]
        while True:
            last = made.tokens.shape[1] == self.count or bool(self.engine.done.all())
            texts = []
            for decoder, token in zip(decoders, made.tokens[:, -1]):
                shown = visible(self.tokenizer, _real([token]))
                text = decoder.push(shown[0]) if shown else ""
                texts.append(text + (decoder.flush() if last else ""))
            yield self._output(texts, made, return_state)
            if last:
                return
            u = self._uniforms(made.tokens.shape[1], 1)[:, 0]
            made = _joined(made, self.engine.step(self.how, self.choice, u))

    def _start(self) -> Picked:
        soft = [self.engine.encode(row) for row in self.pixels]
        new = self._make_room(soft) if any(self.drop) else self.new
        return self.engine.start(
            new,
            self.how,
            self.choice,
            reserve=self.count,
            key=self.key,
            u=self._uniforms(0, 1)[:, 0],
            penalty=self.how.penalty if isinstance(self.how, _cuts.Cuts) else self.how.needs_seen,
            soft=soft,
            copies=self.nest[1],
        )

    def _make_room(self, soft: list[list[Any]]) -> list[list[int]]:
        """Gives up the beginning of the rows: the engine forgets all, and the whole rest is new. Shortens `soft`."""
        images, new = self.engine.image_tokens, []
        for b, drop in enumerate(self.drop):
            row = [*self.engine.ids[b], *self.new[b]]
            gone = row[1 : 1 + drop].count(_token_utils.SOFT_TOKEN_PLACEHOLDER)
            soft[b] = [*self.engine.soft[b], *soft[b]][gone // images.soft if images else 0 :]
            new.append([row[0], *row[1 + drop :]])
        self.engine.replace([[] for _ in new], [[] for _ in new])
        return new

    def _uniforms(self, start: int, width: int) -> np.ndarray:
        """float32 [B, width]: the random numbers of tokens start..; the official methods draw from a key instead."""
        rows = self.nest[0] * self.nest[1]
        u = np.zeros((rows, width), np.float32)
        if isinstance(self.params, list) and not self.params[0].greedy:
            wanted = min(width, self.count - start)
            for row, params in zip(u, self.params):
                row[:wanted] = _cuts.uniforms(params, start, wanted)
        return u

    def _output(self, texts: list[str], made: Picked, return_state: bool) -> Any:
        prompts, samples, single = self.nest
        if samples > 1:
            texts = [texts[b * samples : (b + 1) * samples] for b in range(prompts)]
        text = texts[0] if single else texts
        if not return_state:
            return text
        dropped = np.repeat(np.array(self.drop, np.int32), samples)
        return SamplerOutput(text, SamplingState.of(self.engine, made.tokens, made.logprobs, dropped))


def jax_key(rng: Any) -> jax.Array:
    """A key from what a caller may give: an int, a key, or None."""
    if rng is None:
        rng = random.randint(0, 10**9)
    if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
        return jax.random.key(rng)
    if not isinstance(rng, jax.Array):
        raise SamplingError(f"rng: expected an int or a JAX key, got {type(rng).__name__}")
    return rng


def _joined(one: Picked, two: Picked) -> Picked:
    return Picked(*(np.concatenate(parts, axis=1) for parts in zip(one, two)))


def _real(tokens: Sequence[int]) -> list[int]:
    """Tokens without the padding after a row's end."""
    return [int(token) for token in tokens if token]
