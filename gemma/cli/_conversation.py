# SPDX-License-Identifier: Apache-2.0
"""A conversation with a model: turns in, streamed answers out, for tuned and for base models.

The whole conversation is encoded anew for every turn, exactly as the template says; the backend computes only what it
does not hold yet. Templates are `gemma/chat.py`; the loop around this is `chat.py` beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gemma.cli._generation import Generation
from gemma.errors import ContextFull

if TYPE_CHECKING:
    from gemma.chat import Turn
    from gemma.cli._backend import Opened
    from gemma.sampling import SamplingParams


class Conversation:
    """Turns with one model.

    Attributes:
      turns: what was said, the system's instructions first if there are any.
      base: True for a pretrained model, which gets a few-shot text instead of the chat template.
      stats: whether who shows the answers should say how fast they were.
      generation: the newest answer, with its counts and times; None before the first.
    """

    def __init__(
        self,
        opened: Opened,
        params: SamplingParams,
        context: int,
        *,
        system: str | None = None,
        base: bool = False,
        stats: bool = False,
    ):
        self._opened, self._params, self._context, self._system = opened, params, context, system
        self.base, self.stats = base, stats
        self.generation: Generation | None = None
        self.reset()

    @property
    def name(self) -> str:
        return self._opened.name

    def reset(self) -> None:
        """Forgets every turn but the system's."""
        from gemma.chat import Turn

        self.turns: tuple[Turn, ...] = () if self._system is None else (Turn("system", self._system),)
        self._opened.model.begin(self._context)

    def ask(self, text: str) -> Iterator[str]:
        """Adds a user's turn; yields the answer in pieces and adds it too, as far as it was taken.

        Raises:
          ContextFull: the conversation has no room for an answer; it stays as it was before the turn.
        """
        from gemma.chat import Turn

        asked = (*self.turns, Turn("user", text))
        ids, params, end_ids = self._prompt(asked)
        room = self._context - len(ids)
        if room < 1:
            raise ContextFull(len(ids) + 1, self._context, "the conversation")
        params = dataclasses.replace(params, max_new_tokens=min(params.max_new_tokens, room))
        answer = ""
        try:
            self.generation = Generation(self._opened, ids, params, end_ids, show_special=False)
            for piece in self.generation:
                answer += piece
                yield piece
        finally:  # also where the user stopped it: what was seen is part of the conversation
            if answer.strip():
                self.turns = (*asked, Turn("model", answer.strip()))

    def _prompt(self, turns: tuple[Turn, ...]):
        """(ids, parameters, end tokens) of the next answer."""
        from gemma import chat
        from gemma.sampling import step_seed

        tokenizer, config = self._opened.tokenizer, self._opened.config
        end_ids = chat.end_token_ids(tokenizer, config)
        # Every answer draws from a stream of its own; the seed of the run decides them all.
        params = dataclasses.replace(self._params, seed=step_seed(self._params.seed or 0, len(turns)))
        if not self.base:
            return list(chat.encode_chat(tokenizer, turns).ids), params, end_ids
        ids = tokenizer.encode(chat.few_shot(turns), add_bos=True, parse_special=False)
        return ids, dataclasses.replace(params, stop=(*params.stop, *chat.FEW_SHOT_STOP)), end_ids
