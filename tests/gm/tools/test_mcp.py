# SPDX-License-Identifier: Apache-2.0
"""MCP servers as tools, with a real server of the `mcp` package in a process of its own."""

import os
import sys
import threading
from pathlib import Path

import pytest
from tools_helpers import Echo, call

from gemma.errors import DependencyError, ToolError
from gemma.gm.tools import McpServer, OneShotToolManager

pytest.importorskip("mcp", reason="the extra [tools]")
SERVER = [sys.executable, str(Path(__file__).with_name("mcp_test_server.py"))]


@pytest.fixture(scope="module")
def server():
    with McpServer(SERVER, env={"GIVEN": "yes"}, timeout=20, prefix="my_", start_timeout=60) as server:
        yield server


@pytest.fixture
def manager(server):
    return OneShotToolManager(tools=[Echo(), *server.tools])


def say(manager, name, /, **arguments):
    return manager.maybe_execute_tool(call(name, **arguments))


def test_the_model_is_told_of_the_tools(manager):
    prompt = manager.system_prompt
    assert "**my_add**\nDescription: Adds two numbers.\n" in prompt
    assert call("my_add", a="<integer>", b="<integer, may be left out>") in prompt
    assert {"echo", "my_add", "my_fail", "my_sleep", "my_die", "my_variable", "my_picture"} == set(manager.name_to_tool)


def test_calls(manager):
    assert say(manager, "my_add", a=2, b=3).text == "[Tool result: 5]"
    assert say(manager, "my_add", a=2).text == "[Tool result: 4]"
    assert say(manager, "my_add", a="2").text == "[Tool result: 4]"  # the server's own idea of a number


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("my_add", {}, "missing argument: a; its arguments are: a, b"),
        ("my_add", {"a": "many"}, "integer"),
        ("my_fail", {"text": "x"}, "fail"),
        ("my_picture", {"broken": True}, "image 0 of the answer: "),
    ],
)
def test_failures_are_told(manager, name, arguments, match):
    text = say(manager, name, **arguments).text
    assert text.startswith("[Tool error: ") and match in text


def test_pictures(manager):
    output = say(manager, "my_picture")
    assert output.text == "[Tool result: here]"
    assert [image.tolist() for image in output.images] == [[[[1, 2, 3]] * 4] * 3]


def test_the_server_gets_only_the_variables_it_is_given(manager, monkeypatch):
    assert say(manager, "my_variable", name="GIVEN").text == "[Tool result: yes]"
    assert say(manager, "my_variable", name="GEMMA_CACHE_DIR").text == "[Tool result: (unset)]"


def test_a_slow_call_a_death_and_the_end():
    with McpServer(SERVER, timeout=0.5, start_timeout=60) as server:
        tools = {tool.name: tool for tool in server.tools}
        with pytest.raises(ToolError, match="no answer within 0.5 seconds"):
            tools["sleep"].call(seconds=60)
        with pytest.raises(ToolError, match="answers with an error|no answer|not running"):
            tools["die"].call()
        with pytest.raises(ToolError, match="answers with an error|no answer|not running"):
            tools["add"].call(a=1)
    with pytest.raises(ToolError, match="not running any more"):
        tools["add"].call(a=1)
    server.close()  # twice is no error
    assert not [t.name for t in threading.enumerate() if t is server._thread]


def test_servers_that_do_not_start():
    for command, match in (
        (["no-such-program-anywhere"], "No such file"),
        ([sys.executable, "-c", "import sys; sys.exit('no licence')"], "it wrote: no licence"),
        ([], "command: expected"),
        ([sys.executable, 5], "command: expected"),
    ):
        with pytest.raises(ToolError, match=match):
            McpServer(command, start_timeout=20)
    with pytest.raises(ToolError, match="above 0"):
        McpServer(SERVER, timeout=0)


def test_a_server_that_says_nothing_is_ended(tmp_path):
    script = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    with pytest.raises(ToolError, match="no answer within 1.5 seconds"):
        McpServer([sys.executable, "-c", script], start_timeout=1.5)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r'mcp.*pip install "gemmakit\[tools\]"'):
        McpServer(SERVER)
