# SPDX-License-Identifier: Apache-2.0
"""What a tool is: a subclass of `Tool` with a description, one worked example and `call`.

How calls are found in a model's text and carried out is `_manager.py`; nothing here runs anything.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from gemma.errors import ToolError


class Tool(abc.ABC):
    """Base class of tools.

      class DateTime(gm.tools.Tool):
          \"\"\"Tells the time.\"\"\"

          DESCRIPTION = "Tells the current date and time."
          EXAMPLE = gm.tools.Example(
              query="Which day is it?",
              thought="The `datetime` tool knows.",
              tool_kwargs={"format": "%A"},
              tool_kwargs_doc={"format": "<FORMAT OF strftime>"},
              result="Sunday",
              answer="It is Sunday.",
          )

          def call(self, format: str) -> str:
              return datetime.datetime.now().strftime(format)

    Attributes:
      DESCRIPTION: one or two sentences for the model.
      EXAMPLE: one use from question to answer, shown to the model.
      KEYWORDS: what `OfflineToolSearch` finds it by.
    """

    DESCRIPTION: ClassVar[str]
    EXAMPLE: ClassVar[Example]
    KEYWORDS: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def call(self, **kwargs) -> str | ToolOutput:
        """Does the work. The model's arguments come by keyword, and are whatever JSON it wrote: check them.

        An exception is told to the model as an error, so its message should say what to do better.
        """

    @functools.cached_property
    def name(self) -> str:
        """What the model calls it by: the class name in lower case."""
        return type(self).__name__.lower()

    @functools.cached_property
    def tool_argnames(self) -> tuple[str, ...]:
        """The names of `call`'s arguments."""
        return tuple(inspect.signature(self.call).parameters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolOutput:
    """What a tool gives back.

    Attributes:
      text: for the model.
      images: uint8 [N, H, W, C], or a list of [H, W, C], shown to the model after the text; it needs vision.
      update_tools: gets the list of the conversation's tools, returns the list that replaces it from now on.
    """

    text: str
    images: Any = None
    update_tools: Callable[[list[Tool]], list[Tool]] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One use of a tool, for the model to imitate.

    Attributes:
      query: what the user asks; empty: only the call format is shown.
      thought: why the tool is called.
      tool_kwargs: the arguments of the call.
      tool_kwargs_doc: the same keys, each with a description of what may stand there.
      result: what the tool says.
      answer: what the model then says.
    """

    query: str
    thought: str | None = None
    tool_kwargs: Mapping[str, Any]
    tool_kwargs_doc: Mapping[str, Any]
    result: str
    answer: str


def checked_tools(tools: Tool | Sequence[Tool], where: str = "tools") -> list[Tool]:
    """The tools as a list of their own, after checking that each is usable and no two share a name.

    Raises:
      ToolError: (a ValueError) with the position of the tool.
    """
    tools = [tools] if isinstance(tools, Tool) else tools
    if isinstance(tools, (str, bytes)) or not isinstance(tools, Sequence):
        raise ToolError(f"{where}: expected a list of gm.tools.Tool, got {type(tools).__name__}")
    seen: dict[str, int] = {}
    for n, tool in enumerate(tools):
        if not isinstance(tool, Tool):
            hint = " (an instance is needed: add the parentheses)" if isinstance(tool, type) else ""
            raise ToolError(f"{where}[{n}]: expected a gm.tools.Tool, got {tool!r:.80}{hint}")
        for attribute, kind in (("DESCRIPTION", str), ("EXAMPLE", Example)):
            if not isinstance(getattr(tool, attribute, None), kind):
                raise ToolError(f"{where}[{n}]: {type(tool).__name__}.{attribute} must be a {kind.__name__}")
        if tool.name in seen:
            raise ToolError(f"{where}[{n}]: the name {tool.name!r} is taken by {where}[{seen[tool.name]}]")
        seen[tool.name] = n
    return list(tools)
