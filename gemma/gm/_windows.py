# SPDX-License-Identifier: Apache-2.0
"""A text cut into windows for a model of bounded context: which tokens each window shows, and which of them count.

Every token counts once. A window begins with the token <bos>, shows up to `context - 1` tokens of the text, and moves on
by `stride`; what counts in it are the tokens that no earlier window held. So all tokens but those of the first window
have at least `context - stride` tokens before them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from gemma.errors import ConfigError, PromptError


@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows that are computed together.

    Attributes:
      tokens: int32 [B, T], padded with 0 on the right.
      targets: int32 [B, T], the token after each position.
      counts: bool [B, T], whether the prediction of `targets` counts.
    """

    tokens: np.ndarray
    targets: np.ndarray
    counts: np.ndarray


def batches(ids: Sequence[int], bos: int, *, context: int, stride: int, batch: int) -> list[Batch]:
    """All windows of a text.

    Args:
      ids: of the text, without <bos>.
      bos: id of <bos>.
      context: T, tokens of a window, <bos> included.
      stride: tokens that a window moves on, 1..context - 1.
      batch: B, windows computed together.

    Raises:
      ConfigError: numbers out of range. PromptError: no tokens.
    """
    if context < 2 or batch < 1:
        raise ConfigError(f"context, batch: expected at least 2 and 1, got {context} and {batch}")
    if not 1 <= stride < context:
        raise ConfigError(f"stride: expected 1..{context - 1} (below the context of {context}), got {stride}")
    if not len(ids):
        raise PromptError("the text holds no tokens; give one that is not empty")
    rows = [_row(shown, fresh, bos, context) for shown, fresh in _windows(np.asarray(ids), context - 1, stride)]
    empty = np.zeros((3, context), np.int32)
    rows += [empty] * (-len(rows) % min(batch, len(rows)))
    size = min(batch, len(rows))
    parts = [np.stack(rows[i : i + size], axis=1) for i in range(0, len(rows), size)]
    return [Batch(tokens, targets, counts.astype(bool)) for tokens, targets, counts in parts]


def _windows(ids: np.ndarray, length: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """(the tokens of a window, how many of the last ones no earlier window held)."""
    seen = 0
    for start in range(0, len(ids), stride):
        shown = ids[start : start + length]
        yield shown, start + len(shown) - seen
        seen = start + len(shown)
        if seen == len(ids):
            return


def _row(shown: np.ndarray, fresh: int, bos: int, context: int) -> np.ndarray:
    row = np.zeros((3, context), np.int32)
    row[0, 0], row[0, 1 : len(shown) + 1] = bos, shown
    row[1, : len(shown)] = shown
    row[2, len(shown) - fresh : len(shown)] = 1
    return row
