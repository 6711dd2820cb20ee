# SPDX-License-Identifier: Apache-2.0
"""What the columns of a row mean: the formats of training data, told apart by their columns, and rows to examples.

    format             columns (others are ignored)                                                  example
    messages           messages [, tools, images]                                                    Conversation
    sharegpt           conversations [, system, tools, images]                                       Conversation
    alpaca             instruction, output [, input, system, history, images]                        Conversation
    prompt_completion  prompt, completion [, images]                            Completion, or with lists Conversation
    preference         chosen, rejected [, prompt | conversations, system]                           Preference
    kto                prompt, completion, label; or messages | conversations, label                 Rated
    labelled           text, label                                                                   Labelled
    text               text                                                                          Text

Files as rows are `_rows.py`, messages `_messages.py`; finding the rows of a file is `_read.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma.chat import Turn
from gemma.errors import DataError
from gemma.gm.data._examples import Completion, Conversation, Example, Labelled, Preference, Rated, Text
from gemma.gm.data._messages import Reader, list_of, role_of, text_of

_SPELLINGS = {
    "input": ("input", "context"),
    "output": ("output", "response"),
    "label": ("label", "kto_tag"),
    "images": ("images", "image"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row under the names of the fields. `folder`: what paths in it are relative to."""

    cells: Mapping[str, Any]
    columns: Mapping[str, str]
    folder: Path

    def get(self, field: str) -> Any:
        """The cell of a field; None where the column is missing or empty."""
        return next((self.cells[c] for c in spellings(field, self.columns) if self.cells.get(c) is not None), None)

    def text(self, field: str, *, empty: bool = True) -> str:
        value = self.get(field)
        if isinstance(value, float) and not math.isfinite(value):  # a missing cell, as some programs write it
            raise DataError(f"{field}: expected text, got {value}")
        return text_of(str(value) if _is_number(value) else value, field, empty=empty)

    def reader(self) -> Reader:
        images = self.get("images")
        if isinstance(images, str) and not images.lstrip().startswith("["):
            images = [images] if images.strip() else []  # an empty cell of a table
        elif isinstance(images, (Mapping, bytes)):
            images = [images]
        return Reader(self.folder, [] if images is None else list_of(images, "images"))


def spellings(field: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that may hold a field: the caller's, or our own name and its common variants."""
    return (columns[field],) if field in columns else _SPELLINGS.get(field, (field,))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- one function per format


def _messages(row: Row) -> Conversation:
    return row.reader().conversation(row.get("messages"), "messages", tools=row.get("tools"))


def _sharegpt(row: Row) -> Conversation:
    system = row.text("system") if row.get("system") is not None else ""
    reader = row.reader()
    return reader.conversation(row.get("conversations"), "conversations", system=system, tools=row.get("tools"))


def _alpaca(row: Row) -> Conversation:
    messages = []
    for n, pair in enumerate(list_of(row.get("history") or [], "history")):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"history[{n}]: expected a pair of question and answer")
        messages += [dict(role="user", content=pair[0]), dict(role="assistant", content=pair[1])]
    more = row.text("input") if row.get("input") is not None else ""
    asked = row.text("instruction") + (f"\n\n{more}" if more.strip() else "")
    answer = row.text("output", empty=False)
    messages += [dict(role="user", content=text_of(asked, "instruction", empty=False))]
    messages += [dict(role="assistant", content=answer)]
    system = row.text("system") if row.get("system") is not None else ""
    return row.reader().conversation(messages, "alpaca", system=system)


def _prompt_completion(row: Row) -> Conversation | Completion:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        before, after = list_of(prompt, "prompt"), list_of(completion, "completion")
        read = row.reader().conversation([*before, *after], "prompt+completion", tools=row.get("tools"))
        learnt = sum(1 for m in after if isinstance(m, Mapping) and role_of(m, "completion") == "model")
        models = [n for n, turn in enumerate(read.turns) if turn.role == "model"]
        return dataclasses.replace(read, mute=tuple(sorted({*read.mute, *models[: len(models) - learnt]})))
    reader, prompt = row.reader(), row.text("prompt")
    placed, images = reader.place([Turn("user", prompt)])
    return Completion(placed[0].content if images else prompt, row.text("completion", empty=False), images)


