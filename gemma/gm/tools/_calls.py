# SPDX-License-Identifier: Apache-2.0
"""Finds the tool call in a model's text: one JSON object with the key "tool_name". Runs nothing, evaluates nothing.

One pass over the text, whatever stands in it: brackets are counted outside of JSON strings, and each balanced object is
parsed once. Objects without "tool_name" are prose; one that has it but is broken is reported, so that the model can be
told. Carrying out a call is `_manager.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

KEY = "tool_name"
MAX_CALL = 65_536  # characters of one call
MAX_NESTING = 32

_BEGIN = re.compile(r"(?<!\\)\{")  # not the braces of LaTeX
_MARKS = re.compile(r'\\.|["{}\[\]]', re.DOTALL)  # a backslash takes the next character with it


@dataclasses.dataclass(frozen=True)
class Call:
    """A well-formed call: the tool's name and its arguments as JSON values. `more`: other objects with a tool name."""

    name: str
    arguments: dict[str, Any]
    more: bool = False


@dataclasses.dataclass(frozen=True)
class Malformed:
    """What looks like a call and is none; `reason` is for the model."""

    reason: str


def find_call(text: str) -> Call | Malformed | None:
    """The first call in a model's text, or why it is broken, or None where the text is no call."""
    found: Call | Malformed | None = None
    begin = _BEGIN.search(text)
    while begin is not None:
        at = begin.start()
        end, nesting = _close(text, at)
        source = text[at : len(text) if end is None else end]
        if KEY in source:
            if found is not None:
                return dataclasses.replace(found, more=True) if isinstance(found, Call) else found
            found = _parse(source, closed=end is not None, nesting=nesting)
        if end is None:
            break
        begin = _BEGIN.search(text, end)
    return found


def _close(text: str, start: int) -> tuple[int | None, int]:
    """(index after the brace that closes the one at `start`, or None; the deepest nesting)."""
    depth = deepest = 0
    in_string = False
    for match in _MARKS.finditer(text, start):
        mark = match.group()
        if mark == '"':
            in_string = not in_string
        elif in_string or len(mark) == 2:
            continue
        elif mark in "{[":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
            if depth == 0:
                return match.end(), deepest
    return None, deepest


def _parse(source: str, *, closed: bool, nesting: int) -> Call | Malformed | None:
    if not closed:
        return Malformed("the JSON object is not complete: a closing brace or quote is missing")
    if len(source) > MAX_CALL or nesting > MAX_NESTING:
        return Malformed(f"a call has at most {MAX_CALL} characters and {MAX_NESTING} levels of brackets")
    try:
        value = json.loads(source, strict=False, object_pairs_hook=_no_twins, parse_constant=_no_constant)
    except ValueError as error:  # JSONDecodeError, or an integer of more digits than Python reads
        hint = "; names and texts stand in double quotes" if "'" in source else ""
        return Malformed(f"it is not valid JSON: {error}{hint}")
    if KEY not in value:
        if f'"{KEY}"' not in source:
            return None
        return Malformed(f'"{KEY}" and the arguments belong into one flat JSON object')
    name = value.pop(KEY)
    if not isinstance(name, str) or not name:
        return Malformed(f'"{KEY}" must be the name of a tool in double quotes')
    return Call(name, value)


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _no_constant(name: str):
    raise ValueError(f"{name} is not a JSON number")
