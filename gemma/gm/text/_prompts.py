# SPDX-License-Identifier: Apache-2.0
"""What a prompt may be, as ids: a text, token ids, or the turns of a conversation; alone or several.

Texts are raw: special tokens spelled in them become those tokens. Turns go through the chat template of `gemma/chat.py`
and stay text. Pictures of a prompt are read in `_images.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma import chat
from gemma.errors import PromptError
from gemma.gm.text._template import ModelTurn, Turn, UserTurn

_TURNS = (chat.Turn, Turn)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Several prompts of one call.

    Attributes:
      items: each a str, a list of ids, or a list of turns.
      single: whether just one was given, and not a list of one.
    """

    items: list[Any]
    single: bool

    @property
    def conversation(self) -> bool:
        """Whether any of them is a conversation."""
        return any(_is_turns(item) for item in self.items)


def parse(prompt: Any) -> Prompts:
    """One prompt or several.

    Args:
      prompt: a str; ids as a list of ints or an integer array [T]; turns as a list; or a list, tuple or array of these.

    Raises:
      PromptError: something else came.
    """
    if isinstance(prompt, np.ndarray) or hasattr(prompt, "__array__"):
        prompt = np.asarray(prompt).tolist()  # of no dimension: a str
    if isinstance(prompt, str) or _is_turns(prompt) or _is_ids(prompt):
        return Prompts([prompt], True)
    items = [_plain(item) for item in prompt] if isinstance(prompt, (list, tuple)) else None
    if items is None or not all(isinstance(item, str) or _is_turns(item) or _is_ids(item) for item in items):
        raise PromptError(
            f"prompt: expected a text, token ids, the turns of a conversation, or a list of these, got "
            f"{type(prompt).__name__}: {prompt!r:.80}"
        )
    return Prompts(items, False)


def encode(item: Any, tokenizer: Any, *, held: Sequence[int], images: int) -> list[int]:
    """The ids of one prompt.

    Args:
      item: of `Prompts.items`.
      tokenizer: of `gm.text` or `gemma.tokenizer`.
      held: the transcript that it goes on from; empty: this is the beginning.
      images: number of pictures that come with it; without any, a marker in a turn is text.

    Returns:
      ids; a text gets a bos at the beginning of a transcript, token ids are taken as they are.

    Raises:
      PromptError: turns that do not alternate, or markers and pictures that differ in number.
    """
    if isinstance(item, str):
        return tokenizer.encode(item, add_bos=not held)
    if not _is_turns(item):
        return [int(token) for token in item]
    tokenizer = getattr(tokenizer, "core", tokenizer)
    ids = chat.encode_chat(tokenizer, [_chat_turn(turn) for turn in item], images=images).ids
    if not held:
        return ids
    closing = tokenizer.encode("\n", parse_special=False)  # what the template writes after every turn
    if held[-1] != tokenizer.special.end_of_turn:  # the answer was cut short
        closing = [tokenizer.special.end_of_turn, *closing]
    return [*closing, *ids[1:]]


def _chat_turn(turn: Any) -> chat.Turn:
    if isinstance(turn, UserTurn):
        return chat.Turn("user", turn.text)
    return chat.Turn("model", turn.text) if isinstance(turn, ModelTurn) else turn


def _plain(item: Any) -> Any:
    return np.asarray(item).tolist() if isinstance(item, np.ndarray) or hasattr(item, "__array__") else item


def _is_turns(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) > 0 and all(isinstance(turn, _TURNS) for turn in item)


def _is_ids(item: Any) -> bool:
    whole = (int, np.integer)
    return (
        isinstance(item, (list, tuple))
        and len(item) > 0
        and all(isinstance(token, whole) and not isinstance(token, bool) for token in item)
    )
