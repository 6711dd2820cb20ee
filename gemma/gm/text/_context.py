# SPDX-License-Identifier: Apache-2.0
"""What to do when a transcript would not fit into the model's context: an error, or giving up its beginning.

The error is the default; giving something up has to be asked for by name. The engine (`_engine.py`) knows neither: it
reads what it is given.
"""

from __future__ import annotations

from collections.abc import Sequence

from gemma.errors import ContextFull, SamplingError
from gemma.gm.vision import _token_utils

POLICIES = ("error", "slide")


def check_policy(policy: str) -> None:
    """Refuses another word."""
    if policy not in POLICIES:
        raise SamplingError(f"context_policy: expected one of {', '.join(POLICIES)}, got {policy!r}")


def slide(row: Sequence[int], *, new: int, limit: int, cuts: Sequence[int] | None) -> int:
    """How many ids to give up after the first one, the bos, so that `new` more fit behind the rest.

    More than needed is given up, until three quarters of the context are in use at most, where that is possible: what
    is left has to be read again, and it should not have to be at every turn.

    Args:
      row: the transcript with the new prompt, expanded.
      new: tokens to be generated.
      limit: tokens that the context holds.
      cuts: where a turn of the user begins: only whole exchanges are given up. None: anywhere but inside an image.

    Raises:
      ContextFull: not even the last turn fits.
    """
    if len(row) + new <= limit:
        return 0
    places = _between_images(row) if cuts is None else list(cuts)
    left = {place: len(row) - place + 1 for place in places if place > 0}
    best = next((place for place in sorted(left) if left[place] <= min(limit - new, limit * 3 // 4)), None)
    if best is None:  # the newest turn is large: as little as it takes
        best = next((place for place in sorted(left) if left[place] + new <= limit), None)
    if best is None:
        raise ContextFull(min(left.values(), default=len(row)) + new, limit, "the last turn and its continuation")
    return best - 1


def _between_images(row: Sequence[int]) -> list[int]:
    """Places where a row may be cut: before an id that is no part of an image's soft tokens or of their frame."""
    soft = _token_utils.SOFT_TOKEN_PLACEHOLDER
    inside = set()
    for at, token in enumerate(row):
        if token == soft:
            inside.update((at - 1, at, at + 1, at + 2))  # \n\n <start> -2 ... -2 <end> \n\n
    return [at for at in range(1, len(row)) if at not in inside]
