# SPDX-License-Identifier: Apache-2.0
"""Between the model's text and the tools: what the model is told about them, and what happens when it calls one.

Whatever a model or a tool does wrong becomes a text for the model: a broken call, an unknown tool, wrong arguments, an
exception, a tool that does not return. Nothing is evaluated. The loop of model and tools is `gm.text.ToolSampler`;
finding the call in the text is `_calls.py`.
"""

from __future__ import annotations

import abc
import contextvars
import dataclasses
import functools
import inspect
import json
import re
import threading
from collections.abc import Mapping
from typing import Any

from gemma.errors import GemmaError, ToolError
from gemma.gm.tools import _calls
from gemma.gm.tools._tools import Example, Tool, ToolOutput, checked_tools

_INSTRUCTIONS = """\
You can call tools. To call one, end your message with a single line of JSON in the tool's call format, and nothing
after it. The next message then begins with `[Tool result: ` (or `[Tool error: `) and holds what the tool said; never
write such a line yourself. One call per message. When you know enough, answer in plain words without JSON.

These are the tools:

"""
_REQUEST = "\nThis is the request:\n\n"

# What terminals obey: escape sequences, and control characters other than newline and tab.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolManagerBase(abc.ABC):
    """Holds the tools of one conversation. Subclass it for another way of telling models about tools.

    Attributes:
      tools: the tools that can be called now.
    """

    tools: list[Tool]

    @property
    @abc.abstractmethod
    def system_prompt(self) -> str:
        """What is put before the first message of the user."""

    @abc.abstractmethod
    def maybe_execute_tool(self, model_output: str) -> ToolOutput | None:
        """Carries out the call in the model's text; None where there is none."""

    @functools.cached_property
    def name_to_tool(self) -> dict[str, Tool]:
        return {tool.name: tool for tool in self.tools}

    def update_tools(self, tools: list[Tool]) -> None:
        """Replaces the tools, from now on."""
        object.__setattr__(self, "tools", tools)
        self.__dict__.pop("name_to_tool", None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneShotToolManager(ToolManagerBase):
    """Shows the model one example of each tool; calls are one JSON object with "tool_name" and the arguments.

    Attributes:
      timeout: seconds that a call may take. A tool that takes longer is left behind in its (daemon) thread, and refused
        as long as that thread lives: Python cannot stop it.
      max_chars: longer results are cut, with a mark.
    """

    timeout: float = 60.0
    max_chars: int = 20_000
    _running: dict[str, threading.Thread] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "tools", checked_tools(self.tools))
        if not self.timeout > 0 or self.max_chars < 1:
            raise ToolError(f"expected timeout and max_chars above 0, got {self.timeout} and {self.max_chars}")

    @property
    def system_prompt(self) -> str:
        if not self.tools:
            return ""
        return _INSTRUCTIONS + "\n".join(format_tool_instructions(tool) for tool in self.tools) + _REQUEST

    def maybe_execute_tool(self, model_output: str) -> ToolOutput | None:
        """Carries out the first call in the model's text.

        Returns:
          None where the text holds no call. Else what to tell the model, as `[Tool result: ...]` or `[Tool error: ...]`,
          with the tool's images. Never raises for what the model or a tool did.
        """
        call = _calls.find_call(model_output)
        if call is None:
            return None
        if isinstance(call, _calls.Malformed):
            return self._error(f"this is not a tool call: {call.reason}. {self._format_hint()}")
        tool = self._tool(call.name)
        if tool is None:
            names = ", ".join(self.name_to_tool) or "none"
            return self._error(f"Unknown (or unregistered) tool: {call.name[:80]!r}. The tools are: {names}.")
        try:
            output = self._run(tool, call.arguments)
            if output.update_tools is not None:
                self.update_tools(checked_tools(output.update_tools(list(self.tools)), "update_tools"))
        except Exception as error:  # a tool's author decides what it raises; the model gets to read it
            cause = str(error) if isinstance(error, GemmaError) else f"{type(error).__name__}: {error}"
            return self._error(f"{tool.name}: {cause}")
        note = " (Only the first call was carried out: one per message.)" if call.more else ""
        return dataclasses.replace(output, text=f"[Tool result: {self._clean(output.text)}]{note}", update_tools=None)

    def _tool(self, name: str) -> Tool | None:
        if name in self.name_to_tool:
            return self.name_to_tool[name]
        same = [tool for known, tool in self.name_to_tool.items() if known.casefold() == name.strip().casefold()]
        return same[0] if len(same) == 1 else None

    def _run(self, tool: Tool, arguments: Mapping[str, Any]) -> ToolOutput:
        """Calls the tool in a thread of its own, for as long as `timeout` allows."""
        _check_arguments(tool, arguments)
        earlier = self._running.get(tool.name)
        if earlier is not None and earlier.is_alive():
            raise ToolError("it is still busy with an earlier call; answer without it")
        outcome: list[Any] = []

        def work():
            try:
                outcome.append((True, tool.call(**arguments)))
            except BaseException as error:  # SystemExit included: it must not end in a silent thread
                outcome.append((False, error))

        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(work,), name=f"tool {tool.name}", daemon=True)
        self._running[tool.name] = thread
        thread.start()
        thread.join(self.timeout)
        if not outcome:
            raise ToolError(f"it did not return within {self.timeout:g} seconds; try something smaller")
        del self._running[tool.name]
        succeeded, value = outcome[0]
        if not succeeded:
            raise value if isinstance(value, Exception) else ToolError(f"{type(value).__name__}: {value}")
        return _as_output(value)

    def _error(self, text: str) -> ToolOutput:
        return ToolOutput(text=f"[Tool error: {self._clean(text)}]")

    def _clean(self, text: str) -> str:
        """Text that neither fills the context nor moves a terminal's cursor; markers in it are plain text later on."""
        if len(text) > self.max_chars:
            text = f"{text[: self.max_chars]} [... {len(text) - self.max_chars} characters left out]"
        return _CONTROL.sub("", text)

    def _format_hint(self) -> str:
        if not self.tools:
            return "There are no tools: answer in plain words."
        tool = self.tools[0]
        example = format_call(tool.name, tool.EXAMPLE.tool_kwargs or tool.EXAMPLE.tool_kwargs_doc)
        return f"A call is one line such as {example} and nothing after it."


