# SPDX-License-Identifier: Apache-2.0
"""One sequence that an engine was asked for: what was asked, how far it is, and what came out. No tensor, no runner.

    WAITING --admitted--> PREFILL --prompt read--> DECODE --ended--> DONE
        \\_________________ cancelled, or failed __________________/^

Which request moves when is `scheduler.py`; who holds which slot is `blocks.py`; `engine.py` joins them to a runner.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from gemma.errors import PromptError, SamplingError
from gemma.sampling import SamplingParams, StopChecker, fresh_seed, step_seed

if TYPE_CHECKING:
    from gemma.serving._lookup import Lookup
    from gemma.serving.runner import StepOut


class State(enum.Enum):
    """Where a request stands."""

    WAITING = "waiting"  # for a slot
    PREFILL = "prefill"  # its prompt is being read
    DECODE = "decode"
    DONE = "done"


@dataclasses.dataclass(frozen=True)
class Event:
    """What happened to a request: a token, its end, or both in one.

    Attributes:
      request: whose.
      token: the id that came, None where the request ended without one.
      text: what may be shown now; "" without a tokenizer, and while a stop string or a character is incomplete.
      logprob: of the token, natural log, before penalties.
      top: the likeliest (id, logprob) pairs, as far as the runner tells them.
      finish_reason: None while it goes on; else as in `Request`.
    """

    request: Request
    token: int | None = None
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None


class Request:
    """One sequence. The engine changes it; callers read it.

    Attributes:
      number: counts the requests of an engine from 0.
      prompt: its ids.
      params: how to sample; the seed is set.
      end_ids: ids that end it.
      state: where it stands.
      ids: what was generated, the end token included.
      text: the same as text, without the end token, ending before a stop string; "" without a tokenizer.
      finish_reason: None, "stop" (an end token or a stop string), "length" (max_new_tokens), "context" (the slot is
        full), "cancelled" or "error".
      stopped_by: the end token's id or the stop string.
      error: what went wrong, where the reason is "error".
      reused: tokens of the prompt that another sequence had left behind.
      drafted, accepted: tokens that were guessed ahead, and how many of them were right.
      submitted, started, ended: times of the engine's clock, in seconds; `started` is that of the first token.
    """

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        params: SamplingParams | None = None,
        end_ids: Collection[int] = (),
        *,
        tokenizer: Any = None,
        on_event: Callable[[Event], None] | None = None,
        lookup: Lookup | None = None,
    ):
        params = SamplingParams(temperature=0) if params is None else params
        if params.stop and tokenizer is None:
            raise SamplingError("stop: stop strings are about text, and this engine was made without a tokenizer")
        if not len(prompt):
            raise PromptError("submit: expected at least one id in the prompt, got none")
        self.number, self.prompt = number, tuple(int(i) for i in prompt)
        self.params = params if params.seed is not None else dataclasses.replace(params, seed=fresh_seed())
        self.end_ids = frozenset(int(i) for i in end_ids)
        self.on_event, self.lookup = on_event, lookup
        self._decoder = None if tokenizer is None else tokenizer.stream()
        self._checker = StopChecker(params.stop)
        self.state = State.WAITING
        self.slot: int | None = None
        self.read = 0  # tokens of the prompt that its slot holds
        self.history = list(self.prompt)  # prompt and generated ids: what penalties look at
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.stopped_by: int | str | None = None
        self.error: Exception | None = None
        self.reused = self.drafted = self.accepted = 0
        self.submitted = self.started = self.ended = 0.0
        self.events: deque[Event] = deque()  # not yet taken by `Engine.stream`

    def __repr__(self) -> str:
        return f"Request({self.number}, {self.state.value}, {len(self.prompt)} + {len(self.ids)} ids)"

    @property
    def done(self) -> bool:
        return self.state is State.DONE

    @property
    def last(self) -> int:
        """The newest token: generated, but not cached yet."""
        return self.ids[-1]

    def rng(self, ahead: int = 0) -> int:
        """The random state of the next token, or of one further on: from the seed and its index alone."""
        return step_seed(self.params.seed, len(self.ids) + ahead)

    def take(self, out: StepOut, room: bool) -> Event:
        """Adds a sampled token and decides whether it was the last.

        Args:
          out: from the runner.
          room: whether the slot can hold the token, so that another can follow.
        """
        token = int(out.token)
        self.ids.append(token)
        self.history.append(token)
        if self.lookup is not None:
            self.lookup.extend((token,))
        text = ""
        if token in self.end_ids:
            self.finish_reason, self.stopped_by = "stop", token
        elif self._decoder is not None:
            text = self._checker.push(self._decoder.push(token))
            if self._checker.stopped is not None:
                self.finish_reason, self.stopped_by = "stop", self._checker.stopped
        if self.finish_reason is None:
            if len(self.ids) >= self.params.max_new_tokens:
                self.finish_reason = "length"
            elif not room:
                self.finish_reason = "context"
        if self.finish_reason is not None:
            text += self._rest()
        self.text += text
        return Event(self, token, text, out.logprob, out.top, self.finish_reason)

    def finish(self, reason: str, error: Exception | None = None) -> Event:
        """Ends it without a token: "cancelled" or "error"."""
        self.finish_reason, self.error = reason, error
        text = self._rest()
        self.text += text
        return Event(self, text=text, finish_reason=reason)

    def _rest(self) -> str:
        """The text held back for a stop string or a character that did not come."""
        if self._decoder is None or self._checker.stopped is not None:
            return ""
        text = self._checker.push(self._decoder.flush())
        if self._checker.stopped is not None and self.finish_reason == "length":
            self.finish_reason, self.stopped_by = "stop", self._checker.stopped
        return text + self._checker.flush()
