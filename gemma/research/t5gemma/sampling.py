# SPDX-License-Identifier: Apache-2.0
"""`Sampler`: inputs in, what the decoder writes for them out; one or a batch, at once or streamed.

The batch itself is `_decoding.py`, inputs become ids in `_inputs.py`. The sampling methods are those of `gm.text`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gemma.errors import PromptError, SamplingError, ShapeError, TokenizerError
from gemma.gm.text import Greedy, RandomSampling, SamplingMethod, TopkSampling, _cuts, _loop, _prompts, _sampling
from gemma.gm.text._generate import blocked_ids, end_array
from gemma.gm.text._sampler_call import jax_key
from gemma.gm.text._tokenizer import visible
from gemma.gm.typing import Params
from gemma.research.t5gemma import _inputs
from gemma.research.t5gemma._decoding import Decoding
from gemma.research.t5gemma.t5gemma import T5Gemma, T5GemmaCache
from gemma.sampling import SamplingParams, fresh_seed

__all__ = ["Greedy", "RandomSampling", "Sampler", "SamplerOutput", "SamplingMethod", "SamplingState", "TopkSampling"]

# Lengths are powers of two from these on, so that few programs are compiled.
_SHORTEST_INPUT = 64
_SHORTEST_OUTPUT = 16


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingState:
    """A batch as it was left.

    Attributes:
      predicted_tokens: int32 [B, n], 0 after a row's end token.
      predicted_logprobs: float32 [B, n], natural log-probabilities of these under the network itself.
      done: bool [B], rows that met an end token.
      encoder_mask: bool [B, S], which input tokens are no padding.
      cache: what the decoder holds; the token picked last is not in it yet.
      rng: the JAX key after the last step.
    """

    predicted_tokens: np.ndarray
    predicted_logprobs: np.ndarray
    done: np.ndarray
    encoder_mask: np.ndarray
    cache: T5GemmaCache
    rng: jax.Array

    @property
    def step(self) -> int:
        """Tokens picked."""
        return self.predicted_tokens.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class SamplerOutput:
    """What `sample` gives with `return_state=True`: the text (a list for several prompts), and the state."""

    text: str | list[str]
    state: SamplingState

    @property
    def tokens(self) -> np.ndarray:
        """The picked tokens, [n] for one prompt, else [B, n]."""
        tokens = self.state.predicted_tokens
        return tokens[0] if isinstance(self.text, str) else tokens


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """Answers inputs.

      sampler = t5gemma.Sampler(model=model, params=params, tokenizer=tokenizer)
      sampler.sample("Translate to French: good morning", max_new_tokens=32)

    Attributes:
      model: a `T5Gemma`.
      params: its parameters.
      tokenizer: of `gm.text` or `gemma.tokenizer`.
      sampling: how tokens are picked: a `SamplingMethod`, or `gemma.sampling.SamplingParams`.
      forbidden_tokens: ids or texts (of one token each) that are never picked.
      max_input_length: the most tokens of an input.
      max_output_length: the most tokens that are written.
      bos: put a bos before an input. The official sampler puts none, Hugging Face's tokenizer one; the decoder starts
        with one either way.
    """

    model: T5Gemma
    params: Params
    tokenizer: Any
    sampling: SamplingMethod | SamplingParams = Greedy()
    forbidden_tokens: Sequence[str | int] | None = None
    max_input_length: int = 1024
    max_output_length: int = 1024
    bos: bool = False

    def __post_init__(self):
        for name in ("max_input_length", "max_output_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SamplingError(f"{name}: expected a whole number of at least 1, got {value!r}")
        _checked(self.sampling)

    def sample(
        self,
        prompt: Any,
        *,
        max_new_tokens: int | None = None,
        rng: Any = None,
        return_state: bool = False,
        sampling: SamplingMethod | SamplingParams | None = None,
        sharding: Any = None,
        stream: bool = False,
        images: Any = None,
    ) -> Any:
        """What the decoder writes for one input or for several.

        Args:
          prompt: a text, in which special tokens may be spelled; token ids, taken as they are; or the turns of a
            conversation; or a list of these. The answer to one does not depend on the others of its batch.
          max_new_tokens: None: `max_output_length`. More than that is cut to it, with a warning.
          rng: an int or a JAX key; None: unpredictable. `SamplingParams` have a seed of their own.
          return_state: return a `SamplerOutput`, when streaming one per step.
          sampling: replaces the sampler's own.
          sharding: a `jax.sharding.NamedSharding` whose first axis says how rows are spread over devices.
          stream: return an iterator of pieces of text, a piece per step; of lists of pieces for several prompts.
          images: of a T5Gemma 2: pictures [B, I, H, W, 3] (see `T5Gemma.__call__`), for which `<start_of_image>` stands
            in texts and turns; token ids hold the image tokens already.

        Returns:
          The new text only; `<end_of_turn>` stays in it.

        Raises:
          PromptError, SamplingError, ShapeError: (ValueErrors) before anything is computed.
        """
        prompts = _prompts.parse(prompt)
        if not prompts.items:
            if return_state:
                raise PromptError("prompt is an empty list: there is no state to return")
            return iter(()) if stream else []
        images = None if images is None else np.asarray(images)
        inputs = self._inputs(prompts, images)
        count = self._count(max_new_tokens)
        how, choice, uniforms = self._picking(self.sampling if sampling is None else sampling, len(inputs))
        start = lambda: Decoding(  # noqa: E731  (a stream starts when it is asked for)
            self.model,
            self.params,
            inputs,
            how=how,
            choice=choice,
            bos=self.tokenizer.special.bos,
            length=self._width(count),
            key=jax_key(rng),
            uniforms=uniforms,
            images=images,
            sharding=sharding,
        )
        output = lambda texts, made: self._output(texts, made, inputs, prompts.single, return_state)  # noqa: E731
        return self._stream(start, count, output) if stream else self._all(start, count, output)

    def _all(self, start: Callable[[], Decoding], count: int, output: Callable[..., Any]) -> Any:
        made = start()
        if count > 1 and not made.done.all():
            made.run(count - 1, self._width(count))
        return output([self.tokenizer.decode(self._shown(row)) for row in made.tokens], made)

    def _stream(self, start: Callable[[], Decoding], count: int, output: Callable[..., Any]) -> Iterator[Any]:
        made = start()
        decoders = [self.tokenizer.stream() for _ in made.tokens]
        while True:
            last = made.tokens.shape[1] == count or bool(made.done.all())
            texts = []
            for decoder, token in zip(decoders, made.tokens[:, -1:]):
                texts.append("".join(decoder.push(i) for i in self._shown(token)) + (decoder.flush() if last else ""))
            yield output(texts, made)
            if last:
                return
            made.step()

    def _shown(self, tokens: np.ndarray) -> list[int]:
        return visible(self.tokenizer, [int(token) for token in tokens])

    def _output(
        self, texts: list[str], made: Decoding, inputs: np.ndarray, single: bool, return_state: bool
    ) -> str | list[str] | SamplerOutput:
        text = texts[0] if single else texts
        if not return_state:
            return text
        state = SamplingState(made.tokens, made.logprobs, made.done, inputs != 0, made.cache, made.rng)
        return SamplerOutput(text, state)

    def _inputs(self, prompts: _prompts.Prompts, images: Any) -> np.ndarray:
        """The prompts as the encoder reads them, int32 [B, S]."""
        rows = []
        if images is not None and images.ndim != 5:
            raise ShapeError(f"images: expected [{len(prompts.items)}, I, H, W, 3], got {images.shape}")
        for number, item in enumerate(prompts.items):
            as_ids = isinstance(item[0] if item else "", (int, np.integer))
            if isinstance(item, str):
                ids = list(self.tokenizer.encode(item, add_bos=self.bos))
            else:
                ids = _prompts.encode(item, self.tokenizer, held=(), images=0 if images is None else images.shape[1])
                ids = ids if as_ids or self.bos else ids[1:]
            if images is not None and self.model.config.merged and not as_ids:  # ids hold the image tokens already
                ids = _inputs.expand_images(ids, self.model.config.source)
            if len(ids) <= int(self.bos and isinstance(item, str)) or 0 in ids:
                what = "holds padding (id 0)" if 0 in ids else "is empty: an encoder needs at least one token to read"
                raise PromptError(f"prompt {number} {what}")
            rows.append(ids)
        longest = max(map(len, rows))
        if longest > self.max_input_length:
            raise PromptError(f"Max prompt length {longest} is longer than max input length {self.max_input_length}")
        table = np.zeros((len(rows), _bucket(longest, _SHORTEST_INPUT, self.max_input_length)), np.int32)
        for row, ids in zip(table, rows):
            row[: len(ids)] = ids
        _inputs.check_inputs(table, None, self.model.config)
        _inputs.check_images(images, table, self.model.config)  # under jit only shapes can be looked at
        return table

    def _width(self, count: int) -> int:
        return _bucket(count, _SHORTEST_OUTPUT, self.max_output_length)

    def _count(self, max_new_tokens: int | None) -> int:
        count = self.max_output_length if max_new_tokens is None else max_new_tokens
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise SamplingError(f"max_new_tokens: expected a whole number of at least 1, got {count!r}")
        if count > self.max_output_length:
            warnings.warn(
                f"max_new_tokens {count} is more than max_output_length {self.max_output_length}, which is used instead",
                stacklevel=3,
            )
        return min(int(count), self.max_output_length)

    def _picking(self, sampling: Any, rows: int) -> tuple[_loop.How, _loop.Choice, Callable[[int, int], np.ndarray]]:
        config, special = self.model.config, self.tokenizer.special
        table = config.decoder_config.num_embed
        forbidden = [self._one_id(token) for token in self.forbidden_tokens or ()]
        forbidden += [i for i in getattr(self.tokenizer, "FORBIDDEN_TOKENS", ()) if i < table]
        blocked = blocked_ids(table, self.tokenizer.vocab_size, forbidden)
        ends = {i for i in (special.eos, special.end_of_turn) if i is not None}
        ends = end_array(ends | set(config.source.decoder.end_token_ids))
        if not isinstance(_checked(sampling), SamplingParams):
            return sampling, _loop.Choice(None, blocked, ends), lambda start, n: np.zeros((rows, n), np.float32)
        if sampling.stop:
            raise SamplingError("stop: this sampler ends at tokens, not at strings")
        seed = fresh_seed() if sampling.seed is None else sampling.seed
        params = [dataclasses.replace(sampling, seed=(seed + b) % 2**64) for b in range(rows)]
        cuts, knobs = _cuts.from_params(params, table)
        return (
            cuts,
            _loop.Choice(knobs, blocked, ends),
            lambda at, n: np.stack([_cuts.uniforms(p, at, n) for p in params]),
        )

    def _one_id(self, token: str | int) -> int:
        ids = self.tokenizer.encode(token) if isinstance(token, str) else [int(token)]
        if len(ids) != 1:
            raise TokenizerError(f"Invalid token: {token!r}. It must be one token, but it is {len(ids)}.")
        return ids[0]


def _checked(sampling: Any) -> Any:
    if not isinstance(sampling, SamplingParams):
        _sampling.check_method(sampling)
    return sampling


def _bucket(length: int, least: int, most: int) -> int:
    """A length that few programs are compiled for, at least `length` and at most `most`."""
    return min(max(1 << (length - 1).bit_length(), least), most)
