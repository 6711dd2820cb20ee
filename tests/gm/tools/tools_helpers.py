# SPDX-License-Identifier: Apache-2.0
"""Small tools that several files here use."""

import json

from gemma.gm.tools import Example, Tool, ToolOutput


def example(**arguments):
    return Example(
        query="q?",
        thought="t",
        tool_kwargs=arguments,
        tool_kwargs_doc={k: f"<{k}>" for k in arguments},
        result="r",
        answer="a",
    )


class Echo(Tool):
    DESCRIPTION = "Says what it was told."
    EXAMPLE = example(text="hello")
    KEYWORDS = ("repeat",)

    def call(self, text: str, times: int = 1):
        return text * times


class Scripted(Tool):
    """Does what it was made with: returns a value, or raises it."""

    DESCRIPTION = "Does what it was made with."
    EXAMPLE = example()

    def __init__(self, result, name="scripted"):
        self.result, self.name = result, name
        self.calls = 0

    def call(self):
        self.calls += 1
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result() if callable(self.result) else self.result


def call(name: str, /, **arguments) -> str:
    return json.dumps({"tool_name": name, **arguments})


__all__ = ["Echo", "Scripted", "ToolOutput", "call", "example"]
