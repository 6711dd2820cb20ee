# SPDX-License-Identifier: Apache-2.0
"""From token ids to text that can be shown: decoding, stop strings, end tokens, counts and timings, for every backend.

`generate` and `chat` iterate over a Generation; where the ids come from is `_backend.py`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from gemma.cli._common import context_within
from gemma.errors import GemmaError

if TYPE_CHECKING:
    from gemma.cli._backend import Opened
    from gemma.sampling import SamplingParams


class Generation:
    """One continuation. Iterate over it once for pieces of text; then the attributes tell what happened.

    Attributes:
      ids: what was generated, the end token included if one came.
      finish_reason: "stop" (an end token or a stop string), "length" (max_new_tokens), or None while it runs or when
        it was interrupted.
      stopped_by: the end token's name or the stop string, or None.
      prompt_seconds: until the first token came: computing the prompt and, on a first run, compiling.
      decode_seconds: from the first token to the last.

    With `show_special` special tokens that end nothing are spelled out; without it they are left out of the text.
    """

    def __init__(
        self,
        opened: Opened,
        ids: Sequence[int],
        params: SamplingParams,
        end_ids: Collection[int],
        *,
        show_special: bool = True,
    ):
        self._opened, self._prompt, self._params, self._end_ids = opened, list(ids), params, frozenset(end_ids)
        self._show_special = show_special
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self.stopped_by: str | None = None
        self.prompt_seconds = self.decode_seconds = 0.0

    def __iter__(self) -> Iterator[str]:
        from gemma.sampling import StopChecker

        checker, decoder = StopChecker(self._params.stop), self._opened.tokenizer.stream()
        begin = time.perf_counter()
        for token in self._opened.model.tokens(self._prompt, self._params, self._end_ids):
            now = time.perf_counter()
            if not self.ids:
                self.prompt_seconds, begin = now - begin, now
            self.decode_seconds = now - begin
            self.ids.append(token)
            if token in self._end_ids:
                self.finish_reason, self.stopped_by = "stop", self._opened.tokenizer.piece(token)
                break
            shown = self._show_special or not self._opened.tokenizer.is_special(token)
            text = checker.push(decoder.push(token)) if shown else ""
            if text:
                yield text
            if checker.stopped is not None:
                break
            if len(self.ids) >= self._params.max_new_tokens:
                self.finish_reason = "length"
                break
        rest = checker.push(decoder.flush())
        rest += checker.flush()
        if checker.stopped is not None:
            self.finish_reason, self.stopped_by = "stop", checker.stopped
        if self.finish_reason is None:
            raise GemmaError("the model stopped without an end token; this is a fault of the backend")
        if rest:
            yield rest

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed; the first token belongs to the prompt."""
        return (len(self.ids) - 1) / self.decode_seconds if len(self.ids) > 1 and self.decode_seconds > 0 else None

    def stats(self) -> str:
        """Speed and guesses in one line, for people."""
        begun = f"{len(self._prompt)} tokens of prompt in {self.prompt_seconds:.2f} s"
        rate = self.tokens_per_second
        made = f"{len(self.ids)} new" + ("" if rate is None else f" at {rate:.1f} per second")
        guesses = self.guesses
        return f"{begun}, {made}" + (f", {guesses[1]} of {guesses[0]} guesses right" if guesses else "")

    @property
    def guesses(self) -> tuple[int, int] | None:
        """Tokens that were guessed ahead, and how many of them came; None where nothing is guessed."""
        request = getattr(self._opened.model, "request", None)
        if request is None or request.lookup is None:
            return None
        return request.drafted, request.accepted


def context_limit(opened: Opened, asked: int | None) -> int:
    """Tokens that may be held: what --context says, or what the model was made for."""
    most = opened.config.max_position_embeddings
    return context_within(asked, most, most)


def beginning(pieces: Iterator[str]) -> str:
    """The first two pieces. The second needs the first decoding step, which may have to be compiled: wait for both."""
    return "".join(itertools.islice(pieces, 2))
