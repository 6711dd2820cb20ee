# SPDX-License-Identifier: Apache-2.0
"""`Sampler`: texts in, texts out, for one prompt or a batch, at once or streamed, with the official signatures.

It turns texts into ids and ids into texts; what happens in between is `_engine.py`. Chat templates are not applied
here. Special tokens spelled in a prompt become those tokens.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gemma.errors import ContextFull, PromptError, SamplingError, TokenizerError, UnsupportedError
from gemma.gm.text import _loop, _sampling
from gemma.gm.text._engine import Engine
from gemma.gm.text._generate import blocked_ids, end_array
from gemma.gm.text._tokenizer import Tokenizer, visible
from gemma.gm.typing import Params
from gemma.sampling import SamplingParams, fresh_seed

_GREEDY = _sampling.Greedy()


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingState:
    """A batch after sampling. Pass it as `last_state` to go on; it can be used more than once.

    Attributes:
      predicted_tokens: int32 [B, L], what was generated in this call; 0 after a row's end token.
      rng: the JAX key for going on.
    """

    predicted_tokens: np.ndarray
    rng: jax.Array
    _engine: Engine = dataclasses.field(repr=False)

    @property
    def transcripts(self) -> list[list[int]]:
        """By row, all ids from the first turn on."""
        return [list(row) for row in self._engine.ids]

    @property
    def last_token(self) -> np.ndarray:
        """int32 [B], the last token of each row; it is not in the cache yet."""
        return np.array([row[-1] for row in self._engine.ids], np.int32)

    @property
    def used_cache_length(self) -> np.ndarray:
        """int32 [B], tokens that the cache holds."""
        return np.array(self._engine.stored, np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class SamplerOutput:
    """Text and state: a `str` for a `str` prompt, else a list."""

    text: str | list[str]
    state: SamplingState

    @property
    def tokens(self) -> np.ndarray:
        """What was generated: int32 [L] for a `str` prompt, [B, L] for a batch."""
        tokens = self.state.predicted_tokens
        return tokens[0] if isinstance(self.text, str) else tokens


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """Continues texts.

      sampler = gm.text.Sampler(model=model, params=params)
      sampler.sample("The history of computing began", max_new_tokens=16)

    Attributes:
      model: a network of `gm.nn`.
      params: its parameters.
      tokenizer: of `gm.text` or `gemma.tokenizer`; None: the one of the model's generation.
      sampling: how tokens are picked; `gemma.sampling.SamplingParams` are taken too.
      forbidden_tokens: ids or texts (of one token each) that are never picked; image markers never are.
      stop_tokens: ids or texts (of one token each) that end a text, besides `<eos>` and `<end_of_turn>`.
      cache_length: tokens that the cache holds at first; it grows up to the model's limit.
      max_out_length: the most that `max_new_tokens` may ask for.
      pad_length: prompts are padded to the smallest of these that is long enough, and each of them is compiled once;
        longer prompts are read in chunks of the largest.
    """

    model: Any
    params: Params
    tokenizer: Any = None
    sampling: _sampling.SamplingMethod | SamplingParams = _GREEDY
    forbidden_tokens: Sequence[str | int] | None = None
    stop_tokens: Sequence[str | int] | None = None
    cache_length: int = 4096
    max_out_length: int = 2048
    pad_length: int | tuple[int, ...] | None = (64, 256, 512, 1024)

    def __post_init__(self):
        version = self.model.INFO.tokenizer_version
        if self.tokenizer is None:
            if not version:
                raise TokenizerError(
                    "The model does not specify a tokenizer to use. Please pass `tokenizer=`, for example the one of "
                    "gm.text.load_model(path)."
                )
            object.__setattr__(self, "tokenizer", Tokenizer.from_version(version))
        own = self.tokenizer.VERSION if isinstance(self.tokenizer, Tokenizer) else self.tokenizer.version
        if version and own and version != own:
            raise TokenizerError(
                f"Incompatible model and tokenizer: Got {type(self.model).__name__} and "
                f"{type(self.tokenizer).__name__} of version {own}; the model needs version {version}."
            )
        for name in ("cache_length", "max_out_length"):
            if getattr(self, name) < 1:
                raise SamplingError(f"{name}: expected at least 1, got {getattr(self, name)}")
        lengths = (self.pad_length,) if isinstance(self.pad_length, int) else self.pad_length
        lengths = tuple(sorted(lengths or (64, 256, 512, 1024)))
        if lengths[0] < 1:
            raise SamplingError(f"pad_length: expected lengths of at least 1, got {self.pad_length}")
        object.__setattr__(self, "pad_length", lengths)

    def sample(
        self,
        prompt: str | Sequence[str],
        *,
        images: Any = None,
        max_new_tokens: int | None = None,
        stream: bool = False,
        sampling: _sampling.SamplingMethod | SamplingParams | None = None,
        rng: Any = None,
        return_state: bool = False,
        last_state: SamplingState | None = None,
        sharding: Any = None,
    ) -> str | list[str] | SamplerOutput | Iterator[str | list[str] | SamplerOutput]:
        """Continues one text or several.

        Args:
          prompt: a text, or several, which need not be equally long. A `<bos>` is put in front, except after
            `last_state`. The result of a text does not depend on what it is batched with.
          images: refused; this release runs text models only.
          max_new_tokens: None or 0: up to `max_out_length`, as far as the model's limit allows.
          stream: return an iterator of pieces of text, a piece per step; of lists of pieces for several prompts.
          sampling: replaces the sampler's own. With `SamplingParams` (whose seed is used, row b with seed + b) neither
            `rng` nor its `max_new_tokens` are looked at.
          rng: an int or a JAX key; None: unpredictable.
          return_state: return a `SamplerOutput`; when streaming, one per step, each with a copy of the cache.
          last_state: go on after the texts of that state; equal to one pass over the whole transcript.
          sharding: refused; the arrays follow the sharding of `params`.

        Returns:
          The new text only; an end token that has a text, such as `<end_of_turn>`, stays in it.

        Raises:
          PromptError, ContextFull, SamplingError: (ValueErrors) before anything is generated.
        """
        if images is not None:
            raise PromptError(
                f"The model '{type(self.model).__name__}' does not have vision encoder, yet images are provided."
            )
        if sharding is not None:
            raise UnsupportedError("sharding: arrays follow the sharding of `params`; shard those and leave this out")
        texts, single = _texts(prompt)
        if not texts:
            if return_state:
                raise PromptError("prompt is an empty list: there is no state to return")
            return iter(()) if stream else []
        call = self._call(texts, single, max_new_tokens, sampling or self.sampling, rng, last_state)
        pieces = call.stream(return_state)
        return pieces if stream else call.result(return_state)

    def _call(self, texts, single, max_new_tokens, sampling, rng, last_state) -> _Call:
        count = max_new_tokens or self.max_out_length
        if count > self.max_out_length or count < 1:
            raise SamplingError(
                f"max_new_tokens should be smaller or equal to max_out_length. Got: {max_new_tokens} and "
                f"{self.max_out_length}."
            )
        if last_state is not None and len(last_state._engine.ids) != len(texts):
            rows = len(last_state._engine.ids)
            raise PromptError(f"last_state holds {rows} conversations; expected as many prompts, got {len(texts)}")
        new = [self.tokenizer.encode(text, add_bos=last_state is None) for text in texts]
        if last_state is None:
            engine = Engine(
                self.model, self.params, len(texts), cache_length=self.cache_length, buckets=self.pad_length
            )
        else:
            engine = last_state._engine.fork()
        if not max_new_tokens:
            longest = max(len(held) + len(row) for held, row in zip(engine.ids, new))
            if longest >= engine.limit:
                raise ContextFull(longest + 1, engine.limit)
            count = min(count, engine.limit - longest)
        how, choice, params = self._picking(sampling, engine.vocab_rows)
        return _Call(self, engine, new, single, count, how, choice, params, _key(rng))

    def _picking(self, sampling, rows: int) -> tuple[_loop.How, _loop.Choice, SamplingParams | None]:
        special = self.tokenizer.special
        forbidden = [self._one_id(token) for token in self.forbidden_tokens or ()]
        forbidden += [i for i in (special.start_of_image, special.end_of_image) if i is not None]
        ends = [i for i in (special.eos, special.end_of_turn) if i is not None]
        ends += [self._one_id(token) for token in self.stop_tokens or ()]
        blocked = blocked_ids(rows, self.tokenizer.vocab_size, (i for i in forbidden if i < rows))
        if not isinstance(sampling, SamplingParams):
            return sampling, _loop.Choice(None, blocked, end_array(set(ends))), None
        if sampling.stop:
            raise SamplingError("stop: a Sampler ends at tokens, not at strings; use `stop_tokens`")
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=fresh_seed())
        cuts, knobs = _sampling.from_params(sampling, rows)
        return cuts, _loop.Choice(knobs, blocked, end_array(set(ends))), sampling

    def _one_id(self, token: str | int) -> int:
        if not isinstance(token, str):
            return int(token)
        ids = self.tokenizer.encode(token)
        if len(ids) != 1:
            raise TokenizerError(f"Invalid token: {token!r}. It must be one token, but it is {len(ids)}.")
        return ids[0]


class _Call:
    """One call of `sample`, checked and ready to run."""

    def __init__(self, sampler, engine, new, single, count, how, choice, params, key):
        self._tokenizer, self._engine, self._single = sampler.tokenizer, engine, single
        self._count, self._width, self._how, self._choice = count, sampler.max_out_length, how, choice
        self._params, self._new, self._key = params, new, key
        total = max(len(held) + len(row) for held, row in zip(engine.ids, new)) + count
        if total > engine.limit:
            raise ContextFull(total, engine.limit)

    def result(self, return_state: bool):
        first = self._start()
        if self._count > 1 and not self._engine.done:
            rest = self._engine.run(self._how, self._choice, self._count - 1, self._uniforms(1, self._width))
            first = np.concatenate([first, rest], axis=1)
        texts = [self._tokenizer.decode(visible(self._tokenizer, _real(row))) for row in first]
        return self._output(texts, first, return_state, self._engine)

    def stream(self, return_state: bool) -> Iterator[Any]:
        decoders = [self._tokenizer.stream() for _ in self._new]
        tokens = self._start()
        while True:
            last = tokens.shape[1] == self._count or self._engine.done
            texts = []
            for decoder, token in zip(decoders, tokens[:, -1]):
                shown = visible(self._tokenizer, _real([token]))
                text = decoder.push(shown[0]) if shown else ""
                texts.append(text + (decoder.flush() if last else ""))
            yield self._output(texts, tokens, return_state, self._engine.fork() if return_state else None)
            if last:
                return
            step = self._engine.step(self._how, self._choice, self._uniforms(tokens.shape[1], 1)[:, 0])
            tokens = np.concatenate([tokens, step[:, None]], axis=1)

    def _start(self) -> np.ndarray:
        penalty = self._params is not None and self._params.repetition_penalty != 1.0
        first = self._engine.start(
            self._new,
            self._how,
            self._choice,
            reserve=self._count,
            key=self._key,
            u=self._uniforms(0, 1)[:, 0],
            penalty=penalty,
        )
        return first[:, None]

    def _uniforms(self, start: int, width: int) -> np.ndarray:
        """float32 [B, width]: the random numbers of tokens start..; the official methods draw from a key instead."""
        u = np.zeros((len(self._new), width), np.float32)
        if self._params is not None and not self._params.greedy:
            wanted = min(width, self._count - start)
            for b, row in enumerate(u):
                own = dataclasses.replace(self._params, seed=(self._params.seed + b) % 2**64)
                row[:wanted] = _sampling.uniforms(own, start, wanted)
        return u

    def _output(self, texts: list[str], tokens: np.ndarray, return_state: bool, engine: Engine | None):
        text = texts[0] if self._single else texts
        return SamplerOutput(text, SamplingState(tokens, engine.key, engine)) if return_state else text


def _texts(prompt: Any) -> tuple[list[str], bool]:
    """The prompts, and whether there is just one."""
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist()  # of no dimension: a str
    if isinstance(prompt, str):
        return [prompt], True
    texts = list(prompt) if isinstance(prompt, (list, tuple)) else None
    if texts is None or not all(isinstance(text, str) for text in texts):
        raise PromptError(f"prompt: expected a text or a list of texts, got {type(prompt).__name__}: {prompt!r:.80}")
    return texts, False


def _real(tokens: Sequence[int]) -> list[int]:
    """Tokens without the padding after a row's end."""
    return [int(token) for token in tokens if token]


def _key(rng: Any) -> jax.Array:
    if rng is None:
        rng = random.randint(0, 10**9)
    return jax.random.key(rng) if isinstance(rng, (int, np.integer)) else rng
