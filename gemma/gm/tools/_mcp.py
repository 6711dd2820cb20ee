# SPDX-License-Identifier: Apache-2.0
"""`McpServer`: the tools of a Model Context Protocol server, as tools of gemmakit. Needs the extra `[tools]`.

The server is a program that is started here and talks over its standard input and output. The protocol is the `mcp`
package's; it runs in an event loop of its own, in a thread of its own, so that callers need no async code. What a
server says is bounded and becomes plain text and pictures. The loop of model and tools is `gm.text.ToolSampler`.
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import binascii
import concurrent.futures
import importlib.util
import json
import os
import tempfile
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from gemma.errors import DependencyError, ToolError
from gemma.gm.tools._tools import Example, Tool, ToolOutput
from gemma.image import read_image

_MAX_TOOLS = 500
_MAX_PAGES = 50
_MAX_TEXT = 2000  # characters of a description
_GRACE = 5.0  # seconds that an answer may come after its own timeout


class McpServer:
    """Starts a server and offers its tools.

      with gm.tools.McpServer(["python", "weather_server.py"]) as server:
          sampler = gm.text.ToolSampler(model=model, params=params, tools=[gm.tools.Calculator(), *server.tools])
          sampler.chat("Will it rain in Lyon?")

    The program runs with the rights of this process: start only servers that you trust with them. It ends with `close`,
    with the `with` block, or with this process.

    Attributes:
      tools: the server's tools, as they were when it started.
    """

    def __init__(
        self,
        command: str | Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        timeout: float = 30.0,
        start_timeout: float = 30.0,
        prefix: str = "",
    ):
        """Starts the server and asks it for its tools.

        Args:
          command: the program and its arguments; a str is the program alone, no shell reads it.
          env: variables for the server, beside the few that every program needs; the others of this process are not
            handed on.
          cwd: the folder that it runs in.
          timeout: seconds that a call may take.
          start_timeout: seconds until the list of tools must be there.
          prefix: put before the names of the tools, to tell two servers apart.

        Raises:
          DependencyError: the package `mcp` is not installed.
          ToolError: (a ValueError) the program does not start, is no such server, or takes too long.
        """
        if importlib.util.find_spec("mcp") is None:
            raise DependencyError("mcp", "tools", "using an MCP server")
        command = [command] if isinstance(command, str) else list(command)
        if not command or not all(isinstance(part, str) for part in command):
            raise ToolError(f"command: expected the program and its arguments as texts, got {command!r:.80}")
        if not (timeout > 0 and start_timeout > 0):
            raise ToolError(f"expected timeouts above 0 seconds, got {timeout} and {start_timeout}")
        self._command, self._timeout = command, timeout
        self._session: Any = None
        self._stop: asyncio.Event | None = None
        self._task: asyncio.Task | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: concurrent.futures.Future[list[dict]] = concurrent.futures.Future()
        self._closed = False
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._live(env, cwd, log.fileno())), name=f"mcp {command[0]}", daemon=True
            )
            self._thread.start()
            atexit.register(self.close)
            try:
                listed = self._ready.result(start_timeout)
            except concurrent.futures.TimeoutError as error:
                self.close()
                raise ToolError(self._complaint(f"no answer within {start_timeout:g} seconds", log)) from error
            except Exception as error:  # the protocol's, the system's: whatever kept it from starting
                self.close()
                raise ToolError(self._complaint(_reason(error), log)) from error
        self.tools: list[Tool] = [_McpTool(self, tool, prefix) for tool in listed]

    def __enter__(self) -> McpServer:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server. Calling it again does nothing."""
        self._closed = True
        atexit.unregister(self.close)
        if self._loop is not None and self._thread.is_alive():
            # Before the session stands, nothing waits for the event: what is under way is cancelled.
            self._loop.call_soon_threadsafe(self._task.cancel if self._session is None else self._stop.set)
        self._thread.join(_GRACE * 2)

    def call(self, name: str, arguments: Mapping[str, Any]) -> ToolOutput:
        """Calls a tool by the server's own name for it.

        Raises:
          ToolError: (a ValueError) the tool says that it failed, took too long, or the server is gone.
        """
        if self._closed or self._loop is None or not self._thread.is_alive():
            raise ToolError(f"the server {self._command[0]} is not running any more")
        future = asyncio.run_coroutine_threadsafe(self._call(name, dict(arguments)), self._loop)
        try:
            result = future.result(self._timeout + _GRACE)
        except (TimeoutError, concurrent.futures.TimeoutError) as error:
            future.cancel()
            raise ToolError(f"no answer within {self._timeout:g} seconds") from error
        except (Exception, concurrent.futures.CancelledError) as error:  # the protocol's classes, or a closing loop
            raise ToolError(f"the server {self._command[0]} answers with an error: {_reason(error)}") from error
        return _output(result)

    # --- in the thread of the event loop

    async def _live(self, env, cwd, log: int) -> None:
        from mcp import ClientSession, StdioServerParameters
        from mcp.client.stdio import stdio_client

        self._task, self._stop, self._loop = asyncio.current_task(), asyncio.Event(), asyncio.get_running_loop()
        try:
            server = StdioServerParameters(
                command=self._command[0], args=self._command[1:], env=dict(env) if env else None, cwd=cwd
            )
            with os.fdopen(os.dup(log), "w") as errors:
                async with stdio_client(server, errlog=errors) as (read, write), ClientSession(read, write) as session:
                    await session.initialize()
                    listed = await _list_tools(session)
                    self._session = session
                    self._ready.set_result(listed)
                    await self._stop.wait()
        except BaseException as error:  # also groups of exceptions and cancellation: the caller waits for a word
            if not self._ready.done():
                self._ready.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
            elif not isinstance(error, Exception):
                raise

    async def _call(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        result = await asyncio.wait_for(self._session.call_tool(name, arguments), self._timeout)
        return result.model_dump(by_alias=True, mode="json")

    def _complaint(self, reason: str, log) -> str:
        log.seek(0)
        said = log.read()[-500:].strip()
        said = f"; it wrote: {said}" if said else ""
        return f"the MCP server {' '.join(self._command)[:200]!r} cannot be used: {reason}{said}"


class _McpTool(Tool):
    """One tool of a server."""

    DESCRIPTION = ""  # by instance
    EXAMPLE = Example(query="", tool_kwargs={}, tool_kwargs_doc={}, result="", answer="")

    def __init__(self, server: McpServer, listed: Mapping[str, Any], prefix: str):
        self._server, self._own_name = server, listed["name"]
        self.name = prefix + self._own_name
        self.DESCRIPTION = " ".join((listed.get("description") or self._own_name).split())[:_MAX_TEXT]
        self._schema = listed.get("inputSchema") or {}
        self.EXAMPLE = Example(query="", tool_kwargs={}, tool_kwargs_doc=_document(self._schema), result="", answer="")
        self.KEYWORDS = tuple({word.strip(".,:;()").casefold() for word in self.DESCRIPTION.split() if len(word) > 3})
        self.tool_argnames = tuple(self.EXAMPLE.tool_kwargs_doc)

    def call(self, /, **kwargs) -> ToolOutput:  # an argument may be called self
        missing = [name for name in self._schema.get("required") or () if name not in kwargs]
        if missing:
            names = ", ".join(self.tool_argnames) or "none"
            raise ToolError(f"missing argument: {', '.join(missing)}; its arguments are: {names}")
        return self._server.call(self._own_name, kwargs)


async def _list_tools(session: Any) -> list[dict[str, Any]]:
    from mcp.types import PaginatedRequestParams

    found: list[dict[str, Any]] = []
    ask: Callable[[Any], Awaitable[Any]] = lambda params: session.list_tools(params=params)  # noqa: E731 - for the type
    params = None
    for _ in range(_MAX_PAGES):
        page = (await ask(params)).model_dump(by_alias=True, mode="json")
        found += page["tools"]
        if not page.get("nextCursor") or len(found) > _MAX_TOOLS:
            break
        params = PaginatedRequestParams(cursor=page["nextCursor"])
    if len(found) > _MAX_TOOLS:
        raise ToolError(f"it offers more than {_MAX_TOOLS} tools")
    return found


def _document(schema: Mapping[str, Any]) -> dict[str, str]:
    """Each argument with what may stand there, in a few words."""
    required = schema.get("required") or ()
    out = {}
    for name, about in (schema.get("properties") or {}).items():
        about = about if isinstance(about, Mapping) else {}
        kind = " OR ".join(map(json.dumps, about["enum"])) if "enum" in about else about.get("type", "any")
        told = " ".join(str(about.get("description") or "").split())
        text = f"{kind if isinstance(kind, str) else json.dumps(kind)}{': ' if told else ''}{told}"
        out[name] = f"<{text[:300]}{'' if name in required else ', may be left out'}>"
    return out


def _output(result: Mapping[str, Any]) -> ToolOutput:
    """Texts joined, pictures decoded; what is neither is named."""
    texts, images = [], []
    for part in result.get("content") or ():
        kind = part.get("type")
        if kind == "text":
            texts.append(part["text"])
        elif kind == "image":
            images.append(_picture(part, len(images)))
        elif kind == "resource" and "text" in part.get("resource", {}):
            texts.append(part["resource"]["text"])
        else:
            texts.append(f"({kind} left out)")
    if not texts and not images and result.get("structuredContent") is not None:
        texts.append(json.dumps(result["structuredContent"], ensure_ascii=False))
    text = "\n".join(texts)
    if result.get("isError"):
        raise ToolError(text or "the tool failed, and does not say why")
    return ToolOutput(text=text, images=images or None)


def _picture(part: Mapping[str, Any], n: int):
    try:
        data = base64.b64decode(part["data"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ToolError(f"image {n} of the answer is not base64: {error}") from error
    return read_image(data, name=f"image {n} of the answer")


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
