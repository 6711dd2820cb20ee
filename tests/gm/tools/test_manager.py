# SPDX-License-Identifier: Apache-2.0
"""The manager: what the model is told of its tools, and that whatever goes wrong becomes a text for it."""

import threading

import numpy as np
import pytest
from tools_helpers import Echo, Scripted, call, example

from gemma import gm
from gemma.errors import DependencyError, ToolError
from gemma.gm.tools import Calculator, OfflineToolSearch, OneShotToolManager, Tool, ToolManagerBase, ToolOutput


def manager(*tools, **settings) -> OneShotToolManager:
    return OneShotToolManager(tools=list(tools), **settings)


def answer(tools, text) -> str:
    return manager(*tools).maybe_execute_tool(text).text


# --- the surface


def test_names_and_arguments():
    assert Echo().name == "echo" and Echo().tool_argnames == ("text", "times")
    assert Calculator().name == "calculator" and Calculator().tool_argnames == ("expression",)
    assert OfflineToolSearch(tools=[]).name == "offlinetoolsearch"


def test_a_dataclass_may_be_a_tool_as_in_the_official_package():
    import dataclasses

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Greeter(gm.tools.Tool):
        greeting: str
        DESCRIPTION = "Greets."
        EXAMPLE = example(who="you")

        def call(self, who: str) -> str:
            return f"{self.greeting}, {who}"

    assert answer([Greeter(greeting="Hail")], call("greeter", who="Ada")) == "[Tool result: Hail, Ada]"


def test_abstract_classes_stay_abstract():
    with pytest.raises(TypeError):
        Tool()
    with pytest.raises(TypeError):
        ToolManagerBase(tools=[])


def test_the_system_prompt_names_every_tool_its_arguments_and_an_example():
    prompt = manager(Echo(), Calculator()).system_prompt
    for part in ("**echo**", "**calculator**", Echo.DESCRIPTION, Calculator.DESCRIPTION, call("echo", text="<text>")):
        assert part in prompt
    assert call("calculator", expression="25 * 4 + 10") in prompt and "[Tool result: 110]" in prompt
    assert manager().system_prompt == ""


def test_plain_text_is_no_call():
    for text in ("The answer is 110.", '{"answer": 110}', ""):
        assert manager(Echo()).maybe_execute_tool(text) is None


def test_a_call_is_carried_out():
    assert answer([Echo()], "Thinking...\n" + call("echo", text="ab", times=2)) == "[Tool result: abab]"
    assert answer([Echo()], call("Echo", text="a")) == "[Tool result: a]"  # a slip of case
    assert answer([Echo()], call("echo", text=5)) == "[Tool result: 5]"  # numbers are text enough


def test_only_the_first_of_two_calls():
    text = answer([Echo()], call("echo", text="a") + call("echo", text="b"))
    assert text.startswith("[Tool result: a]") and "Only the first" in text


# --- what goes wrong becomes a text


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"tool_name": "echo", "text": ', "not complete"),
        ("{'tool_name': 'echo'}", "double quotes"),
        ('{"tool_name": "nothing"}', "Unknown (or unregistered) tool: 'nothing'. The tools are: echo."),
        (call("echo"), "missing a required argument: 'text'; its arguments are: text, times"),
        (call("echo", text="a", volume=3), "unexpected keyword argument 'volume'; its arguments are: text, times"),
        (call("echo", text={"a": 1}), "TypeError"),
        (call("echo", text=None), "TypeError"),
    ],
)
def test_wrong_calls(text, match):
    found = answer([Echo()], text)
    assert found.startswith("[Tool error: ") and match in found


@pytest.mark.parametrize(
    ("result", "match"),
    [
        (ValueError("no such city"), "ValueError: no such city"),
        (ToolError("no such city"), "scripted: no such city"),
        (DependencyError("sympy", "tools", "x"), 'pip install "gemmakit[tools]"'),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (RecursionError(), "RecursionError"),
        (None, "expected it to return a str or a ToolOutput, got NoneType"),
        ([1], "got list"),
        (ToolOutput(text=b"x"), "got bytes"),
        (ToolOutput(text="a", update_tools=lambda tools: 1 / 0), "ZeroDivisionError"),
        (ToolOutput(text="a", update_tools=lambda tools: [*tools, *tools]), "is taken"),
        (ToolOutput(text="a", update_tools=lambda tools: ["x"]), "expected a gm.tools.Tool"),
    ],
)
def test_tools_that_fail(result, match):
    tool = Scripted(result)
    held = manager(tool)
    found = held.maybe_execute_tool(call("scripted")).text
    assert found.startswith("[Tool error: scripted: ") and match in found
    assert held.tools == [tool]


