# SPDX-License-Identifier: Apache-2.0
"""`Sampler`: texts in, texts out, for one prompt or a batch, at once or streamed, with the official signatures.

What a prompt may be is `_prompts.py`, one call that runs is `_sampler_call.py`, what it gives back `_sampler_loop.py`.
Chat templates are applied to turns only; conversations are `_chat_sampler.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma.errors import ContextFull, PromptError, SamplingError, TokenizerError
from gemma.gm.text import _context, _cuts, _images, _loop, _prompts, _sampling
from gemma.gm.text._engine import Engine
from gemma.gm.text._generate import blocked_ids, end_array
from gemma.gm.text._sampler_call import Call, jax_key
from gemma.gm.text._sampler_loop import SamplerOutput, SamplingState
from gemma.gm.text._tokenizer import Tokenizer
from gemma.gm.typing import Params
from gemma.sampling import SamplingParams, fresh_seed

__all__ = ["Sampler", "SamplerOutput", "SamplingState"]

_GREEDY = _sampling.Greedy()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sampler:
    """Continues texts.

      sampler = gm.text.Sampler(model=model, params=params)
      sampler.sample("The history of computing began", max_new_tokens=16)

    Attributes:
      model: a network of `gm.nn`.
      params: its parameters.
      tokenizer: of `gm.text` or `gemma.tokenizer`; None: the one of the model's generation.
      sampling: how tokens are picked: a `SamplingMethod`, or `gemma.sampling.SamplingParams`.
      forbidden_tokens: ids or texts (of one token each) that are never picked; image markers never are.
      stop_tokens: ids or texts (of one token each) that end a text, besides `<eos>` and `<end_of_turn>`.
      cache_length: tokens that the cache holds at first; it grows up to the model's limit.
      max_out_length: the most that `max_new_tokens` may ask for.
      pad_length: prompts are padded to the smallest of these that is long enough, and each of them is compiled once;
        longer prompts are read in chunks of the largest.
      context_policy: what happens when the transcript and `max_new_tokens` exceed the model's context. "error" raises
        `ContextFull`. "slide" gives up the beginning (whole exchanges of a conversation, else tokens; the bos stays)
        and reads the rest anew; `SamplingState.dropped` says how much.
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
    context_policy: str = "error"

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
        same = version == own or (version == "3n" and not isinstance(self.tokenizer, Tokenizer) and own == 3)
        if version and own and not same:  # a vocabulary itself does not tell Gemma 3n from 3
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
        _context.check_policy(self.context_policy)
        _check_sampling(self.sampling)

    def sample(
        self,
        prompt: Any,
        *,
        images: Any = None,
        max_new_tokens: int | None = None,
        stream: bool = False,
        sampling: _sampling.SamplingMethod | SamplingParams | None = None,
        rng: Any = None,
        return_state: bool = False,
        last_state: SamplingState | None = None,
        sharding: Any = None,
        num_samples: int = 1,
    ) -> Any:
        """Continues one prompt or several.

        Args:
          prompt: a text, in which special tokens may be spelled; or token ids, taken as they are (a list of ints, or an
            integer array [T]); or the turns of a conversation (`gemma.chat.Turn`, or `UserTurn` and `ModelTurn`), for
            which the chat template is written. Or a list of these, which need not be equally long: the result of a
            prompt does not depend on what it is batched with. A text gets a `<bos>`, except after `last_state`.
          images: the pictures of the prompt, in the order of their `<start_of_image>` markers, as many as those: paths,
            bytes, PIL images or arrays; for several prompts one entry each (see `_images.prepare`).
          max_new_tokens: None or 0: up to `max_out_length`, as far as the model's limit allows.
          stream: return an iterator of pieces of text, a piece per step; of lists of pieces for several prompts.
          sampling: replaces the sampler's own. With `SamplingParams` (whose seed is used, row b with seed + b) neither
            `rng` nor its `max_new_tokens` are looked at.
          rng: an int or a JAX key; None: unpredictable.
          return_state: return a `SamplerOutput`, which also has the tokens and their log-probabilities; when streaming,
            one per step.
          last_state: go on after the texts of that state; equal to one pass over the whole transcript.
          sharding: a `jax.sharding.NamedSharding` whose first axis says how rows (tokens and caches) are spread over
            devices. Parameters on the same devices stay as they are placed, others are copied to all of them.
          num_samples: continuations of each prompt, which is read once.

        Returns:
          The new text only; an end token that has a text, such as `<end_of_turn>`, stays in it. A str for one prompt, a
          list for several; with `num_samples` above 1, a list of samples in place of each str.

        Raises:
          PromptError, ContextFull, SamplingError, ShapeError: (ValueErrors) before anything is generated.
        """
        prompts = _prompts.parse(prompt)
        if isinstance(num_samples, bool) or not isinstance(num_samples, (int, np.integer)) or num_samples < 1:
            raise SamplingError(f"num_samples: expected a whole number, 1 or more, got {num_samples!r}")
        if not prompts.items:
            if return_state:
                raise PromptError("prompt is an empty list: there is no state to return")
            return iter(()) if stream else []
        engine = self._engine(len(prompts.items), last_state, sharding)
        call = self._call(prompts, engine, images, max_new_tokens, sampling, rng, int(num_samples))
        return call.stream(return_state) if stream else call.result(return_state)

    def _engine(self, rows: int, last_state: SamplingState | None, sharding: Any, *, keep: bool = True) -> Engine:
        if last_state is None:
            return Engine(
                self.model,
                self.params,
                rows,
                cache_length=self.cache_length,
                buckets=self.pad_length,
                sharding=sharding,
            )
        held = len(last_state.transcripts)
        if held != rows:
            raise PromptError(f"last_state holds {held} conversations; expected as many prompts, got {rows}")
        engine = last_state.engine(keep=keep)
        return engine if sharding is None else engine.moved(sharding)

    def _call(
        self,
        prompts: _prompts.Prompts,
        engine: Engine,
        images: Any,
        max_new_tokens: int | None,
        sampling: Any,
        rng: Any,
        num_samples: int,
    ) -> Call:
        """One call, checked: what is wrong is said here, and `engine` is as it was."""
        count = max_new_tokens or self.max_out_length
        if count > self.max_out_length or count < 1:
            raise SamplingError(
                f"max_new_tokens should be smaller or equal to max_out_length. Got: {max_new_tokens} and "
                f"{self.max_out_length}."
            )
        pixels = _images.prepare(images, len(prompts.items), single=prompts.single, model=engine.model)
        new = []
        for b, (item, row) in enumerate(zip(prompts.items, pixels)):
            ids = _prompts.encode(item, self.tokenizer, held=engine.ids[b], images=len(row))
            new.append(engine.expand(b, ids, len(row)))
        longest = max(len(held) + len(row) for held, row in zip(engine.ids, new))
        if not max_new_tokens and self.context_policy == "error":
            if longest >= engine.limit:
                raise ContextFull(longest + 1, engine.limit)
            count = min(count, engine.limit - longest)
        elif longest + count > engine.limit and self.context_policy == "error":
            raise ContextFull(longest + count, engine.limit)
        starts = [self._cuts(prompts, [*held, *row]) for held, row in zip(engine.ids, new)]
        drop = [
            _context.slide([*held, *row], new=count, limit=engine.limit, cuts=cuts)
            for held, row, cuts in zip(engine.ids, new, starts)
        ]
        params = self._seeded(_check_sampling(self.sampling if sampling is None else sampling), len(new) * num_samples)
        how, choice = self._picking(params, engine.vocab_rows)
        nest = (len(new), num_samples, prompts.single)
        return Call(
            self.tokenizer,
            engine,
            new,
            pixels,
            drop,
            count,
            self.max_out_length,
            how,
            choice,
            params,
            jax_key(rng),
            nest,
        )

    def _cuts(self, prompts: _prompts.Prompts, row: list[int]) -> list[int] | None:
        """Where the turns of a user begin in a conversation; None for a plain text, which may be cut anywhere."""
        special = self.tokenizer.special
        if self.context_policy == "error" or not prompts.conversation:
            return None
        core = getattr(self.tokenizer, "core", self.tokenizer)
        user = [special.start_of_turn, *core.encode("user\n", parse_special=False)]
        return [at for at in range(1, len(row)) if row[at : at + len(user)] == user]

    def _seeded(self, sampling: Any, rows: int) -> Any:
        """`SamplingParams` of every row, each with a seed of its own; a sampling method as it is."""
        if not isinstance(sampling, SamplingParams):
            return sampling
        if sampling.stop:
            raise SamplingError("stop: a Sampler ends at tokens, not at strings; use `stop_tokens`")
        seed = fresh_seed() if sampling.seed is None else sampling.seed
        return [dataclasses.replace(sampling, seed=(seed + b) % 2**64) for b in range(rows)]

    def _picking(self, sampling: Any, rows: int) -> tuple[_loop.How, _loop.Choice]:
        special = self.tokenizer.special
        forbidden = [self._one_id(token) for token in self.forbidden_tokens or ()]
        forbidden += [i for i in (special.start_of_image, special.end_of_image) if i is not None]
        ends = [i for i in (special.eos, special.end_of_turn) if i is not None]
        ends += [self._one_id(token) for token in self.stop_tokens or ()]
        blocked = blocked_ids(rows, self.tokenizer.vocab_size, (i for i in forbidden if i < rows))
        if not isinstance(sampling, list):
            return sampling, _loop.Choice(None, blocked, end_array(set(ends)))
        cuts, knobs = _cuts.from_params(sampling, rows)
        return cuts, _loop.Choice(knobs, blocked, end_array(set(ends)))

    def _one_id(self, token: str | int) -> int:
        if not isinstance(token, str):
            return int(token)
        ids = self.tokenizer.encode(token)
        if len(ids) != 1:
            raise TokenizerError(f"Invalid token: {token!r}. It must be one token, but it is {len(ids)}.")
        return ids[0]


def _check_sampling(sampling: Any) -> Any:
    if not isinstance(sampling, SamplingParams):
        _sampling.check_method(sampling)
    return sampling
