# SPDX-License-Identifier: Apache-2.0
"""Messages of a row to turns: roles of every dialect, contents in parts, images, and calls of tools as text.

The rows' other columns are `_formats.py`. Tools are told and called in the words of `gm.tools`, so that a model trained
on such rows is at home in `gm.text.ToolSampler`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma import chat
from gemma.chat import Turn
from gemma.errors import DataError, PromptError
from gemma.gm.data._examples import IMAGE, Conversation, ImageRef

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "model",
    "model": "model",
    "gpt": "model",
    "chatgpt": "model",
    "bot": "model",
    "function_call": "call",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")  # of the four kinds that gemma.image reads


def text_of(value: Any, name: str, *, empty: bool = True) -> str:
    """A column that must be text."""
    if not isinstance(value, str):
        raise DataError(f"{name}: expected text, got {_name(value)}")
    if not empty and not value.strip():
        raise DataError(f"{name}: expected text, got none")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(f"{name}: not Unicode: a lone surrogate at character {error.start}") from None
    return value


def list_of(value: Any, name: str) -> list:
    """A column that must be a list; in tables it is written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{name}: expected a list, got text that is no valid JSON") from None
    if not isinstance(value, list):
        raise DataError(f"{name}: expected a list, got {_name(value)}")
    return value


def _name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), f"a {type(value).__name__}")


class Reader:
    """Reads the messages of one row. Holds the images that it met, in order.

    Args:
      folder: paths of images are relative to it.
      images: those of the row's own column; their markers are `<image>` or `<start_of_image>` in the users' texts.
    """

    def __init__(self, folder: Path, images: Sequence[Any] = ()):
        self._folder = folder
        self._column = [self.image(value, f"images[{n}]") for n, value in enumerate(images)]
        self._parts: list[ImageRef] = []

    def conversation(self, messages: Any, name: str, *, system: str = "", tools: Any = None) -> Conversation:
        """The row's conversation, checked: roles in order, at least one turn to learn from."""
        turns, mute = self.turns(messages, name)
        if system.strip():
            if turns and turns[0].role == "system":
                raise DataError("a system text came in a column and as a message: expected one of the two")
            turns, mute = [Turn("system", system), *turns], [n + 1 for n in mute]
        check_order(turns, name)
        learnt = [n for n, turn in enumerate(turns) if turn.role == "model" and n not in mute]
        if not learnt:
            raise DataError(f"{name}: no turn of the model to learn from")
        if any(not turns[n].content.strip() for n in learnt):
            raise DataError(f"{name}: a turn of the model is empty")
        turns, images = self.place(turns)
        return Conversation(turns, images, tools_of(tools), tuple(mute))

    def turns(self, messages: Any, name: str) -> tuple[list[Turn], list[int]]:
        """(turns, indices of those with `"weight": 0`)."""
        turns: list[Turn] = []
        mute, after_tool = [], False
        for n, message in enumerate(list_of(messages, name)):
            where = f"{name}[{n}]"
            if not isinstance(message, Mapping):
                raise DataError(f"{where}: expected an object with role and content, got {_name(message)}")
            role = role_of(message, where)
            text = self._content(message, role, where)
            if role == "tool":
                text, role = f"[Tool result: {text}]", "user"
                if after_tool:
                    turns[-1] = Turn("user", f"{turns[-1].content}\n{text}")
                    continue
                after_tool = True
            elif role == "user" and after_tool:
                turns[-1] = Turn("user", f"{turns[-1].content}\n\n{text}")
                after_tool = False
                continue
            else:
                role, after_tool = "model" if role == "call" else role, False
            if role == "model" and _weight(message, where) == 0:
                mute.append(len(turns))
            turns.append(Turn(role, text))
        return turns, mute

    def checked(self, messages: Any, name: str) -> list[Turn]:
        """The turns of messages in a legal order, with no images among them."""
        turns, _ = self.turns(messages, name)
        check_order(turns, name)
        if self._column or self._parts:
            raise DataError(f"{name}: images are read in conversations and completions only")
        return turns

    def image(self, value: Any, where: str) -> ImageRef:
        """A path that exists and looks like a picture, or the bytes of one."""
        if isinstance(value, Mapping):  # the form of Hugging Face's tables
            value = value.get("bytes") or value.get("path") or value.get("url")
        if isinstance(value, str) and value.startswith("data:"):
            head, _, body = value.partition(",")
            try:
                value = base64.b64decode(body, validate=True) if head.endswith(";base64") else None
            except (binascii.Error, ValueError):
                raise DataError(f"{where}: no valid base64 in the data: address") from None
        if isinstance(value, str) and "://" in value:
            raise DataError(f"{where}: {value[:80]!r} is a web address; nothing is fetched: download it first")
        if isinstance(value, bytes):
            begin, kept = value[:4], value
        elif isinstance(value, str) and value and "\0" not in value:
            path = self._folder / value
            kept = str(path)
            try:
                if path.exists() and not path.is_file():  # a pipe would be waited for, for ever
                    raise DataError(f"{where}: {kept}: expected a file, this is a folder, a pipe or a device")
                with open(path, "rb") as file:
                    begin = file.read(4)
            except OSError as error:
                raise DataError(f"{where}: {kept}: {error.strerror or error}") from None
            except UnicodeEncodeError:
                raise DataError(f"{where}: {kept!r} is no path: it holds a lone surrogate") from None
        else:
            raise DataError(f"{where}: expected the path of a picture, got {_name(value)}")
        if not begin.startswith(_MAGIC):
            raise DataError(f"{where}: expected a PNG, JPEG, WebP or GIF picture, its first bytes are {begin!r}")
        return kept

    def _content(self, message: Mapping, role: str, where: str) -> str:
        value = message.get("content", message.get("value"))
        calls = message.get("tool_calls") or []
        if calls and role != "model":
            raise DataError(f"{where}: only the assistant calls tools, not the {role}")
        if value is None and calls:
            text = ""
        elif isinstance(value, list):
            text = "".join(self._part(part, role, f"{where}.content[{n}]") for n, part in enumerate(value))
        else:
            text = text_of(value, f"{where}.content")
        if role == "call":
            text = _call(text, where)
        lines = [
            _call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(list_of(calls, f"{where}.tool_calls"))
        ]
        return "\n".join([*([text] if text.strip() or not lines else []), *lines])

    def _part(self, part: Any, role: str, where: str) -> str:
        if isinstance(part, str):
            return text_of(part, where).strip()
        if not isinstance(part, Mapping):
            raise DataError(f"{where}: expected text or an object with a type, got {_name(part)}")
        kind = part.get("type")
        if kind in ("text", "input_text", "output_text"):
            return text_of(part.get("text"), where).strip()  # as the official template: trimmed, joined by nothing
        if kind not in ("image", "image_url", "input_image"):
            raise DataError(f"{where}: expected a part of type text, image or image_url, got {kind!r:.40}")
        if role != "user":
            raise DataError(f"{where}: images belong to the user, not to the {role}")
        value = next((part[k] for k in ("image", "image_url", "path", "url", "data") if part.get(k) is not None), None)
        if value is None and len(self._parts) < len(self._column):
            value, own = self._column[len(self._parts)], True  # {"type": "image"}: the next one of the column
        else:
            own = False
        self._parts.append(value if own else self.image(value, where))
        return IMAGE

    def place(self, turns: list[Turn]) -> tuple[tuple[Turn, ...], tuple[ImageRef, ...]]:
        """Turns with one marker per image, and the images. With no marker at all they go before the first text."""
        if self._parts and self._column and len(self._parts) != len(self._column):
            raise DataError(f"{len(self._column)} images in the column, {len(self._parts)} in the messages")
        images = self._parts or self._column
        if not images:
            return tuple(turns), ()
        if not self._parts:
            turns = [Turn(t.role, t.content.replace("<image>", IMAGE)) if t.role == "user" else t for t in turns]
        marked = sum(turn.content.count(IMAGE) for turn in turns if turn.role == "user")
        if not marked:
            first = next(n for n, turn in enumerate(turns) if turn.role == "user")
            turns[first] = Turn("user", IMAGE * len(images) + turns[first].content)
        elif marked != len(images):
            raise DataError(f"{len(images)} images, but {marked} image markers in the users' texts")
        return tuple(turns), tuple(images)


