# SPDX-License-Identifier: Apache-2.0
"""Which request moves next: a state machine without clock, randomness, tensor or runner.

First come, first served. Requests wait in one queue and get slots in its order. In every turn each sequence that
decodes makes one step, all of them together, and the prompts being read share a budget of tokens, the oldest first. So
a long prompt does not hold up who decodes for longer than one chunk, and nobody waits for ever: every sequence ends
after a bounded number of turns, and the front of the queue is always the next to get a slot.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable

from gemma.errors import GemmaError
from gemma.serving.request import Request, State


@dataclasses.dataclass(frozen=True)
class Turn:
    """What to do now: parts of prompts (request, how many tokens), then one step for each that decodes."""

    prefill: tuple[tuple[Request, int], ...]
    decode: tuple[Request, ...]


class Scheduler:
    """Requests that wait, and requests that run.

    Attributes:
      chunk: tokens of prompts in a turn in which nobody decodes.
      interleave: the same in a turn in which somebody does.
      waiting: the queue, oldest first.
      running: who has a slot, oldest first.
    """

    def __init__(self, *, chunk: int = 512, interleave: int = 128, queue: int | None = None):
        if chunk < 1 or interleave < 1 or (queue is not None and queue < 0):
            raise GemmaError(
                f"scheduler: expected a chunk and an interleave of at least 1 token and a queue of at least 0, "
                f"got {chunk}, {interleave}, {queue}"
            )
        self.chunk, self.interleave, self.queue = chunk, interleave, queue
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    @property
    def full(self) -> bool:
        """Whether the queue has no room for another request."""
        return self.queue is not None and len(self.waiting) >= self.queue

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def admit(self, place: Callable[[Request], bool]) -> None:
        """Moves requests from the queue to slots, in order; `place` says whether one got a slot.

        Where placing one fails with an error, that request has left the queue and is nobody's.
        """
        while self.waiting:
            request = self.waiting[0]
            try:
                if not place(request):
                    return
            except BaseException:
                self.waiting.popleft()
                raise
            self.waiting.popleft()
            request.state = State.PREFILL
            self.running.append(request)

    def turn(self) -> Turn:
        """What every running request does next; the caller does it and changes their states."""
        decode = tuple(r for r in self.running if r.state is State.DECODE)
        budget = self.interleave if decode else self.chunk
        prefill = []
        for request in self.running:
            left = len(request.prompt) - request.read
            if request.state is not State.PREFILL or not budget:
                continue
            count = min(left, budget)
            prefill.append((request, count))
            budget -= count
        return Turn(tuple(prefill), decode)

    def remove(self, request: Request) -> None:
        """The request is over, wherever it was."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        request.state = State.DONE
