# SPDX-License-Identifier: Apache-2.0
"""Reads a small JSON object from a file that nobody vouches for: bounded size and depth, no duplicate keys.

What the keys mean is not known here: `hf_config.py` interprets a `config.json` through `Section`, which accounts for
every key. The big JSON of a tokenizer and the header of a safetensors file have readers of their own.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gemma.errors import CheckpointNotFound, ConfigError, FormatError

MAX_BYTES = 1 << 20  # published files have 1 to 5 kB
MAX_DEPTH = 16


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      CheckpointNotFound: there is no such file.
      FormatError: more than 1 MB, not UTF-8, not JSON, not an object, a key twice, or nested deeper than 16.
    """
    return parse_object(_bytes_of(Path(path)), path)


def read_list(path: str | os.PathLike[str]) -> list[Any]:
    """The JSON list in a file; errors as of `read_object`."""
    values = _parse(_bytes_of(Path(path)), path)
    if not isinstance(values, list):
        raise FormatError(path, 0, f"expected a JSON list [...], got a {type(values).__name__}")
    return values


def _bytes_of(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            raw = file.read(MAX_BYTES + 1) if regular else b""
    except FileNotFoundError:
        raise CheckpointNotFound(f"{path}: no such file; expected a config.json or the folder that holds one") from None
    except ValueError:
        raise CheckpointNotFound(f"{str(path)!r:.200}: no file can have this name") from None
    except OSError as error:
        raise CheckpointNotFound(f"{path}: cannot be read ({error.strerror}); expected a config.json") from None
    if not regular:
        raise FormatError(path, None, "expected a config.json, got a pipe or a device")
    if len(raw) > MAX_BYTES:
        raise FormatError(path, MAX_BYTES, f"expected a config.json of at most {MAX_BYTES} bytes, this one is longer")
    return raw


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a pipe that nobody writes to must not block us


def parse_object(raw: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """`read_object` for bytes that are already in memory; `path` is for the error."""
    values = _parse(raw, path)
    if not isinstance(values, dict):
        raise FormatError(path, 0, f"expected a JSON object {{...}}, got a {type(values).__name__}")
    return values


def _parse(raw: bytes, path: str | os.PathLike[str]) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise FormatError(path, None, f"key {key[:80]!r} appears twice; expected it once")
            found[key] = value
        return found

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(path, error.start, "expected UTF-8 text (JSON), got other bytes") from None
    _check_depth(text, path)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        offset = len(text[: error.pos].encode())
        raise FormatError(path, offset, f"not valid JSON: {error.msg}") from None
    except ValueError as error:  # a number of thousands of digits
        raise FormatError(path, None, f"not valid JSON: {error}") from None


def _check_depth(text: str, path: str | os.PathLike[str]) -> None:
    """Before the parser recurses: counts brackets outside of strings."""
    depth, in_string, escaped = 0, False, False
    for at, char in enumerate(text):
        if in_string:
            in_string, escaped = escaped or char != '"', not escaped and char == "\\"
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                offset = len(text[:at].encode())
                raise FormatError(path, offset, f"expected JSON nested at most {MAX_DEPTH} deep, this is deeper")
        elif char in "]}":
            depth -= 1


class Section:
    """One object of a config.json. Keys are taken out one by one; `finish` refuses whatever nobody took.

    Args:
      values: the object.
      source: the file, for errors.
      name: its place in the file, "" at the top, else for example "text_config".
    """

    def __init__(self, values: Any, source: str, name: str = ""):
        self.source, self.name = source, name
        if not isinstance(values, Mapping):
            raise self.error("", f"expected a JSON object, got {_shown(values)}")
        if not all(isinstance(key, str) for key in values):
            raise self.error("", f"expected text as keys, got {_shown(list(values))}")
        self._left = dict(values)

    def path(self, key: str) -> str:
        return ".".join(part for part in (self.name, key) if part)

    def error(self, key: str, rule: str) -> ConfigError:
        return ConfigError(": ".join(part for part in (self.source, self.path(key), rule) if part))

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._left.get(key) is not None

    def take(self, key: str, default: Any = None) -> Any:
        """The value as it is; `default` if the key is absent or null."""
        value = self._left.pop(key, None)
        return default if value is None else value

    def present(self, key: str) -> bool:
        """Whether the key is there, even if null."""
        return key in self._left

    def nullable(self, key: str, default: Any) -> Any:
        """The value, None for null, `default` only if the key is absent."""
        return self._left.pop(key, default)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, got {_shown(value)}")
        return value

    def whole(self, key: str, default: int | None, low: int, high: int) -> int | None:
        """A whole number in low..high; `default` if the key is absent or null."""
        value = self.take(key, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"expected a whole number in {low}..{high}, got {_shown(value)}")
        return value

    def section(self, key: str) -> Section:
        """The object below a key; an error if there is none."""
        if not self.has(key):
            raise self.error(key, "missing; expected a JSON object")
        return Section(self.take(key), self.source, self.path(key))

    def only(self, key: str, *allowed: Any, why: str) -> None:
        """A key that must have one of the values, if it is there at all."""
        value = self.take(key)
        if value is not None and not any(
            value == ok and isinstance(value, bool) == isinstance(ok, bool) for ok in allowed
        ):
            raise self.error(key, f"expected {' or '.join(map(repr, allowed))}, got {_shown(value)}; {why}")

    def finish(self, ignored: Iterable[str]) -> None:
        unknown = sorted(set(self._left) - set(ignored))
        if unknown:
            names = ", ".join(self.path(key)[:80] for key in unknown[:20])
            raise ConfigError(
                f"{self.source}: unknown key {names}: it may change what the model computes, so it is refused. "
                f"Remove it from the file if it does not."
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
