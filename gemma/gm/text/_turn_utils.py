# SPDX-License-Identifier: Apache-2.0
"""What a new turn has to know about the turns before it: how much of the cache they use, and where it begins.

A view of a `SamplingState`, or of a `FullState` of `_full_loop.py`, under the official names. The samplers themselves ask
their engine (`_engine.py`).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from gemma.gm.text._full_loop import FullState
from gemma.gm.text._sampler_loop import SamplingState


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrevTurns:
    """The turns before, or none.

    Attributes:
      last_state: the state after them; None: this is the first turn.
    """

    last_state: SamplingState | FullState | None

    def __bool__(self) -> bool:
        return self.last_state is not None

    @property
    def used_cache_length(self) -> int:
        """Slots that the longest row uses once its pending last token is stored; 0 in the first turn."""
        return 0 if self.last_state is None else int(np.max(self.last_state.used_cache_length)) + 1

    @property
    def last_token_pos(self) -> int:
        """The position at which the longest row's new turn begins."""
        return self.used_cache_length