# --- checks and texts


def _check_arguments(tool: Tool, arguments: Mapping[str, Any]) -> None:
    signature = inspect.signature(tool.call)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        names = ", ".join(signature.parameters) or "none"
        raise ToolError(f"{error}; its arguments are: {names}") from error


def _as_output(value: Any) -> ToolOutput:
    if isinstance(value, ToolOutput):
        if not isinstance(value.text, str):
            raise ToolError(f"expected a ToolOutput whose text is a str, got {type(value.text).__name__}")
        return value
    if isinstance(value, (str, int, float)):
        return ToolOutput(text=str(value))
    raise ToolError(f"expected it to return a str or a ToolOutput, got {type(value).__name__}")


def format_tool_instructions(tool: Tool) -> str:
    """What the model is told about one tool: description, call format, example."""
    lines = [f"**{tool.name}**", f"Description: {tool.DESCRIPTION}"]
    lines.append(f"Call format: {format_call(tool.name, tool.EXAMPLE.tool_kwargs_doc)}")
    if tool.EXAMPLE.query:
        lines += ["Example:", *_example_lines(tool.name, tool.EXAMPLE)]
    return "\n".join(lines) + "\n"


def _example_lines(name: str, example: Example) -> list[str]:
    thought = [example.thought] if example.thought else []
    call = format_call(name, example.tool_kwargs)
    return [f"User: {example.query}", "Model:", *thought, call, f"[Tool result: {example.result}]", example.answer]


def format_call(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as the model should write it."""
    return json.dumps({_calls.KEY: name, **arguments}, ensure_ascii=False)
