# SPDX-License-Identifier: Apache-2.0
"""`OfflineToolSearch`: a tool that finds other tools by keyword and registers them in the running conversation."""

from __future__ import annotations

import dataclasses

from gemma.errors import ToolError
from gemma.gm.tools._manager import format_tool_instructions
from gemma.gm.tools._tools import Example, Tool, ToolOutput, checked_tools

_MAX_QUERY = 1000  # characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfflineToolSearch(Tool):
    """Finds tools among a given list, so that only those in use take room in the prompt. Needs no network.

      gm.tools.OfflineToolSearch(tools=[gm.tools.Calculator(), gm.tools.FileExplorer(root="notes")])

    Attributes:
      tools: what can be found, by `Tool.KEYWORDS` and by name.
    """

    tools: list[Tool]

    DESCRIPTION = "Finds further tools by keyword. A tool that was found can be called from then on."
    EXAMPLE = Example(
        query="How tall is the Eiffel tower in feet?",
        thought="A tool that converts units would help.",
        tool_kwargs={"query": "units"},
        tool_kwargs_doc={"query": "<KEYWORDS>"},
        result="1 tool can be called now: ...",
        answer="The unit tool can be called now.",
    )
    KEYWORDS = ("search", "tools")

    def __post_init__(self):
        object.__setattr__(self, "tools", checked_tools(self.tools))

    def call(self, query: str) -> str | ToolOutput:
        """Registers the tools that a word of the query names.

        Args:
          query: words; one matches a tool if it contains one of its keywords or its name, in any case.
        """
        if not isinstance(query, str) or len(query) > _MAX_QUERY:
            raise ToolError(f"query: expected keywords, a text of at most {_MAX_QUERY} characters")
        words = query.casefold().split()
        found = [tool for tool in self.tools if _matches(words, (*tool.KEYWORDS, tool.name))]
        if not found:
            return "No tool was found. Try other keywords, or answer without a tool."
        names = {tool.name for tool in found}
        count = "1 tool" if len(found) == 1 else f"{len(found)} tools"
        return ToolOutput(
            text=f"{count} can be called now:\n\n" + "\n".join(format_tool_instructions(tool) for tool in found),
            update_tools=lambda tools: [tool for tool in tools if tool.name not in names] + found,
        )


def _matches(words: list[str], tags: tuple[str, ...]) -> bool:
    return any(tag.casefold() in word for word in words for tag in tags)
