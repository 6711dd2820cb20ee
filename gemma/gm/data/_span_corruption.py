# SPDX-License-Identifier: Apache-2.0
"""Examples for an encoder-decoder out of plain text: span corruption as in T5, PrefixLM, and UL2's mixture of both.

    text                 the quick brown fox jumps over the lazy dog
    span corruption      input   the quick <unused0> jumps over <unused1> dog
                         target  <unused0> brown fox <unused1> the lazy
    PrefixLM             input   the quick brown fox jumps
                         target  over the lazy dog

Each task is a frozen value: `task(element, rng)` for one example, `random_map` under that name for grain. Everything that
is random comes from `rng`. The mark of a span is an unused token of the vocabulary; bos, eos and the shift between what
the decoder reads and says are `gemma/seq2seq.py`'s. Sources: T5 (arXiv 1910.10683), UL2 (arXiv 2205.05131).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma import seq2seq
from gemma.errors import ConfigError, PromptError, TokenizerError

_MOST_SENTINELS = 99  # <unused0> .. <unused98>, which every vocabulary of the family has


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One way of hiding text.

    Attributes:
      mean_span: mean length of a hidden span, in tokens; None: everything after a random place (PrefixLM).
      rate: share of the tokens that is hidden; of PrefixLM the mean share, drawn evenly between none and twice that.
      weight: how often it is drawn in a mixture, compared with the others.
      prefix: text before the input that says which one it is; UL2's paper has "[NLU]", "[NLG]" and "[S2S]".
    """

    mean_span: float | None
    rate: float
    weight: float = 1.0
    prefix: str = ""

    def __post_init__(self):
        if not 0 < self.rate < 1 or (self.mean_span is None and self.rate > 0.5):
            raise ConfigError(f"Denoiser.rate: expected a share above 0 and below 1 (PrefixLM: 0.5), got {self.rate!r}")
        if self.mean_span is not None and not self.mean_span >= 1:
            raise ConfigError(f"Denoiser.mean_span: expected at least 1 token, got {self.mean_span!r}")
        if not self.weight > 0:
            raise ConfigError(f"Denoiser.weight: expected a number above 0, got {self.weight!r}")


