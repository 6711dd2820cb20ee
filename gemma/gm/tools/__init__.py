# SPDX-License-Identifier: Apache-2.0
"""Tools that a model may call while it answers: the base class, ready-made ones, MCP servers, the manager."""

from gemma._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "_tools": ["Tool", "ToolOutput", "Example"],
        "_manager": ["ToolManagerBase", "OneShotToolManager"],
        "_calculator": ["Calculator"],
        "_file_explorer": ["FileExplorer"],
        "_offline_tool_search": ["OfflineToolSearch"],
        "_mcp": ["McpServer"],
    },
)
