# SPDX-License-Identifier: Apache-2.0
"""The engine of one process: requests in, tokens out, on any runner; many sequences at once, each as if it were alone.

It joins the queue (`scheduler.py`), the slots (`blocks.py`) and a runner (`runner.py`); it never sees a tensor. One
thread drives it; prompts are text, without images. The tokens of a request depend on its prompt, its parameters and its
seed only: neither on neighbours, nor on how its prompt was cut or what of it was used again, as far as the runner
computes the same in every batch.

    engine = Engine(runner, tokenizer, slots=4, max_len=4096)
    request = engine.submit(ids, SamplingParams(temperature=0), end_ids={1})
    for event in engine.stream(request):
        print(event.text, end="")
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from gemma.errors import ContextFull, GemmaError, PromptError, QueueFull
from gemma.sampling import SamplingParams, logprobs, sample, top_logprobs
from gemma.serving._lookup import Lookup
from gemma.serving.blocks import Slots
from gemma.serving.request import Event, Request, State
from gemma.serving.runner import Runner, StepIn, StepOut
from gemma.serving.scheduler import Scheduler

__all__ = ["Engine", "Event", "Request", "State", "Stats"]
_FAULTS = (GemmaError, MemoryError)  # what fails one request; anything else is a defect, and is raised


@dataclasses.dataclass
class Stats:
    """Counts since the engine was made: turns, tokens of prompts read and used again, tokens made, guesses."""

    turns: int = 0
    prefilled: int = 0
    reused: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0


class Engine:
    """Drives a runner for many requests.

    Attributes:
      runner: it belongs to the engine from here on.
      stats: counts.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any = None,
        *,
        slots: int | None = None,
        max_len: int | None = None,
        cache_dtype: str | None = None,
        chunk: int = 512,
        interleave: int = 128,
        queue: int | None = None,
        speculate: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Opens the runner's slots.

        Args:
          runner: which runs the model.
          tokenizer: for text and stop strings; None: ids only.
          slots, max_len: sequences at once and tokens of each; None: what the runner has.
          cache_dtype: as the runner takes it; None: the dtype that it computes in.
          chunk, interleave, queue: as in `Scheduler`; `queue` None is unbounded.
          speculate: most tokens guessed ahead (prompt lookup) while one sequence decodes alone; 0 is off. The tokens
            stay the same. Only for runners that can check a guess (`verify`).
          clock: seconds, for the times of requests.
        """
        if speculate and not hasattr(runner, "verify"):
            raise GemmaError(f"speculate: {type(runner).__name__} cannot check guesses; the native CPU runner can")
        if speculate < 0:
            raise GemmaError(f"speculate: expected 0 (off) or a number of tokens, got {speculate}")
        info = runner.info
        runner.open(slots or info.slots, max_len or info.max_len, cache_dtype or info.dtype)
        self.runner, self.stats = runner, Stats()
        self._tokenizer, self._clock, self._speculate = tokenizer, clock, speculate
        self._max_len, self._vocab = runner.info.max_len, runner.info.config.vocab_size
        self._slots = Slots(runner.info.slots, getattr(runner, "can_copy_prefix", None))
        self._scheduler = Scheduler(chunk=chunk, interleave=interleave, queue=queue)
        self._count = 0
        self._happened: list[Event] = []

    # ---- requests

    def submit(
        self,
        ids: Sequence[int],
        params: SamplingParams | None = None,
        end_ids: Collection[int] = (),
        *,
        on_event: Callable[[Event], None] | None = None,
    ) -> Request:
        """Queues a request.

        Args:
          ids: the prompt.
          params: how to sample; None is greedy.
          end_ids: ids that end it.
          on_event: called with each Event at the end of the turn in which it happened.

        Raises:
          PromptError: no ids, or ids that the model has not. ContextFull: the prompt fits no slot. QueueFull.
          SamplingError: stop strings without a tokenizer.
        """
        lookup = Lookup(self._speculate) if self._speculate else None
        request = Request(
            self._count, ids, params, end_ids, tokenizer=self._tokenizer, on_event=on_event, lookup=lookup
        )
        outside = [i for i in request.prompt if not 0 <= i < self._vocab]
        if outside:
            raise PromptError(f"submit: expected ids in 0..{self._vocab - 1}, got {outside[0]}")
        if len(request.prompt) > self._max_len:
            raise ContextFull(len(request.prompt), self._max_len, "the prompt")
        if self._scheduler.full:
            raise QueueFull(self.waiting, self._scheduler.queue)
        if lookup is not None:
            lookup.extend(request.prompt)
        self._count += 1
        request.submitted = self._clock()
        self._scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request now, wherever it is; its slot is free at once. Nothing happens to one that is over."""
        if not request.done:
            self._end(request, request.finish("cancelled"))

    def stream(self, request: Request) -> Iterator[Event]:
        """Yields the events of one request, driving the engine while there are none. Leaving it early cancels it."""
        try:
            while True:
                while request.events:
                    event = request.events.popleft()
                    yield event
                    if event.finish_reason is not None:
                        return
                if request.done:
                    return
                self.step()
        finally:
            self.cancel(request)

    def run(self) -> None:
        """Drives the engine until nothing is left to do."""
        while not self.idle:
            self.step()

    def set_adapter(self, adapter: Any, *, scale: float = 1.0) -> None:
        """Changes the LoRA adapter of every request from here on; None takes it away. What slots hold is forgotten.

        Args:
          adapter: a `gemma.adapters.AdapterFile`, of the runner's model.
          scale: multiplies the adapter's own; 0 turns it off.

        Raises:
          GemmaError: a request is running (wait, or cancel it), or the runner takes no adapters.
        """
        if not hasattr(self.runner, "set_adapter"):
            raise GemmaError(f"set_adapter: {type(self.runner).__name__} takes no adapter; the native CPU runner does")
        if self.running:
            raise GemmaError(
                f"set_adapter: {self.running} requests are running, and what they hold belongs to the adapter that they "
                f"began with: let them end, or cancel them"
            )
        self.runner.set_adapter(adapter, scale=scale)
        self._slots = Slots(self.runner.info.slots, getattr(self.runner, "can_copy_prefix", None))

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do and nothing to tell."""
        return self._scheduler.idle and not self._happened

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self._scheduler.running)

    # ---- one turn

    def step(self) -> list[Event]:
        """One turn: admits, reads parts of prompts, decodes one token for each sequence. Returns what happened.

        What fails for one request (`error` in it) ends that request alone. An error of a callback is raised once every
        event has been delivered, and its request is cancelled.
        """
        self.stats.turns += 1
        self._scheduler.admit(self._place)
        turn = self._scheduler.turn()
        for request, count in turn.prefill:
            self._attempt(request, lambda r=request, n=count: self._read(r, n))
        ready = [r for r in turn.decode if r.state is State.DECODE]
        if len(ready) == 1 and (guess := self._guess(ready[0])):
            self._attempt(ready[0], lambda: self._verify(ready[0], guess))
        elif ready:
            self._decode(ready)
        return self._deliver()

    def _place(self, request: Request) -> bool:
        """Gives a request a slot, with what can be used again of its prompt."""
        place = self._slots.take(request.prompt, request)
        if place is None:
            return False
        request.slot = place.slot
        try:
            if place.source is None:
                self.runner.free(place.slot)
            else:
                self.runner.copy_prefix(place.source, place.slot, place.reuse)
            request.read = request.reused = place.reuse
        except _FAULTS:  # what was to be used again is lost, the request is not
            self._slots.clear(place.slot)
            self.runner.free(place.slot)
        self.stats.reused += request.reused
        return True

    def _attempt(self, request: Request, part: Callable[[], None]) -> None:
        try:
            part()
        except _FAULTS as error:
            self._end(request, request.finish("error", error), keep=False)

    def _read(self, request: Request, count: int) -> None:
        """Reads the next part of a prompt; after the last one the first token is picked."""
        part = request.prompt[request.read : request.read + count]
        if part:
            self.runner.prefill(request.slot, part, request.read)
            self._slots.extend(request.slot, part)
            self.stats.prefilled += len(part)
            request.read += len(part)
        if request.read == len(request.prompt):
            request.state = State.DECODE
            self._take(request, self._first(request))
            request.started = self._clock()

    def _first(self, request: Request) -> StepOut:
        """The token after the prompt."""
        if hasattr(self.runner, "pick"):
            return self.runner.pick(StepIn(request.slot, -1, request.params, request.rng(), request.history))
        logits = self.runner.logits(request.slot)
        token = sample(logits, request.params, request.history, request.rng())
        return StepOut(token, float(logprobs(logits)[token]), top_logprobs(logits, 5))

    def _decode(self, requests: Sequence[Request]) -> None:
        """One token for each of them. Where the batch fails, each is tried alone, so that only the culprit ends."""
        try:
            outs = self.runner.step([self._step_in(r) for r in requests])
        except _FAULTS as error:
            if len(requests) == 1:
                self._end(requests[0], requests[0].finish("error", error), keep=False)
                return
            for request in requests:
                self._attempt(request, lambda r=request: self._again(r))
            return
        for request, out in zip(requests, outs, strict=True):
            self._cached(request, out)

    def _again(self, request: Request) -> None:
        """A step after one that failed: what the slot holds is not known any more, so it is read anew."""
        held = list(self._slots.ids(request.slot))
        self.runner.free(request.slot)
        self.runner.prefill(request.slot, held, 0)
        [out] = self.runner.step([self._step_in(request)])
        self._cached(request, out)

    def _step_in(self, request: Request) -> StepIn:
        return StepIn(request.slot, request.last, request.params, request.rng(), request.history)

    def _cached(self, request: Request, out: StepOut) -> None:
        self._slots.extend(request.slot, (request.last,))
        self._take(request, out)

    def _guess(self, request: Request) -> list[int]:
        """What may follow; it never reaches past the slot or the tokens that were asked for."""
        if request.lookup is None:
            return []
        held = len(self._slots.ids(request.slot))
        left = request.params.max_new_tokens - len(request.ids)
        return request.lookup.draft(min(left - 1, self._max_len - held - 1))

    def _verify(self, request: Request, guess: list[int]) -> None:
        """A step that checks a guess: the tokens that sampling gives, as far as they agree with it, and one more."""
        rngs = [request.rng(ahead) for ahead in range(len(guess) + 1)]
        outs = self.runner.verify(self._step_in(request), guess, rngs)
        self._slots.extend(request.slot, (request.last, *guess[: len(outs) - 1]))
        request.lookup.learn(len(guess), len(outs) - 1)
        for counts in (request, self.stats):
            counts.drafted += len(guess)
            counts.accepted += len(outs) - 1
        for out in outs:
            self._take(request, out)
            if request.done:  # an end token inside the guess
                return

    def _take(self, request: Request, out: StepOut) -> None:
        self.stats.generated += 1
        event = request.take(out, room=len(request.prompt) + len(request.ids) < self._max_len)
        if event.finish_reason is None:
            self._happened.append(event)
            request.events.append(event)
        else:
            self._end(request, event)

    def _end(self, request: Request, event: Event, *, keep: bool = True) -> None:
        """The request is over: its slot is free, and what it holds may be used again."""
        self._scheduler.remove(request)
        request.ended = self._clock()
        if request.slot is not None:
            if not keep:
                self.runner.free(request.slot)
            self._slots.give_back(request.slot, keep=keep)
            request.slot = None
        self._happened.append(event)
        request.events.append(event)

    def _deliver(self) -> list[Event]:
        """Hands events to their callbacks, once the turn's bookkeeping is done: a callback may submit and cancel."""
        events, self._happened = self._happened, []
        failed: BaseException | None = None
        for event in events:
            if event.request.on_event is None:
                continue
            try:
                event.request.on_event(event)
            except BaseException as error:
                failed = failed or error
                self.cancel(event.request)
        if failed is not None:
            raise failed
        return events
