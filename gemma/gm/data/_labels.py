# SPDX-License-Identifier: Apache-2.0
"""The names of classes as single tokens of a vocabulary, in a fixed order. Encoding the texts is `_encode.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gemma.errors import DataError
from gemma.gm.data._examples import Labelled


def label_tokens(tokenizer: Any, labels: Mapping[str, str | int] | Sequence[str]) -> dict[str, int]:
    """Label to token id, in the order of `labels`.

    Raises:
      DataError: fewer than two labels, one that is not a single token, or two with the same token.
    """
    if isinstance(labels, str) or not isinstance(labels, (Mapping, Sequence)):
        raise DataError(f"labels: expected a list of names, or names with the text of each, got {labels!r:.80}")
    texts = {str(k): v for k, v in labels.items()} if isinstance(labels, Mapping) else {str(k): str(k) for k in labels}
    if len(texts) < 2:
        raise DataError(
            f"labels: expected two or more, got {', '.join(texts) or 'none'}: name all of them (labels=[...]; on the "
            f"command line --set labels=[...], of gemma eval --label), or use data that holds more"
        )
    found: dict[str, int] = {}
    for name, text in texts.items():
        if isinstance(text, str):
            ids = tokenizer.encode(text, parse_special=False)
        elif isinstance(text, int) and not isinstance(text, bool) and 0 <= text < tokenizer.vocab_size:
            ids = [text]
        else:
            raise DataError(f"labels[{name!r:.80}]: expected the text or the id of one token, got {text!r:.80}")
        if len(ids) != 1:
            pieces = [tokenizer.piece(i) for i in ids]
            raise DataError(
                f"labels[{name!r:.80}]: {text!r:.80} is {len(ids)} tokens ({pieces!r:.200}), but a label is one: "
                f"give each label a text of one token (labels={{{name!r:.80}: 'A', ...}}; on the command line --set "
                f"labels=[NAME=A,...], of gemma eval --label NAME=A)"
            )
        if ids[0] in found.values():
            raise DataError(f"labels[{name!r:.80}]: another label has the token of {text!r:.80}")
        found[name] = ids[0]
    return found


def found_labels(examples: Iterable[Labelled]) -> list[str]:
    """The labels that occur, numbers in their order, then names in theirs."""
    names = {example.label for example in examples}
    return sorted(names, key=lambda name: (0, int(name), "") if _is_int(name) else (1, 0, name))


def _is_int(name: str) -> bool:
    return name.lstrip("-").isdecimal() and name.isascii() and len(name) < 18
