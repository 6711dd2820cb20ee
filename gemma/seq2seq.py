# SPDX-License-Identifier: Apache-2.0
"""What an encoder-decoder reads and what it is trained to say: ids and labels, as numpy arrays, for every framework.

    the text a b      target_tokens   bos  a    b            labels are shifted against the decoder's input once,
                      labels          a    b    eos          and the text ends with an eos: label t is token t + 1

The networks are in `gemma/research/t5gemma/`; tasks that make inputs and targets out of plain text are in `gm/data`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from gemma.errors import PromptError, ShapeError

IGNORED = -100  # the label of a place where nothing is to be learnt


class Targets(NamedTuple):
    """What a decoder is trained with; of each row, for the text a b of ids 5 6:

    target_tokens   bos  5    6    0        what it reads
    labels           5   6   eos  -100      what it should say after each
    """

    target_tokens: np.ndarray  # int32 [B, T]
    labels: np.ndarray  # int32 [B, T]


def make_targets(
    targets: Sequence[Sequence[int]], length: int | None = None, *, bos: int = 2, eos: int = 1, pad: int = 0
) -> Targets:
    """Decoder inputs and labels of texts, shifted against each other once, with an eos at the end of each.

    Args:
      targets: the ids of each text, without bos; one that ends with eos already gets no second one.
      length: T; None: as the longest needs.
      bos, eos, pad: special ids.

    Raises:
      PromptError: a text is empty, holds padding, begins with bos, or does not fit into `length` with its eos.
    """
    rows = []
    for number, text in enumerate(targets):
        ids = [int(token) for token in text]
        if not ids or pad in ids or ids[0] == bos:
            what = "is empty" if not ids else "holds padding" if pad in ids else "begins with bos, which is added here"
            raise PromptError(f"target {number} {what}: expected the ids of a text")
        rows.append(ids if ids[-1] == eos else [*ids, eos])
    if not rows:
        raise PromptError("targets: expected at least one text, got none")
    longest = max(map(len, rows))
    length = longest if length is None else length
    if longest > length:
        raise PromptError(f"targets: the longest needs {longest} places with its eos, got length={length}")
    read, said = (np.full((len(rows), length), fill, np.int32) for fill in (pad, IGNORED))
    for b, ids in enumerate(rows):
        read[b, : len(ids)] = [bos, *ids[:-1]]
        said[b, : len(ids)] = ids
    return Targets(read, said)


def shift_right(labels: Any, *, bos: int = 2, pad: int = 0) -> np.ndarray:
    """The decoder inputs that belong to labels [B, T]: bos in front, the last one dropped, -100 as padding."""
    labels = np.asarray(labels)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ShapeError(f"labels: expected integers [B, T], got {labels.dtype} {labels.shape}")
    shifted = np.concatenate([np.full((len(labels), 1), bos, labels.dtype), labels[:, :-1]], axis=1)
    return np.where(shifted == IGNORED, pad, shifted).astype(np.int32)


def check_aligned(target_tokens: Any, labels: Any, pad: int = 0) -> None:
    """Refuses decoder inputs and labels that are not one text: each label must be read in the next place.

    Raises:
      ShapeError: their shapes differ.
      PromptError: a label is not what the decoder reads next: shifted twice, or not at all.
    """
    if np.shape(target_tokens) != np.shape(labels) or np.ndim(labels) != 2:
        raise ShapeError(
            f"labels: expected the shape [B, T] of target_tokens, {np.shape(target_tokens)}, got {np.shape(labels)}"
        )
    read, said = np.asarray(target_tokens)[:, 1:], np.asarray(labels)[:, :-1]
    wrong = np.argwhere((said != IGNORED) & (read != pad) & (said != read))
    if len(wrong):
        row, at = (int(i) for i in wrong[0])
        raise PromptError(
            f"labels: row {row} should say {said[row, at]} at place {at}, but the decoder reads {read[row, at]} at place "
            f"{at + 1}. Labels are shifted against the decoder's input once: label t is token t + 1 (see make_targets)"
        )


def encode_inputs(
    tokenizer: Any, texts: str | Sequence[str], *, bos: bool = True, length: int | None = None, max_length: int = 1024
) -> np.ndarray:
    """Texts to what the encoder reads: int32 [B, S], 0 behind the shorter ones.

    Args:
      tokenizer: of `gm.text` or `gemma.tokenizer`.
      texts: one, or several; special tokens may be spelled in them.
      bos: put a bos in front, as Hugging Face's tokenizer does; the official JAX sampler puts none.
      length: S; None: as the longest needs.
      max_length: the most tokens of a text.

    Raises:
      PromptError: no text, an empty one, one that is too long, or one in which padding is spelled.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    rows = [list(tokenizer.encode(text, add_bos=bos)) for text in texts]
    if not rows:
        raise PromptError("the list of inputs is empty: expected at least one text")
    for number, ids in enumerate(rows):
        if len(ids) <= int(bos):
            raise PromptError(f"input {number} is empty: an encoder needs at least one token to read")
        if 0 in ids:
            raise PromptError(f"input {number} holds padding (id 0): expected none inside of a text")
    longest = max(map(len, rows))
    if longest > max_length:
        raise PromptError(f"Max prompt length {longest} is longer than max input length {max_length}")
    length = longest if length is None else length
    if longest > length:
        raise PromptError(f"inputs: the longest has {longest} tokens, got length={length}")
    table = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(table, rows):
        row[: len(ids)] = ids
    return table
