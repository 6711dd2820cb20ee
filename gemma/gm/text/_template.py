# SPDX-License-Identifier: Apache-2.0
"""The chat template of Gemma 1 to 3 as format strings, and the turns that `ChatSampler` keeps.

For texts of your own making: what is put into the strings is not protected against spelled markers. `ChatSampler`
tokenizes turns with `gemma/chat.py`, where contents stay text.
"""

from __future__ import annotations

import dataclasses

PROMPT = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
ANSWER = "{}<end_of_turn>"


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side said.

    Attributes:
      text: as it was given, or as it was shown.
    """

    text: str


class UserTurn(Turn):
    """What the user said."""


class ModelTurn(Turn):
    """What the model answered, without its end token."""