def _preference(row: Row) -> Preference:
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if prompt is None:
        prompt = row.get("conversations")
    if isinstance(chosen, Mapping) and isinstance(rejected, Mapping):
        chosen, rejected = [chosen], [rejected]
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise DataError("chosen and rejected: expected two texts or two lists of messages")
    if prompt is None:
        before, good, bad = _implicit(chosen, rejected)
    else:
        before = _asked(row, prompt)
        good, bad = _answer(row, chosen, before, "chosen"), _answer(row, rejected, before, "rejected")
    before = _with_system(row, before)
    if good == bad:
        raise DataError("chosen and rejected are the same: there is nothing to prefer")
    return Preference(before, good, bad)


def _implicit(chosen: Any, rejected: Any) -> tuple[tuple[Turn, ...], str, str]:
    """Two whole conversations that differ in their last turn: (what they share, the two answers)."""
    if isinstance(chosen, str):
        chosen, rejected = _marked(chosen, "chosen"), _marked(rejected, "rejected")
    one, two = (Reader(Path()).checked(m, name) for m, name in ((chosen, "chosen"), (rejected, "rejected")))
    if one[:-1] != two[:-1] or len(one) < 2:
        raise DataError("chosen and rejected: expected conversations that are the same up to their last message")
    return tuple(one[:-1]), _last(one, "chosen"), _last(two, "rejected")


def _marked(text: Any, name: str) -> list[dict[str, str]]:
    """A dialogue in one text, marked by lines `Human:` and `Assistant:`."""
    parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text_of(text, name))
    if len(parts) < 5 or parts[0].strip():
        raise DataError(
            f'{name}: with no prompt, expected messages, or a text of turns "\\n\\nHuman: ...\\n\\nAssistant: ..."'
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [dict(role=roles[who], content=said.strip()) for who, said in zip(parts[1::2], parts[2::2])]


def _asked(row: Row, prompt: Any) -> tuple[Turn, ...]:
    """The turns before an answer."""
    if isinstance(prompt, list) or (isinstance(prompt, str) and prompt.lstrip().startswith("[{")):
        turns = row.reader().checked(prompt, "prompt")
    else:
        turns = [Turn("user", text_of(prompt, "prompt", empty=False))]
    if turns[-1].role != "user":
        raise DataError(f"prompt: expected a user turn at its end, got one of the {turns[-1].role}")
    return tuple(turns)


def _answer(row: Row, value: Any, before: Sequence[Turn], name: str) -> str:
    """An answer as text, or as a list that holds it alone, or behind the turns before it."""
    if not isinstance(value, list):
        return text_of(value, name, empty=False)
    if len(value) == 1:
        value = [dict(role="user", content="-"), *value]
        return _last(Reader(Path()).checked(value, name), name)
    turns = Reader(Path()).checked(value, name)
    if tuple(turns[:-1]) != tuple(before):
        raise DataError(f"{name}: expected one message of the assistant, or the prompt and that message")
    return _last(turns, name)


def _last(turns: Sequence[Turn], name: str) -> str:
    if turns[-1].role != "model":
        raise DataError(f"{name}: expected a message of the assistant at its end, got one of the {turns[-1].role}")
    return text_of(turns[-1].content, name, empty=False)


def _with_system(row: Row, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The turns before an answer, behind the system text of a column."""
    if row.get("images"):  # not to be dropped in silence
        raise DataError("images: they are read in conversations and completions only, not beside preferences")
    system = row.get("system")
    if system is None or not text_of(system, "system").strip():
        return turns
    if turns[0].role == "system":
        raise DataError("a system text came in a column and as a message: expected one of the two")
    return (Turn("system", system), *turns)


def _kto(row: Row) -> Rated:
    good = row.get("label")
    good = {"true": True, "1": True, "false": False, "0": False}.get(str(good).strip().lower())
    if good is None:
        raise DataError(f"label: expected true or false, got {row.get('label')!r:.40}")
    if row.get("completion") is not None:
        before = _asked(row, row.get("prompt"))
        return Rated(_with_system(row, before), _answer(row, row.get("completion"), before, "completion"), good)
    name = "messages" if row.get("messages") is not None else "conversations"
    turns = row.reader().checked(row.get(name), name)
    if len(turns) < 2:
        raise DataError(f"{name}: expected a question and an answer")
    return Rated(_with_system(row, tuple(turns[:-1])), _last(turns, name), good)


def _labelled(row: Row) -> Labelled:
    label = row.get("label")
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # tables with holes hold whole numbers as 1.0
    if not isinstance(label, (str, int)) or not str(label).strip():
        raise DataError(f"label: expected the name or number of a class, got {label!r:.40}")
    return Labelled(row.text("text", empty=False), text_of(str(label), "label"))


def _text(row: Row) -> Text:
    return Text(row.text("text", empty=False))


# --- the table of formats


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to write rows.

    Attributes:
      needs: fields, one of the alternatives in full.
      may: fields that it reads besides.
      beats: formats whose fields a row of this one has too.
    """

    name: str
    kind: str
    needs: tuple[tuple[str, ...], ...]
    convert: Callable[[Row], Example]
    may: tuple[str, ...] = ()
    beats: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*(f for group in self.needs for f in group), *self.may]))


