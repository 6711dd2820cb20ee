# SPDX-License-Identifier: Apache-2.0
"""A small MCP server of the `mcp` package, started by test_mcp.py. Its tools answer, fail, hang, die and show pictures."""

import base64
import io
import os
import sys
import time

from mcp.server import MCPServer
from mcp.types import ImageContent, TextContent
from PIL import Image

server = MCPServer("gemmakit-test")


@server.tool()
def add(a: int, b: int = 2) -> int:
    """Adds two
    numbers."""
    return a + b


@server.tool()
def fail(text: str) -> str:
    """Fails."""
    raise ValueError(text)


@server.tool()
def sleep(seconds: float) -> str:
    """Sleeps."""
    time.sleep(seconds)
    return "slept"


@server.tool()
def die() -> str:
    """Ends the server."""
    os._exit(3)


@server.tool()
def variable(name: str) -> str:
    """Reads a variable of the environment."""
    return os.environ.get(name, "(unset)")


@server.tool()
def picture(broken: bool = False) -> list[ImageContent | TextContent]:
    """Shows a picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (1, 2, 3)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()[: 20 if broken else None]).decode()
    return [TextContent(type="text", text="here"), ImageContent(type="image", data=data, mimeType="image/png")]


if __name__ == "__main__":
    print("the server says hello", file=sys.stderr)
    server.run("stdio")
