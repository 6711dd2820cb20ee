# SPDX-License-Identifier: Apache-2.0
"""Messages of software with their translations, out of the `.po` files of the Django wheel: pairs, split, placeholders.

A small reader of the PO format: strings over several lines, contexts, plurals (the first form), fuzzy and obsolete
entries left out. The run itself is `translation.py`.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from _packages import zip_members

from gemma.errors import DataError

LANGUAGES: Mapping[str, str] = {"de": "German", "fr": "French"}
SEED = 5
# %(name)s, %s, %d, {name}, and HTML tags: what a program fills in and must find again.
PLACEHOLDER = re.compile(r"%\([A-Za-z_]\w*\)[sdif]|%[sdif]|\{[A-Za-z_]\w*\}|</?[a-z]+[^<>]*>")
_LINE = re.compile(r'^(msgctxt|msgid|msgid_plural|msgstr(?:\[\d+\])?)?\s*(".*")$')


@dataclasses.dataclass(frozen=True)
class Pair:
    """A message and its translation. `language` is a key of LANGUAGES; `group` decides the side in a split."""

    language: str
    message: str
    translation: str

    @property
    def group(self) -> str:
        """The message without case, punctuation and placeholders: near duplicates stay on one side."""
        return " ".join(re.findall(r"[^\W\d_]+", PLACEHOLDER.sub(" ", self.message).lower()))


def read_pairs(wheel: Path) -> list[Pair]:
    """All pairs of LANGUAGES, a message once for each language, in the order of files."""
    pairs: dict[tuple[str, str], Pair] = {}
    for language in LANGUAGES:
        for path, data in zip_members(wheel, f"/locale/{language}/LC_MESSAGES/django.po").items():
            for message, translation in parse_po(data.decode("utf-8"), path):
                if usable(message, translation):
                    pairs.setdefault((language, message), Pair(language, message, translation))
    return list(pairs.values())


def usable(message: str, translation: str) -> bool:
    """Whether a pair can be learnt from: one line, some letters, neither very long nor the header of its file."""
    one_line = "\n" not in message.strip() and "\n" not in translation.strip()
    letters = len(re.findall(r"[^\W\d_]", PLACEHOLDER.sub("", message)))
    return one_line and letters >= 3 and len(message) <= 200 and bool(translation.strip())


def parse_po(text: str, where: str = "po") -> Iterator[tuple[str, str]]:
    """(message, translation) of each entry that is translated and neither fuzzy nor obsolete.

    Raises:
      DataError: a line that is no PO, with its number.
    """
    entry: dict[str, str] = {}
    fuzzy, field = False, ""
    for number, raw in enumerate([*text.splitlines(), ""], 1):
        line = raw.strip()
        if line.startswith("#"):
            fuzzy = fuzzy or (line.startswith("#,") and "fuzzy" in line)
            continue
        if not line:
            yield from _entry(entry, fuzzy)
            entry, fuzzy, field = {}, False, ""
            continue
        found = _LINE.match(line)
        if found is None or not (found[1] or field):
            raise DataError(f"{where}, line {number}: expected msgid, msgstr or a quoted string, got {line[:80]!r}")
        if found[1]:
            if found[1] in ("msgid", "msgctxt") and "msgid" in entry:  # no blank line between two entries
                yield from _entry(entry, fuzzy)
                entry, fuzzy = {}, False
            field = found[1]
            entry[field] = ""
        try:
            entry[field] += ast.literal_eval(found[2])
        except (SyntaxError, ValueError) as error:
            raise DataError(f"{where}, line {number}: expected a quoted string, got {line[:80]!r}") from error


def _entry(entry: Mapping[str, str], fuzzy: bool) -> Iterator[tuple[str, str]]:
    message, translation = entry.get("msgid", ""), entry.get("msgstr", entry.get("msgstr[0]", ""))
    if message and translation and not fuzzy:
        yield message, translation


def split(pairs: Sequence[Pair], held_share: float = 0.15, seed: int = SEED) -> tuple[list[Pair], list[Pair]]:
    """(for training, held out), each in an order by hash. A message is on one side in all languages, with all that
    differ from it in case, punctuation and placeholders only.
    """
    train, held = [], []
    for pair in pairs:
        (held if _draw(f"{seed} side {pair.group}") < held_share else train).append(pair)
    for part in (train, held):
        part.sort(key=lambda pair: _draw(f"{seed} order {pair.language} {pair.message}"))
    return train, held


def prompt(message: str, language: str) -> str:
    """What the model goes on from: ` translation`, then the end."""
    return f"English: {message.strip()}\n{LANGUAGES[language]}:"


def few_shot(pairs: Iterable[Pair], message: str, language: str, count: int = 4) -> str:
    """The prompt after `count` translated messages, for a model that never saw the task."""
    shown = [pair for pair in pairs if pair.language == language][:count]
    lines = [f"{prompt(pair.message, language)} {pair.translation.strip()}" for pair in shown]
    return "\n\n".join([*lines, prompt(message, language)])


def placeholders(text: str) -> collections.Counter[str]:
    """What a program fills in, with how often it is there; order may change in a translation, and a tag's attributes."""
    found = PLACEHOLDER.findall(text)
    return collections.Counter(part.split(" ")[0].rstrip(">") if part.startswith("<") else part for part in found)


def _draw(text: str) -> float:
    """A number in [0, 1) that is the text's own."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
