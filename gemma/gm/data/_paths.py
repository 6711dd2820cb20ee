# SPDX-License-Identifier: Apache-2.0
"""Keys of elements that may lead into a tree: "text", "question.text", "turns[0].text", "turns[-1]", "a['b c']".

As in the trainer's configurations (kauldron calls them kontext paths). `get`, and `with_value` and `without`, which copy
the containers on the way and leave the given element as it is.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

from gemma.errors import DataError

_PART = re.compile(r"""\.?([^\W\d][\w\-/]*|\d+)|\[(-?\d+|'[^']*'|"[^"]*")\]""")


def split(path: str) -> tuple[str | int, ...]:
    """The steps of a path.

    Raises:
      DataError: it is no such path.
    """
    steps: list[str | int] = []
    at = 0
    while isinstance(path, str) and at < len(path):
        found = _PART.match(path, at)
        if found is None or (found[1] and (at > 0) != (path[at] == ".")):
            break
        steps.append(found[1] if found[1] else ast.literal_eval(found[2]))
        at = found.end()
    else:
        if steps:
            return tuple(steps)
    raise DataError(f'key {path!r}: expected a path such as "text", "question.text" or "turns[0].text"')


def _steps(element: Any, path: str) -> tuple[str | int, ...]:
    """A key that the element has as it is spelled goes before a path."""
    return (path,) if isinstance(element, Mapping) and path in element else split(path)


def get(element: Any, path: str) -> Any:
    """The value at a path.

    Raises:
      DataError: there is nothing; the message says where the path ends and what is there.
    """
    node = element
    for n, step in enumerate(_steps(element, path)):
        node = _child(node, step, path, n)
    return node


def _child(node: Any, step: str | int, path: str, n: int) -> Any:
    if isinstance(node, Mapping):
        if step in node:
            return node[step]
        has = f"it has {', '.join(map(repr, node)) or 'none'}"
    elif isinstance(step, int) and hasattr(node, "__getitem__") and not isinstance(node, (str, bytes)):
        if -len(node) <= step < len(node):
            return node[step]
        has = f"it has {len(node)} entries"
    elif isinstance(step, str) and hasattr(node, step):
        return getattr(node, step)
    else:
        has = f"a {type(node).__name__} has no keys"
    place = "the element" if n == 0 else f"what is before {step!r}"
    raise DataError(f"key {path!r}: no {step!r} in {place}; {has}")


def with_value(element: Any, path: str, value: Any) -> Any:
    """A copy of the element with a value at a path; dictionaries that are missing on the way are made."""
    return _put(element, _steps(element, path), value, path)


def _put(node: Any, steps: tuple[str | int, ...], value: Any, path: str) -> Any:
    step, rest = steps[0], steps[1:]
    if isinstance(node, Mapping):
        child = _put(node.get(step, {}), rest, value, path) if rest else value
        return _copied(node, step, child)
    child = value
    if rest:
        child = _put(_child(node, step, path, len(steps)), rest, value, path)
    if isinstance(step, int) and isinstance(node, (list, tuple)) and -len(node) <= step < len(node):
        items = list(node)
        items[step] = child
        return items if isinstance(node, list) else tuple(items)
    if isinstance(step, str) and dataclasses.is_dataclass(node) and hasattr(node, step):
        return dataclasses.replace(node, **{step: child})
    raise DataError(f"key {path!r}: {step!r} cannot be set in a {type(node).__name__}; expected a dictionary")


def without(element: Any, path: str) -> Any:
    """A copy of the element without what is at a path, which is a key of a dictionary."""
    return _drop(element, _steps(element, path), path)


def _drop(node: Any, steps: tuple[str | int, ...], path: str) -> Any:
    if len(steps) > 1:
        return _put(node, steps[:1], _drop(_child(node, steps[0], path, 0), steps[1:], path), path)
    if isinstance(node, Mapping):
        return (
            type(node)({k: v for k, v in node.items() if k != steps[0]})
            if type(node) is not dict
            else {k: v for k, v in node.items() if k != steps[0]}
        )
    raise DataError(f"key {path!r}: an entry of a {type(node).__name__} cannot be dropped; pass drop_inputs=False")


def _copied(node: Mapping, step: str | int, child: Any) -> Any:
    if type(node) is dict or not isinstance(node, MutableMapping):
        return {**node, step: child}
    done = copy.copy(node)
    done[step] = child
    return done
