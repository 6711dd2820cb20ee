# SPDX-License-Identifier: Apache-2.0
"""An example as ids with a loss mask, and what is done with one that is too long. One example at a time, no padding.

    ids        <bos> <start_of_turn> user \\n Hi <end_of_turn> \\n <start_of_turn> model \\n Hello <end_of_turn> \\n
    loss_mask                                                                        ====================

Chat templates and their masks are `gemma/chat.py`. Rows of batches are `_loader.py`; how they are filled `_packing.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gemma import chat
from gemma.chat import ChatFormat, Turn
from gemma.errors import DataError, GemmaError
from gemma.gm.data._examples import (
    IMAGE,
    KIND_OF,
    Completion,
    Conversation,
    Example,
    ImageRef,
    Labelled,
    Preference,
    Rated,
    Text,
)
from gemma.gm.data._messages import tool_instructions

Truncate = Literal["auto", "error", "drop", "right", "left", "turns", "split"]
TRUNCATE = ("auto", "error", "drop", "right", "left", "turns", "split")


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """One example as ids.

    Attributes:
      ids: int32 [n] token ids, beginning with the one bos.
      loss_mask: bool [n], True where the id is a label: it is to be predicted from the ids before it.
      images: in the order of their markers in `ids`; each marker is one id here.
      label: of a labelled text, the index of its class; else -1. The class's token is the last of `ids`.
      good: of a rated answer, the thumb; else None.
      rejected: of a preference, the worse answer with its prompt (this is the better one); else None.
      cut: tokens that truncation took away.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    images: tuple[ImageRef, ...] = ()
    label: int = -1
    good: bool | None = None
    rejected: EncodedExample | None = None
    cut: int = 0

    def __len__(self) -> int:
        """Positions that it needs in a row: of a preference, those of the longer answer."""
        return max(len(self.ids), 0 if self.rejected is None else len(self.rejected.ids))

    @property
    def label_tokens(self) -> int:
        both = 0 if self.rejected is None else int(self.rejected.loss_mask.sum())
        return int(self.loss_mask.sum()) + both

    @property
    def tokens(self) -> int:
        return len(self.ids) + (0 if self.rejected is None else len(self.rejected.ids))