def test_a_tool_that_never_returns():
    leave = threading.Event()
    stuck, other = Scripted(leave.wait), Echo()
    held = manager(stuck, other, timeout=0.2)
    assert "did not return within 0.2 seconds" in held.maybe_execute_tool(call("scripted")).text
    assert "still busy" in held.maybe_execute_tool(call("scripted")).text  # no second thread
    assert stuck.calls == 1
    assert held.maybe_execute_tool(call("echo", text="a")).text == "[Tool result: a]"
    leave.set()
    held._running["scripted"].join()
    assert held.maybe_execute_tool(call("scripted")).text == "[Tool result: True]"


@pytest.mark.parametrize("settings", [dict(timeout=0), dict(timeout=float("nan")), dict(max_chars=0)])
def test_limits_are_checked(settings):
    with pytest.raises(ToolError, match="above 0"):
        manager(Echo(), **settings)


def test_long_and_colourful_results_are_tamed():
    text = answer([Echo()], call("echo", text="x" * 30_000))
    assert len(text) < 20_100 and "[... 10000 characters left out]" in text
    assert answer([Echo()], call("echo", text="\x1b[31mred\x1b[0m\x07\x00\n\tok")) == "[Tool result: red\n\tok]"
    long_error = manager(Scripted(ValueError("y" * 10**6))).maybe_execute_tool(call("scripted")).text
    assert len(long_error) < 21_000


def test_results_are_never_parsed_as_calls():
    inner = call("echo", text="b")
    assert answer([Echo()], call("echo", text=inner)) == f"[Tool result: {inner}]"


# --- pictures, registration


def test_pictures_are_handed_on():
    picture = np.zeros((2, 3, 3), np.uint8)
    output = manager(Scripted(ToolOutput(text="seen", images=[picture]))).maybe_execute_tool(call("scripted"))
    assert output.text == "[Tool result: seen]" and output.images[0] is picture


def test_a_tool_may_register_and_remove_tools():
    register = Scripted(ToolOutput(text="done", update_tools=lambda tools: [*tools, Echo()]))
    held = manager(register)
    assert "Unknown" in held.maybe_execute_tool(call("echo", text="a")).text
    assert held.maybe_execute_tool(call("scripted")).text == "[Tool result: done]"
    assert held.maybe_execute_tool(call("echo", text="a")).text == "[Tool result: a]"
    held.update_tools([Echo()])
    assert "Unknown" in held.maybe_execute_tool(call("scripted")).text


def test_search_finds_registers_and_explains():
    held = manager(OfflineToolSearch(tools=[Echo(), Calculator()]))
    assert "**echo**" not in held.system_prompt
    assert "No tool was found" in held.maybe_execute_tool(call("offlinetoolsearch", query="weather")).text
    found = held.maybe_execute_tool(call("offlinetoolsearch", query="Do some MATHS")).text
    assert "1 tool can be called now" in found and "**calculator**" in found and "**echo**" not in found
    assert held.maybe_execute_tool(call("calculator", expression="6*7")).text == "[Tool result: 42]"
    both = held.maybe_execute_tool(call("offlinetoolsearch", query="repeat math")).text  # again: no duplicate
    assert "2 tools" in both and sorted(t.name for t in held.tools) == ["calculator", "echo", "offlinetoolsearch"]
    for query in (None, 5, ["math"], "x" * 5000):
        assert "query: expected keywords" in held.maybe_execute_tool(call("offlinetoolsearch", query=query)).text


@pytest.mark.parametrize(
    ("tools", "match"),
    [
        ([Echo], r"tools\[0\]: expected a gm.tools.Tool.*add the parentheses"),
        (["echo"], r"tools\[0\]"),
        ([Echo(), Echo()], r"tools\[1\]: the name 'echo' is taken by tools\[0\]"),
        ("echo", "expected a list"),
        (None, "expected a list"),
        ([type("Bare", (Tool,), {"call": lambda self: ""})()], "Bare.DESCRIPTION must be a str"),
        ([type("Half", (Tool,), {"call": lambda self: "", "DESCRIPTION": "d"})()], "Half.EXAMPLE must be a Example"),
    ],
)
def test_what_is_no_list_of_tools(tools, match):
    with pytest.raises(ToolError, match=match):
        OneShotToolManager(tools=tools)
    if tools is not None:
        with pytest.raises(ToolError, match=match):
            OfflineToolSearch(tools=tools)
