# SPDX-License-Identifier: Apache-2.0
r"""Image tokens on the host: how long a prompt becomes, where its images stand, and chunks that cut none of them.

Plain Python on lists of ids; samplers and runners use it before anything reaches the device, where `_token_utils.py`
does the same with fixed shapes. Encoded images can be reused: a prompt in this expanded form goes to the network
together with `soft_tokens`, the result of `Transformer.encode_images`.

    tokens = ImageTokens.of(model.config)
    ids = tokens.expand([2, 255999, 3689], images=1)          # 262 ids: 2 108 255999 -2 ... -2 256000 108 3689
    for part in plan_chunks(ids, limit=512): ids[part]         # no part begins or ends inside an image

Chunks may not cut an image because its tokens see each other in both directions: the first ones would miss the last.
An image that is whole within its chunk needs no memory of its own: its grouping ends with the chunk, and what comes
later sees it as ordinary tokens of the past.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from gemma.config import GemmaConfig
from gemma.errors import PromptError
from gemma.gm.vision import _token_utils

SOFT = _token_utils.SOFT_TOKEN_PLACEHOLDER


@dataclasses.dataclass(frozen=True)
class ImageTokens:
    """The ids of one model's images.

    Attributes:
      start: the marker, `<start_of_image>`.
      end: `<end_of_image>`.
      soft: Q, soft tokens of one image.
    """

    start: int
    end: int
    soft: int

    @classmethod
    def of(cls, config: Any) -> ImageTokens:
        """Of a GemmaConfig, or of a gm.nn configuration."""
        if isinstance(config, GemmaConfig):
            return cls(config.boi_token_index, config.eoi_token_index, config.mm_tokens_per_image)
        encoder, source = config.vision_encoder, config.source
        soft = source.mm_tokens_per_image if encoder is None else encoder.num_mm_tokens_per_image
        return cls(source.boi_token_index, source.eoi_token_index, soft)

    @property
    def length(self) -> int:
        """Tokens that stand for one image."""
        return self.soft + 4

    def expanded_length(self, ids: Sequence[int]) -> int:
        """How long `expand` would make a prompt, in tokens."""
        return len(ids) + self.count(ids) * (self.length - 1)

    def count(self, ids: Sequence[int]) -> int:
        """The markers of a prompt that is not expanded."""
        return sum(token == self.start for token in ids)

    def expand(self, ids: Sequence[int], images: int, *, name: str = "the prompt") -> list[int]:
        """Every marker becomes the tokens of its image.

        Args:
          ids: of the prompt.
          images: how many images come with it.
          name: what to call it in the error.

        Raises:
          PromptError: (a ValueError) the counts differ, or the ids hold the placeholder of a soft token already.
        """
        if SOFT in ids:
            raise PromptError(f"{name}: id {SOFT} stands for a part of an image and cannot be in a prompt")
        found = self.count(ids)
        if found != images:
            raise PromptError(mismatch(name, found, images))
        sequence = _token_utils.image_sequence(self.soft, self.start, self.end)
        return [new for token in ids for new in (sequence if token == self.start else (token,))]

    def collapse(self, ids: Sequence[int]) -> list[int]:
        """The inverse of `expand`."""
        sequence, out, at = _token_utils.image_sequence(self.soft, self.start, self.end), [], 0
        while at < len(ids):
            whole = ids[at] == sequence[0] and list(ids[at : at + self.length]) == sequence
            out.append(self.start if whole else ids[at])
            at += self.length if whole else 1
        return out

    def spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Where the soft tokens of each image stand in an expanded prompt: (first, one past the last)."""
        return spans(ids)


def mismatch(name: str, markers: int, images: int) -> str:
    """What is said when markers and images differ in number."""
    advice = "add one marker for each image" if images > markers else "pass one image for each marker"
    return f"{name} has {markers} <start_of_image> and comes with {images} images: {advice}"


def spans(ids: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of soft tokens in an expanded prompt: (first, one past the last) of each."""
    found, start = [], None
    for at, token in enumerate(ids):
        if token == SOFT and start is None:
            start = at
        elif token != SOFT and start is not None:
            found.append((start, at))
            start = None
    return found if start is None else [*found, (start, len(ids))]


def plan_chunks(ids: Sequence[int], *, limit: int) -> list[slice]:
    """Cuts an expanded prompt into parts of at most `limit` tokens, none of which begins or ends inside an image.

    Args:
      ids: of the expanded prompt.
      limit: tokens per part, at least those of one image.

    Raises:
      PromptError: (a ValueError) `limit` is smaller than an image of the prompt.
    """
    if limit < 1:
        raise PromptError(f"limit: expected at least 1 token per chunk, got {limit}")
    runs, parts, start = spans(ids), [], 0
    while start < len(ids):
        stop = min(start + limit, len(ids))
        cut = next((run for run in runs if run[0] < stop < run[1]), None)
        if cut is not None:
            stop = cut[0]
            if stop <= start:
                raise PromptError(
                    f"limit: an image of {cut[1] - cut[0]} tokens must be read whole, but a chunk holds {limit}"
                )
        parts.append(slice(start, stop))
        start = stop
    return parts