# Table 1 of UL2's paper: short spans (R), the rest of the text (S), and long or many spans (X), equally often.
UL2_DENOISERS = (
    Denoiser(3, 0.15, prefix="[NLU]"),
    Denoiser(8, 0.15, prefix="[NLU]"),
    Denoiser(None, 0.25, prefix="[S2S]"),
    Denoiser(3, 0.5, prefix="[NLG]"),
    Denoiser(8, 0.5, prefix="[NLG]"),
    Denoiser(64, 0.15, prefix="[NLG]"),
    Denoiser(64, 0.5, prefix="[NLG]"),
)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class UL2Task:
    """A mixture of denoisers: one is drawn for each example.

      task = gm.data.UL2Task(tokenizer=tokenizer, max_input_length=512, max_target_length=512)
      example = task({"text": "..."}, np.random.default_rng(0))      # input_tokens, target_tokens, labels

    Attributes:
      tokenizer: of `gm.text` or `gemma.tokenizer`.
      in_text: key of the element that holds the text (str, or bytes of UTF-8), or its ids.
      out_input, out_target, out_labels: keys of the result: what the encoder and the decoder read, what it should say.
      max_input_length, max_target_length: lengths of these arrays. A longer text is cut at random places.
      denoisers: what is drawn from.
      sentinels: ids or pieces that mark spans; None: the unused tokens of the vocabulary. No more spans are hidden.
      bos: put a bos before the input.
      prefixes: whether the denoisers' prefixes are written.
    """

    tokenizer: Any
    in_text: str = "text"
    out_input: str = "input_tokens"
    out_target: str = "target_tokens"
    out_labels: str = "labels"
    max_input_length: int = 512
    max_target_length: int = 512
    denoisers: tuple[Denoiser, ...] = UL2_DENOISERS
    sentinels: Sequence[int | str] | None = None
    bos: bool = True
    prefixes: bool = False

    def __post_init__(self):
        if not self.denoisers:
            raise ConfigError("denoisers: expected at least one")
        if self.sentinels is not None and not 1 <= len(self.sentinels) == len(set(self.sentinels)):
            raise ConfigError(f"sentinels: expected at least one mark, all different, got {list(self.sentinels)!r:.80}")
        for name in ("max_input_length", "max_target_length"):
            if getattr(self, name) < 4:
                raise ConfigError(f"{name}: expected at least 4 tokens, got {getattr(self, name)!r}")

    def __call__(self, element: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """One example; keys of the element other than the text stay.

          Raises:
            PromptError: no text under `in_text`, one of less than two tokens, or one that holds padding.
        ConfigError: the denoiser's prefix fills the whole input.
        """
        if self.in_text not in element:
            raise PromptError(f"expected the key {self.in_text!r} in the element, got {', '.join(map(str, element))}")
        weights = np.array([denoiser.weight for denoiser in self.denoisers], np.float64)
        denoiser = self.denoisers[int(rng.choice(len(weights), p=weights / weights.sum()))]
        inputs, target = self._hide(self._ids(element[self.in_text]), denoiser, rng)
        special = self.tokenizer.special
        made = seq2seq.make_targets([target], self.max_target_length, bos=special.bos, eos=special.eos, pad=special.pad)
        row = np.full(self.max_input_length, special.pad, np.int32)
        row[: len(inputs)] = inputs
        found = {self.out_input: row, self.out_target: made.target_tokens[0], self.out_labels: made.labels[0]}
        return {key: value for key, value in element.items() if key != self.in_text} | found

    def random_map(self, element: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The same, under the name that grain's random transforms have."""
        return self(element, rng)

    def _ids(self, text: Any) -> list[int]:
        if isinstance(text, bytes):  # as TensorFlow's data sets give texts
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise PromptError(f"{self.in_text}: expected UTF-8, {error.reason} at byte {error.start}") from None
        if not isinstance(text, str) and np.size(text) and np.asarray(text).dtype.kind not in "iu":
            raise PromptError(f"{self.in_text}: expected a text or its ids, got {type(text).__name__}")
        ids = self.tokenizer.encode(text) if isinstance(text, str) else [int(i) for i in np.asarray(text).reshape(-1)]
        if self.tokenizer.special.pad in ids:
            raise PromptError(f"{self.in_text}: the text holds padding (id {self.tokenizer.special.pad})")
        if len(ids) < 2:
            raise PromptError(f"{self.in_text}: expected a text of at least two tokens, got {len(ids)}")
        return ids

    def _hide(self, ids: list[int], denoiser: Denoiser, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        special = self.tokenizer.special
        head = [special.bos] if self.bos else []
        head += self.tokenizer.encode(denoiser.prefix) if self.prefixes and denoiser.prefix else []
        room = self.max_input_length - len(head)
        if room < 1:
            raise ConfigError(f"max_input_length: {self.max_input_length} leave no room behind the prefix, {head}")
        if denoiser.mean_span is None:
            inputs, target = prefix_lm(ids, denoiser.rate, rng, room, self.max_target_length - 1)
        else:
            marks = self._marks()
            ids = _window(ids, denoiser, len(marks), room, self.max_target_length - 1, rng)
            mask = span_mask(len(ids), denoiser.rate, denoiser.mean_span, rng, most_spans=len(marks))
            inputs, target = corrupt(ids, mask, marks)
        return [*head, *inputs], target

    def _marks(self) -> list[int]:
        core = getattr(self.tokenizer, "core", self.tokenizer)
        if self.sentinels is not None:
            return [core.id_of(mark) if isinstance(mark, str) else int(mark) for mark in self.sentinels]
        try:
            return [core.id_of(f"<unused{number}>") for number in range(_MOST_SENTINELS)]
        except TokenizerError as error:
            raise TokenizerError(
                f"sentinels: this vocabulary has no <unused0> .. <unused{_MOST_SENTINELS - 1}> ({error}); name others"
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SpanCorruptionTask(UL2Task):
    """T5's task: spans of 3 tokens on average, 15 % of the text. The fields are those of `UL2Task`."""

    denoisers: tuple[Denoiser, ...] = (Denoiser(3, 0.15),)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PrefixLMTask(UL2Task):
    """The text up to a random place is the input, the rest the target. The fields are those of `UL2Task`."""

    denoisers: tuple[Denoiser, ...] = (Denoiser(None, 0.5),)


def counts(length: int, rate: float, mean_span: float, most_spans: int = _MOST_SENTINELS) -> tuple[int, int]:
    """How many tokens of a text are hidden, and in how many spans; something stays before each span."""
    hidden = min(max(round(length * rate), 1), length - 1)
    spans = min(max(round(hidden / mean_span), 1), hidden, length - hidden, most_spans)
    return hidden, spans


def span_mask(
    length: int, rate: float, mean_span: float, rng: np.random.Generator, *, most_spans: int = _MOST_SENTINELS
) -> np.ndarray:
    """Which tokens are hidden, bool [length]: spans of random lengths at random places.

    Hidden and shown tokens are each cut into as many parts, evenly at random, which take turns, a shown one first: as in
    T5, the first token is never hidden and the last one always.
    """
    if length < 2:
        raise PromptError(f"span_mask: expected a text of at least two tokens, got {length}")
    hidden, spans = counts(length, rate, mean_span, most_spans)
    parts = np.stack([_parts(length - hidden, spans, rng), _parts(hidden, spans, rng)], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, parts)


def corrupt(ids: Sequence[int], mask: np.ndarray, marks: Sequence[int]) -> tuple[list[int], list[int]]:
    """The text with a mark for each hidden span, and the spans, each after its mark.

    Raises:
      PromptError: there are more spans than marks, or a mark stands in the text.
    """
    inputs: list[int] = []
    target: list[int] = []
    spans = int((mask & ~np.concatenate([[False], mask[:-1]])).sum())
    if spans > len(marks):
        raise PromptError(f"corrupt: {spans} spans are hidden, but there are {len(marks)} marks")
    clash = set(marks[:spans]) & set(ids)
    if clash:
        raise PromptError(f"the text holds token {min(clash)}, which marks a hidden span: name other sentinels")
    number = -1
    for at, (token, gone) in enumerate(zip(ids, mask)):
        if gone and (at == 0 or not mask[at - 1]):
            number += 1
            inputs.append(marks[number])
            target.append(marks[number])
        (target if gone else inputs).append(int(token))
    return inputs, target


def prefix_lm(
    ids: Sequence[int], rate: float, rng: np.random.Generator, max_input: int, max_target: int
) -> tuple[list[int], list[int]]:
    """A text cut in two at a random place: input and target, neither of them empty.

    The share of the target is drawn evenly between none and `2 * rate`. What does not fit is cut off at the beginning
    of the input and at the end of the target.
    """
    share = rng.uniform(0, 2 * rate)
    cut = len(ids) - min(max(round(len(ids) * share), 1), len(ids) - 1)
    return [int(i) for i in ids[max(0, cut - max_input) : cut]], [int(i) for i in ids[cut : cut + max_target]]


def _parts(total: int, number: int, rng: np.random.Generator) -> np.ndarray:
    """`total` as a sum of `number` whole numbers of at least 1, each way equally likely."""
    cuts = np.sort(rng.choice(total - 1, number - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _window(
    ids: list[int], denoiser: Denoiser, marks: int, max_input: int, max_target: int, rng: np.random.Generator
) -> list[int]:
    """As much of a text, from a random place on, as fits into both arrays once it is corrupted."""
    length = len(ids)
    while length >= 2:
        hidden, spans = counts(length, denoiser.rate, denoiser.mean_span, marks)
        if length - hidden + spans <= max_input and hidden + spans <= max_target:
            break
        length -= 1
    if length < 2:
        raise PromptError(
            f"max_input_length, max_target_length: no two tokens of a text fit ({max_input}, {max_target})"
        )
    start = int(rng.integers(0, len(ids) - length + 1))
    return ids[start : start + length]