@dataclasses.dataclass(frozen=True)
class Dropped:
    """An example that is not used. `why`: "long" or "no labels"; `tokens`: that it has; `positions`: see
    `EncodedExample`."""

    why: str
    tokens: int
    positions: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Examples to ids under fixed settings. The arguments are those of `encode`."""

    tokenizer: Any
    max_length: int
    format: ChatFormat | None = None
    truncate: Truncate = "auto"
    labels: Mapping[str, int] | None = None
    template: str | None = None
    parse_special: bool = False
    last_turn_only: bool = False

    def __post_init__(self):
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 2:
            raise DataError(f"max_length: expected a number of tokens, 2 or more, got {self.max_length!r:.80}")
        if self.truncate not in TRUNCATE:
            raise DataError(f"truncate: expected one of {', '.join(TRUNCATE)}, got {self.truncate!r:.80}")
        if self.template is not None and "{text}" not in self.template:
            raise DataError(f"template: expected a text that holds {{text}}, got {self.template!r:.80}")

    def __call__(self, example: Example) -> list[EncodedExample] | Dropped:
        """The example's pieces (more than one only for plain text that is split), or why it is left out.

        Raises:
          DataError: it is too long and `truncate` is "error", or cannot be encoded; the caller knows its place.
        """
        try:
            encoded = _ENCODERS[type(example)](self, example)
        except KeyError:
            names = ", ".join(t.__name__ for t in KIND_OF)
            raise DataError(f"expected one of gm.data.{{{names}}}, got {type(example).__name__}") from None
        policy = self._policy(example)
        if len(encoded) <= self.max_length:
            pieces = [encoded]
        elif policy == "error":
            raise DataError(too_long(len(encoded), self.max_length))
        elif policy == "drop":
            return Dropped("long", encoded.tokens, len(encoded))
        elif policy == "split":
            pieces = self._split(encoded)
        else:
            shorter = self._turns(example, encoded) if policy == "turns" else self._shorter(encoded, policy)
            if shorter is None:
                return Dropped("long", encoded.tokens, len(encoded))
            pieces = [shorter]
        if not all(piece.label_tokens and _has_labels(piece.rejected) for piece in pieces):
            return Dropped("no labels", encoded.tokens)
        return pieces

    def _policy(self, example: Example) -> str:
        plain = isinstance(example, Text)
        if self.truncate == "auto":
            return "split" if plain else "drop"
        if self.truncate == "split" and not plain:
            return "drop"
        if self.truncate == "turns" and not isinstance(example, (Conversation, Preference, Rated)):
            return "split" if plain else "drop"
        return self.truncate

    # --- each kind

    def conversation(self, example: Conversation) -> EncodedExample:
        turns = list(example.turns)
        if example.tools:
            n = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
            if n is not None:
                turns[n] = Turn("user", tool_instructions(example.tools) + turns[n].content)
        format = self.chat_format
        if example.images and format.image is not None and format.image != IMAGE:
            turns = [Turn(t.role, t.content.replace(IMAGE, format.image)) if t.role == "user" else t for t in turns]
        encoded = self._chat(turns, len(example.images))
        mask = np.array(encoded.loss_mask, bool)
        models = [n for n, turn in enumerate(turns) if turn.role == "model"]
        muted = models[:-1] if self.last_turn_only else example.mute
        for n, (start, end) in zip(models, _spans(mask), strict=True):
            if n in muted:
                mask[start:end] = False
        return EncodedExample(_ids(encoded.ids), mask, example.images)

    def completion(self, example: Completion) -> EncodedExample:
        prompt = [self._bos]
        marker = self.chat_format.image if example.images else None
        for n, part in enumerate(example.prompt.split(IMAGE) if example.images else [example.prompt]):
            prompt += ([self.tokenizer.id_of(marker)] if n else []) + self._plain(part)
        answer = [*self._plain(example.completion), self._eos]
        mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
        return EncodedExample(_ids(prompt + answer), mask, example.images)

    def text(self, example: Text) -> EncodedExample:
        ids = _ids([self._bos, *self._plain(example.text), self._eos])
        return EncodedExample(ids, np.arange(len(ids)) > 0)

    def preference(self, example: Preference) -> EncodedExample:
        chosen, rejected = (self._answered(example.prompt, text) for text in (example.chosen, example.rejected))
        return dataclasses.replace(chosen, rejected=rejected)

    def rated(self, example: Rated) -> EncodedExample:
        return dataclasses.replace(self._answered(example.prompt, example.completion), good=example.good)

    def labelled(self, example: Labelled) -> EncodedExample:
        if not self.labels or example.label not in self.labels:
            known = ", ".join(map(repr, self.labels or ())) or "none"
            raise DataError(f"label {example.label!r:.80} is not among the labels ({known}): {_NAME_IT}")
        asked = (self.template or "{text}").replace("{text}", example.text)
        if self.template is None:
            ids = self._chat([Turn("user", asked)], 0, add_generation_prompt=True).ids
        else:
            ids = [self._bos, *self._plain(asked)]
        index = list(self.labels).index(example.label)
        ids = [*ids, self.labels[example.label]]
        return EncodedExample(_ids(ids), np.arange(len(ids)) == len(ids) - 1, label=index)

    def _answered(self, prompt: Sequence[Turn], answer: str) -> EncodedExample:
        """A conversation whose last turn alone is learnt."""
        encoded = self._chat([*prompt, Turn("model", answer)], 0)
        mask = np.array(encoded.loss_mask, bool)
        mask[: _spans(mask)[-1][0]] = False
        return EncodedExample(_ids(encoded.ids), mask)

    @property
    def chat_format(self) -> ChatFormat:
        return chat.format_for(self.tokenizer) if self.format is None else self.format

    def _chat(self, turns, images: int, add_generation_prompt: bool = False) -> chat.EncodedChat:
        return chat.encode_chat(
            self.tokenizer,
            turns,
            format=self.chat_format,
            add_generation_prompt=add_generation_prompt,
            images=images,
        )

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, parse_special=self.parse_special)

    @property
    def _bos(self) -> int:
        return self.tokenizer.special.bos

    @property
    def _eos(self) -> int:
        return self.tokenizer.special.eos

    # --- too long

    def _split(self, whole: EncodedExample) -> list[EncodedExample]:
        """Rows of plain text, each with a bos of its own: a Gemma without one is not itself."""
        step, body = self.max_length - 1, whole.ids[1:]
        parts = [np.concatenate([whole.ids[:1], body[at : at + step]]) for at in range(0, len(body), step)]
        return [EncodedExample(ids, np.arange(len(ids)) > 0) for ids in parts]

    def _shorter(self, whole: EncodedExample, policy: str) -> EncodedExample | None:
        """Cut at one side; the bos stays, and an image is never parted from its marker: such a row is dropped."""
        if whole.images or (whole.label >= 0 and policy == "right"):
            return None
        other = whole.rejected
        if other is not None:
            other = self._shorter(other, policy) if len(other.ids) > self.max_length else other
        n, limit = len(whole.ids), self.max_length
        if n > limit:
            keep = np.arange(limit) if policy == "right" else np.r_[0, n - limit + 1 : n]
            cut = n - limit
            whole = dataclasses.replace(whole, ids=whole.ids[keep], loss_mask=whole.loss_mask[keep], cut=cut)
        return dataclasses.replace(whole, rejected=other, cut=whole.cut + (other.cut if other is not None else 0))

    def _turns(self, example: Conversation | Preference | Rated, whole: EncodedExample) -> EncodedExample | None:
        """Leaves out whole exchanges, the oldest first; the system text stays. None if the last one is too long."""
        name = "turns" if isinstance(example, Conversation) else "prompt"
        if isinstance(example, Conversation) and example.images:
            return None
        turns = list(getattr(example, name))
        first = 1 if turns[0].role == "system" else 0
        shortest = first + (2 if name == "turns" else 1)
        mute = getattr(example, "mute", ())
        while len(turns) >= shortest + 2:
            del turns[first : first + 2]
            mute = tuple(n - 2 for n in mute if n >= first + 2)
            changes = dict(turns=tuple(turns), mute=mute) if name == "turns" else dict(prompt=tuple(turns))
            shorter = _ENCODERS[type(example)](self, dataclasses.replace(example, **changes))
            if len(shorter) <= self.max_length:
                return dataclasses.replace(shorter, cut=whole.tokens - shorter.tokens)
        return None


_ENCODERS = {
    Conversation: Encoder.conversation,
    Completion: Encoder.completion,
    Text: Encoder.text,
    Preference: Encoder.preference,
    Rated: Encoder.rated,
    Labelled: Encoder.labelled,
}


_NAME_IT = (
    "name it in labels=[...] (on the command line --set labels=[...], of gemma eval --label), or leave such rows out"
)


def too_long(positions: int, max_length: int, others: str = "") -> str:
    """Of an example that is to be refused; `others`: how many more are too long."""
    return (
        f"{positions} tokens, but a row holds {max_length}{others}: raise max_length (on the command line --max-length, "
        f"of gemma eval --context), or set truncate (on the command line of gemma finetune --truncate) to drop, right, "
        f"left, turns (conversations) or split (plain text)"
    )


def _ids(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, np.int32)


def _spans(mask: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of each run of True; `EncodedChat.spans` says the same, slower."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    return list(zip(edges[::2], edges[1::2]))


def _has_labels(rejected: EncodedExample | None) -> bool:
    return rejected is None or bool(rejected.loss_mask.any())


def encode(
    example: Example,
    tokenizer: Any,
    *,
    max_length: int,
    format: ChatFormat | None = None,
    truncate: Truncate = "auto",
    labels: Mapping[str, str | int] | Sequence[str] | None = None,
    template: str | None = None,
    parse_special: bool = False,
    last_turn_only: bool = False,
) -> EncodedExample | None:
    """One example as ids with its loss mask; None where it would be left out of training.

    Args:
      example: a Conversation, Completion, Text, Preference, Rated or Labelled.
      tokenizer: a `gemma.tokenizer.Tokenizer`, or one with its interface.
      max_length: tokens that a row holds; an image counts as its one marker.
      format: of chats. None: the tokenizer's own.
      truncate: what becomes of longer examples. "auto": plain text is split into rows, others are dropped. "error",
        "drop", "right" (the end is cut), "left" (the bos and the end stay), "turns" (the oldest exchanges of a
        conversation are left out, the system text stays), "split" (plain text; others are dropped).
      labels: of labelled texts, the text (or token id) that stands for each label, or just the labels. Each is one token.
      template: of labelled texts, the raw text that the label follows, with `{text}` in it. None: a user's turn.
      parse_special: whether spellings such as `<start_of_turn>` in raw texts (completions, plain text, templates) become
        their ids. Turns of a chat are never parsed.
      last_turn_only: learn the last model turn of a conversation and not the others.

    Raises:
      DataError: (a ValueError) the example cannot be encoded, or does not fit and truncate is "error"; or a plain text
        would be split into several rows.
    """
    from gemma.gm.data._labels import label_tokens

    tokens = label_tokens(tokenizer, labels) if labels is not None else None
    encoder = Encoder(
        tokenizer=tokenizer,
        max_length=max_length,
        format=format,
        truncate=truncate,
        labels=tokens,
        template=template,
        parse_special=parse_special,
        last_turn_only=last_turn_only,
    )
    try:
        found = encoder(example)
    except DataError:
        raise
    except GemmaError as error:
        raise DataError(f"the example cannot be encoded: {error}") from None
    if isinstance(found, Dropped):
        return None
    if len(found) > 1:
        raise DataError(f"the text becomes {len(found)} rows: use a Loader, or another truncate than 'split'")
    return found[0]
