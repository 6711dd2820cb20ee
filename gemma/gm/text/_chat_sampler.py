# SPDX-License-Identifier: Apache-2.0
"""`ChatSampler`: a conversation with an instruction-tuned model, turn by turn, with the official signatures.

It writes the chat template, keeps the state between turns and hides the end token; sampling is `_sampler.py`. What a
user types stays text: a spelled marker is no marker, except `<start_of_image>` in a turn that comes with images.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from gemma.errors import PromptError
from gemma.gm.text import _prompts, _sampling
from gemma.gm.text._sampler import Sampler
from gemma.gm.text._sampler_loop import SamplerOutput, SamplingState
from gemma.gm.text._template import ModelTurn, Turn, UserTurn
from gemma.gm.typing import Params
from gemma.sampling import SamplingParams


@dataclasses.dataclass(kw_only=True, eq=False)
class ChatSampler:
    """A conversation.

      chatbot = gm.text.ChatSampler(model=model, params=params, multi_turn=True)
      chatbot.chat("Who wrote Faust?")
      chatbot.chat("When?")

    Every turn equals one pass over the whole transcript; only what is new is read.

    Attributes:
      model: a network of `gm.nn`.
      params: its parameters.
      multi_turn: whether a turn goes on after the turns before it; else each begins a new conversation.
      print_stream: whether the answer is printed while it is made.
      tokenizer: of `gm.text` or `gemma.tokenizer`; None: the one of the model's generation.
      sampling: how tokens are picked: a `SamplingMethod`, or `gemma.sampling.SamplingParams`.
      forbidden_tokens: as in `Sampler`.
      stop_tokens: as in `Sampler`; one that comes stays in the answer.
      cache_length: tokens that the cache holds at first; it grows up to the model's limit.
      max_out_length: the most tokens of one answer.
      context_policy: as in `Sampler`: "error", or "slide", which gives up the oldest exchanges.
      last_state: of a conversation to go on with, when `multi_turn`; then that of the newest turn.
      turns: what was said, `UserTurn` and `ModelTurn` in alternation. Read it, do not pass it.
    """

    model: Any
    params: Params
    multi_turn: bool = False
    print_stream: bool = False
    tokenizer: Any = None
    sampling: _sampling.SamplingMethod | SamplingParams = _sampling.Greedy()
    forbidden_tokens: Sequence[str | int] | None = None
    stop_tokens: Sequence[str | int] | None = None
    cache_length: int = 4096
    max_out_length: int = 2048
    context_policy: str = "error"
    last_state: SamplingState | None = dataclasses.field(default=None, repr=False)
    turns: list[Turn] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        if self.turns:
            raise PromptError("Currently initializing the sampler with previous conversation is not supported.")
        self.tokenizer = self.sampler.tokenizer

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The sampler that does the work."""
        return Sampler(
            model=self.model,
            params=self.params,
            tokenizer=self.tokenizer,
            sampling=self.sampling,
            forbidden_tokens=self.forbidden_tokens,
            stop_tokens=self.stop_tokens,
            cache_length=self.cache_length,
            max_out_length=self.max_out_length,
            context_policy=self.context_policy,
        )

    def chat(
        self,
        prompt: str,
        *,
        images: Any = None,
        sampling: _sampling.SamplingMethod | SamplingParams | None = None,
        rng: Any = None,
        max_new_tokens: int | None = None,
        multi_turn: bool | None = None,
        print_stream: bool | None = None,
    ) -> str:
        """One turn.

        Args:
          prompt: what the user says; white space around it is dropped, as the template does.
          images: the pictures of this turn, as many as the prompt has `<start_of_image>`: one, or several as a list.
          sampling: for this turn, instead of the sampler's own.
          rng: an int or a JAX key; None: unpredictable.
          max_new_tokens: of the answer; None or 0: `max_out_length`, as far as the model's limit allows.
          multi_turn: for this turn, instead of the sampler's own. False begins a new conversation.
          print_stream: for this turn, instead of the sampler's own.

        Returns:
          The answer, without its `<end_of_turn>`.

        Raises:
          PromptError, ContextFull, SamplingError: (ValueErrors) the conversation stays as it was.
        """
        if not isinstance(prompt, str):
            raise PromptError(f"prompt: expected what the user says as a str, got {type(prompt).__name__}")
        goes_on = self.multi_turn if multi_turn is None else multi_turn
        last_state = self.last_state if goes_on else None
        sampler = self.sampler
        engine = sampler._engine(1, last_state, None, keep=False)
        turn = _prompts.Prompts([[UserTurn(prompt)]], single=True)
        call = sampler._call(turn, engine, images, max_new_tokens, sampling, rng, 1)
        streams = self.print_stream if print_stream is None else print_stream
        out = self._printed(call.stream(return_state=True)) if streams else call.result(return_state=True)
        text = self._without_end(out)
        if not goes_on:
            self.turns = []
        self.turns += [UserTurn(prompt), ModelTurn(text)]
        self.last_state = out.state
        return text

    def _printed(self, pieces: Iterable[SamplerOutput]) -> SamplerOutput:
        """Prints pieces as they come, the end token left out; the last output with the whole text."""
        whole = ""
        for piece in pieces:
            whole += piece.text
            print(self._without_end(piece), end="", flush=True)
        return SamplerOutput(whole, piece.state)

    def _without_end(self, out: SamplerOutput) -> str:
        special = self.tokenizer.special
        if out.tokens[-1] != special.end_of_turn:
            return out.text
        return out.text.removesuffix(self.tokenizer.decode([special.end_of_turn]))