def check_order(turns: Sequence[Turn], name: str) -> None:
    """User and model in alternation, the user first, after any system text."""
    try:
        chat.render(turns)
    except PromptError as error:
        raise DataError(f"{name}: {error}") from None


def role_of(message: Mapping, where: str) -> str:
    """ "system", "user", "model", "call" or "tool"."""
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise DataError(f"{where}.role: expected system, user, assistant or tool, got {role!r:.40}")
    return _ROLES[role.lower()]


def _weight(message: Mapping, where: str) -> int:
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"{where}.weight: expected 0 (read, not learnt) or 1, got {weight!r:.40}")
    return 1 if weight is None else int(weight)


# --- tools


def _call(call: Any, where: str) -> str:
    """A call as `gm.tools` has the model write it: one line of JSON."""
    from gemma.gm.tools._manager import format_call

    if isinstance(call, Mapping):
        call = call.get("function", call)
    try:
        call = json.loads(call) if isinstance(call, str) else call
        name, arguments = call["name"], call.get("arguments") or {}
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if isinstance(name, str) and name and isinstance(arguments, Mapping):
            return text_of(format_call(name, arguments), where)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass  # the message below says what is wanted
    raise DataError(f'{where}: expected a call such as {{"name": "f", "arguments": {{...}}}}, got {call!r:.80}')


def tools_of(tools: Any) -> tuple[Mapping[str, Any], ...] | None:
    """The functions of a row, in OpenAI's form, with or without the wrapper `{"type": "function", ...}`."""
    if tools is None or tools == "" or tools == []:
        return None
    found = []
    for n, tool in enumerate(list_of(tools, "tools")):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"tools[{n}]: expected a function with a name, got {tool!r:.80}")
        told = (function.get("description"), function.get("parameters"))
        if not isinstance(told[0], str | None) or not isinstance(told[1], Mapping | None):
            raise DataError(f"tools[{n}]: expected a description (text) and parameters (a JSON schema)")
        found.append(function)
    return tuple(found)


def tool_instructions(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the model is told before the first user's text, as `gm.text.ToolSampler` tells it."""
    from gemma.gm.tools import _manager

    return _manager._INSTRUCTIONS + "\n".join(_instructions(tool) for tool in tools) + _manager._REQUEST


def _instructions(tool: Mapping[str, Any]) -> str:
    from gemma.gm.tools._manager import format_call

    parameters = tool.get("parameters") or {}
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    properties = properties if isinstance(properties, Mapping) else {}
    arguments = {name: f"<{_told(value) or name.upper()}>" for name, value in properties.items()}
    description = tool.get("description") or ""
    return f"**{tool['name']}**\nDescription: {description}\nCall format: {format_call(tool['name'], arguments)}\n"


def _told(schema: Any) -> str:
    told = schema.get("description") or schema.get("type") if isinstance(schema, Mapping) else None
    return told if isinstance(told, str) else ""
