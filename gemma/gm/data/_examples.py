# SPDX-License-Identifier: Apache-2.0
"""What a row of training data can be, and `Examples`, a file of them as a sequence. Plain data, no tokens.

How a row of a file becomes one of these is `_formats.py`; how they become ids and loss masks is `_encode.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma.chat import GEMMA3, Turn
from gemma.errors import DataError, GemmaError

IMAGE = GEMMA3.image  # stands in a turn's text where an image goes, whatever the model; `_encode` puts in its own
MAX_LISTED = 1000  # bad rows that are kept with their reason; the others are only counted

ImageRef = str | bytes  # a path, or the encoded file itself


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A chat. Every turn of the model is learnt, its end marker included.

    Attributes:
      turns: an optional system turn, then user and model in alternation.
      images: paths or encoded files, in the order of the markers `<start_of_image>` in the users' texts.
      tools: functions that the model is told about before the first user's text, as JSON schemas (OpenAI's form).
      mute: indices into `turns` of model turns that are read and not learnt.
    """

    turns: tuple[Turn, ...]
    images: tuple[ImageRef, ...] = ()
    tools: tuple[Mapping[str, Any], ...] | None = None
    mute: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """A raw text to go on from and its continuation, with no chat template: `<bos> prompt | completion <eos>`."""

    prompt: str
    completion: str
    images: tuple[ImageRef, ...] = ()


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain text, all of it learnt: `<bos> | text <eos>`. Longer than a row, it is cut into several."""

    text: str


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to one conversation, the better one first. `prompt` ends with a user turn."""

    prompt: tuple[Turn, ...]
    chosen: str
    rejected: str


@dataclasses.dataclass(frozen=True)
class Rated:
    """One answer to a conversation, with a thumb up or down (KTO). `prompt` ends with a user turn."""

    prompt: tuple[Turn, ...]
    completion: str
    good: bool


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A text and the name of its class."""

    text: str
    label: str


Example = Conversation | Completion | Text | Preference | Rated | Labelled

KIND_OF: Mapping[type, str] = {
    Conversation: "supervised",
    Completion: "supervised",
    Text: "supervised",
    Preference: "preference",
    Rated: "kto",
    Labelled: "classification",
}


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: its file, its line (of a Parquet file: its row), counted from 1, and the reason."""

    path: str
    line: int
    why: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.why}"


class Examples(Sequence):
    """Rows of files (or of a list) as a random-access sequence; a `grain` data source as it stands.

    Rows of JSONL and text files are read from the disk when asked for: only their places are held in memory, 32 bytes
    each. Made by `read_examples`, or by `Examples.of` from a list.

    Attributes:
      kind: "supervised", "preference", "kto" or "classification": what a batch of them holds.
      format: of the rows, for example "messages"; joined by "+" if the files differ.
      problems: the rows that were left out, the first 1000 of them; `bad_rows` is the number of all.
      paths: the files.
    """

    def __init__(
        self,
        read: Callable[[int], Example],
        where: Callable[[int], str],
        rows: np.ndarray,
        *,
        kind: str,
        format: str,
        problems: Sequence[BadRow] = (),
        bad_rows: int = 0,
        paths: Sequence[str] = (),
    ):
        """Args: read, where: the example and "file:line" of a place; rows: the places, int [n]. Others: see the class."""
        self._read, self._where, self._rows = read, where, rows
        self.kind, self.format = kind, format
        self.problems, self.bad_rows, self.paths = tuple(problems), bad_rows, tuple(paths)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """Examples that are in memory already.

        Raises:
          DataError: none, something that is no example, or examples that do not go into one batch.
        """
        if isinstance(examples, Examples):
            return examples
        held = tuple(examples)
        for n, example in enumerate(held):
            if type(example) not in KIND_OF:
                names = ", ".join(t.__name__ for t in KIND_OF)
                raise DataError(f"examples[{n}]: expected one of gm.data.{{{names}}}, got {type(example).__name__}")
        kinds = sorted({KIND_OF[type(example)] for example in held})
        if len(kinds) != 1:
            raise DataError(f"examples: expected one kind, got {' and '.join(kinds) or 'no example at all'}")
        names = "+".join(sorted({type(example).__name__.lower() for example in held}))
        return cls(held.__getitem__, "examples[{}]".format, np.arange(len(held)), kind=kinds[0], format=names)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        """The example at an index, or the `Examples` of a slice."""
        if isinstance(index, slice):
            return self._with(self._rows[index])
        place = int(self._rows[index])  # an IndexError here ends a `for` loop, as of any sequence
        try:
            return self._read(place)
        except (GemmaError, OSError) as error:
            raise DataError(f"{self._where(place)}: {error} (it was readable before: did the file change?)") from None

    def where(self, index: int) -> str:
        """ "file:line" of an example."""
        return self._where(int(self._rows[index]))

    def split(self, held_out: int | float, *, seed: int = 0) -> tuple[Examples, Examples]:
        """Splits at random into (the rest, those held out for evaluation), each in the order of the file.

        Args:
          held_out: their number, or, as a float between 0 and 1, their share (at least one).
          seed: of the choice.
        """
        from gemma.gm.data._packing import order

        n = max(1, round(held_out * len(self))) if isinstance(held_out, float) else held_out
        if isinstance(n, bool) or not isinstance(n, int) or not 0 < n < len(self):
            raise DataError(
                f"held_out: expected 1 to {len(self) - 1} of {len(self)} examples, or a share between 0 and 1, "
                f"got {held_out!r}"
            )
        chosen = np.zeros(len(self), bool)
        chosen[order(len(self), seed, 0)[:n]] = True
        return self._with(self._rows[~chosen]), self._with(self._rows[chosen])

    def _with(self, rows: np.ndarray) -> Examples:
        return Examples(
            self._read,
            self._where,
            rows,
            kind=self.kind,
            format=self.format,
            problems=self.problems,
            bad_rows=self.bad_rows,
            paths=self.paths,
        )

    def __repr__(self) -> str:
        files = ", ".join(Path(path).name for path in self.paths) or "memory"
        bad = f", {self.bad_rows} left out" if self.bad_rows else ""
        return f"Examples({len(self)} of format {self.format} from {files}{bad})"


def checked_paths(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """The files that a caller named, each of which must exist."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found = [Path(path).expanduser() for path in paths]
    if not found:
        raise DataError("paths: expected at least one file of examples, got none")
    for path in found:
        if path.is_dir():
            raise DataError(f"{path}: expected a file of examples, got a folder: name the files in it")
        if not path.is_file():
            raise DataError(f"{path}: there is no such file of examples")
    return found