_SINGLE = ("messages", "sharegpt", "alpaca", "prompt_completion", "text", "labelled", "kto")
FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (
        Format("messages", "supervised", (("messages",),), _messages, ("tools", "images")),
        Format("sharegpt", "supervised", (("conversations",),), _sharegpt, ("system", "tools", "images")),
        Format(
            "alpaca",
            "supervised",
            (("instruction", "output"),),
            _alpaca,
            ("input", "system", "history", "images"),
        ),
        Format("prompt_completion", "supervised", (("prompt", "completion"),), _prompt_completion, ("tools", "images")),
        Format(
            "preference",
            "preference",
            (("chosen", "rejected"),),
            _preference,
            ("prompt", "conversations", "system"),
            _SINGLE,
        ),
        Format(
            "kto",
            "kto",
            (("prompt", "completion", "label"), ("messages", "label"), ("conversations", "label")),
            _kto,
            ("system",),
            ("prompt_completion", "messages", "sharegpt"),
        ),
        Format("labelled", "classification", (("text", "label"),), _labelled, (), ("text",)),
        Format("text", "supervised", (("text",),), _text),
    )
}


def detect(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], where: str) -> Format:
    """The one format whose columns half of these rows, or more, have.

    Raises:
      DataError: none fits, or more than one does; the columns and the candidates are listed.
    """
    seen = list(dict.fromkeys(name for row in rows for name in row))
    held = [n for n in seen if 2 * sum(row.get(n) is not None for row in rows) >= len(rows)]

    def has(field: str) -> bool:
        return any(name in held for name in spellings(field, columns))

    fits = [f for f in FORMATS.values() if any(all(map(has, group)) for group in f.needs)]
    fits = [f for f in fits if set(columns) <= set(f.fields)]
    beaten = {name for f in fits for name in f.beats}
    left = [f for f in fits if f.name not in beaten]
    if len(left) == 1:
        return left[0]
    known = ", ".join(seen[:20]) or "none"
    if left:
        names = " or ".join(f.name for f in left)
        raise DataError(
            f"{where}: its columns ({known}) can be read as {names}: pass format= with the one that you mean"
        )
    forms = "; ".join(f"{f.name} ({' or '.join(' + '.join(group) for group in f.needs)})" for f in FORMATS.values())
    raise DataError(
        f"{where}: its columns ({known}) are of no known format. The formats are: {forms}. Pass format= and the names "
        f"of your columns, for example format='prompt_completion', prompt='question', completion='answer'"
    )


def checked_columns(columns: Mapping[str, Any], format: Format | None) -> dict[str, str]:
    """The caller's names of columns, by field."""
    formats = [format] if format else FORMATS.values()
    fields = list(dict.fromkeys(field for f in formats for field in f.fields))
    for field, column in columns.items():
        if field not in fields:
            raise DataError(
                f"columns: {field!r} is no field{f' of {format.name}' if format else ''}; the fields are: {', '.join(fields)}"
            )
        if not isinstance(column, str):
            raise DataError(f"columns: {field}: expected the name of a column, got {column!r:.80}")
    return dict(columns)


def convert(format: Format, cells: Mapping[str, Any], columns: Mapping[str, str], folder: Path) -> Example:
    """One row as an example.

    Raises:
      DataError: why the row cannot be used.
    """
    return format.convert(Row(cells, columns, folder))
