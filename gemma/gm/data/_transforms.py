# SPDX-License-Identifier: Apache-2.0
"""Small steps of a data pipeline: bytes to text, text into a template, text to ids, padding, labels to token ids.

Names and fields are the official package's. Whole tasks, from texts to arrays, are `_tasks.py`.

    gm.data.Tokenize(key="text", tokenizer=t).map({"text": "hi", "id": 7})             # {"text": [...], "id": 7}
    gm.data.Tokenize(key={"text": "ids"}, tokenizer=t).map({"text": "hi"})             # {"text": "hi", "ids": [...]}
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gemma.errors import DataError
from gemma.gm.data import _functional, _paths, _tasks
from gemma.gm.data._maps import MapTransform

Keys = str | Sequence[str] | Mapping[str, str]


class MissingKey(DataError, KeyError):
    """An element, or a table of labels, has no such key."""

    __str__ = Exception.__str__  # KeyError's own would quote the sentence


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElementWise(MapTransform):
    """A step that is applied to some entries of an element.

    Attributes:
      key: of the entry; several keys; or a dictionary from keys to the keys of the results, where the entry itself
        stays as it was. Of several, those that an element lacks are passed over; it must have one of them.
    """

    key: Keys

    def map(self, element: Mapping[str, Any]) -> dict[str, Any]:
        """The element with transformed entries."""
        names = self.key if isinstance(self.key, Mapping) else {name: name for name in _listed(self.key)}
        found = {old: new for old, new in names.items() if old in element}
        if not found:
            raise MissingKey(
                f"{type(self).__name__}: expected the key {' or '.join(map(repr, names))}, the element has "
                f"{', '.join(map(repr, element)) or 'none'}"
            )
        done = dict(element)
        for old, new in found.items():
            try:
                done[new] = self.map_element(element[old])
            except DataError as error:
                raise type(error)(f"{type(self).__name__}, key {old!r}: {error}") from error
        return done

    def map_element(self, element: Any) -> Any:
        """The entry, transformed."""
        raise AssertionError


def _listed(key: str | Sequence[str]) -> list[str]:
    return [key] if isinstance(key, str) else list(key)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBytes(ElementWise):
    """Bytes become text; text stays.

    Attributes:
      encoding: of the bytes.
    """

    encoding: str = "utf-8"

    def map_element(self, element: bytes | str) -> str:
        text = _tasks._decode_bytes(element, self.encoding)
        if not isinstance(text, str):
            raise DataError(f"expected bytes, got {type(element).__name__}")
        return text


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatText(ElementWise):
    """Puts a text into a template, in the place of `{text}`.

    Attributes:
      template: as for `str.format`: braces of its own are doubled. Common indentation is removed from it, nothing else.
    """

    template: str

    def __post_init__(self):
        if "{text}" not in self.template:
            raise DataError(f"template: expected the placeholder {{text}} in it, got {self.template!r}")
        object.__setattr__(self, "template", textwrap.dedent(self.template))
        try:
            self.template.format(text="")
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(
                f"template: {error} is no placeholder of it; expected {{text}} alone, other braces doubled"
            ) from None

    def map_element(self, element: str) -> str:
        if not isinstance(element, str):
            raise DataError(f"expected a text, got {type(element).__name__}; put DecodeBytes before it for bytes")
        return self.template.format(text=element)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenize(ElementWise):
    """A text becomes its ids.

    Attributes:
      tokenizer: of `gm.text`.
      add_eos: put an eos at the end.
      add_bos: put a bos in front.
    """

    tokenizer: Any
    add_eos: bool = False
    add_bos: bool = False

    def map_element(self, element: str) -> list[int]:
        if not isinstance(element, str):
            raise DataError(f"expected a text, got {type(element).__name__}; put DecodeBytes before it for bytes")
        return self.tokenizer.encode(element, add_bos=self.add_bos, add_eos=self.add_eos)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pad(ElementWise):
    """Ids become an array of one length, with zeros at the end; see `gm.data.pad`.

    Attributes:
      max_length: T.
      truncate: cut what is longer. False: that is an error.
    """

    max_length: int
    truncate: bool = False

    def map_element(self, element: Sequence[int] | np.ndarray) -> np.ndarray:
        return _functional.pad(element, max_length=self.max_length, truncate=self.truncate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapInts(ElementWise):
    """Replaces whole numbers, for example labels by the token ids that stand for them.

    Attributes:
      old_to_new: what each becomes. A number that is not in it is an error.
    """

    old_to_new: Mapping[int, int]

    def map_element(self, element: int | np.integer | np.ndarray) -> Any:
        if isinstance(element, (np.ndarray, np.generic)):
            new = np.asarray([self._of(value) for value in element.reshape(-1).tolist()])
            small = new.size == 0 or np.can_cast(np.min_scalar_type(new.max()), element.dtype)  # labels are often uint8
            done = new.astype(element.dtype if small and new.min(initial=0) >= 0 else np.int64).reshape(element.shape)
            return done if isinstance(element, np.ndarray) else done[()]
        return self._of(element)

    def _of(self, value: Any) -> int:
        if value not in self.old_to_new:
            known = ", ".join(map(repr, self.old_to_new))
            raise MissingKey(f"Label {value} not found in `old_to_new`, which has {known or 'none'}.")
        return self.old_to_new[value]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddSeq2SeqFields(MapTransform):
    """Adds what the model reads, what it should say, and where that counts, to an element with ids.

    Keys may be paths: "turns[0].ids".

    Attributes:
      in_prompt, in_response: keys of the ids.
      out_input, out_target, out_target_mask: keys of the results, [P + R - 1] each; see `gm.data.make_seq2seq_fields`.
    """

    in_prompt: str
    in_response: str
    out_input: str
    out_target: str
    out_target_mask: str

    def map(self, element: Any) -> Any:
        """The element with the three arrays.

        Raises:
          DataError: (a ValueError) a key that is not there, or something else than ids.
        """
        values = []
        for key in (self.in_prompt, self.in_response):
            values.append(_functional.ids_of(_paths.get(element, key), f"key {key!r}"))
        fields = _functional.make_seq2seq_fields(*values)
        element = _paths.with_value(element, self.out_input, fields.input)
        element = _paths.with_value(element, self.out_target, fields.target)
        return _paths.with_value(element, self.out_target_mask, fields.target_mask)
