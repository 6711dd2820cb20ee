# SPDX-License-Identifier: Apache-2.0
"""Tools: a model that calls a calculator, looks into a folder, and uses a tool of your own.

    python examples/tools.py                                     what happens to the calls of a scripted model
    python examples/tools.py --model PATH "What is 12 * 34?"     a real one: a folder or a GGUF file, or `demo`

Small models that were not trained on instructions, `demo` among them, will rarely write a call; the scripted
conversation shows what would happen if they did, and how a broken call is explained to the model.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from pathlib import Path

from gemma import gm


class DateTime(gm.tools.Tool):
    """A tool of your own: a description, one example, and `call`."""

    DESCRIPTION = "Tells the current date and time."
    EXAMPLE = gm.tools.Example(
        query="Which day is it?",
        thought="The datetime tool knows.",
        tool_kwargs={"format": "%A"},
        tool_kwargs_doc={"format": "<FORMAT OF strftime>"},
        result="Sunday",
        answer="It is Sunday.",
    )
    KEYWORDS = ("time", "date", "day")

    def call(self, format: str) -> str:
        return datetime.datetime(2026, 11, 1, 12, 30).strftime(format)  # a fixed day, so that the output is too


def tools(folder: str | Path) -> list[gm.tools.Tool]:
    """A calculator, one folder to read, and a search that brings in `DateTime` when it is needed."""
    return [
        gm.tools.Calculator(),
        gm.tools.FileExplorer(root=folder),
        gm.tools.OfflineToolSearch(tools=[DateTime()]),
    ]


SCRIPT = [
    '{"tool_name": "calculator", "expression": "25 * 4 + 10"}',
    '{"tool_name": "calculator", "expression": "9**9**9"}',
    "{'tool_name': 'calculator', 'expression': '1 + 1'}",
    '{"tool_name": "fileexplorer", "method": "ls", "path": "."}',
    '{"tool_name": "fileexplorer", "method": "cat", "path": "../secret.txt"}',
    '{"tool_name": "datetime", "format": "%A"}',
    '{"tool_name": "offlinetoolsearch", "query": "date"}',
    '{"tool_name": "datetime", "format": "%A"}',
    "It is Sunday, and 25 times 4 plus 10 is 110.",
]


def scripted(folder: str | Path) -> None:
    """Carries out what a model might say, and prints what it would be told."""
    manager = gm.tools.OneShotToolManager(tools=tools(folder))
    for said in SCRIPT:
        print(f"model: {said}")
        output = manager.maybe_execute_tool(said)
        if output is not None:
            print(f"tools: {output.text}")


def ask(model: str, question: str, folder: str | Path, max_new_tokens: int) -> str:
    """The same tools in the hands of a model."""
    loaded = gm.text.load_model(model)
    sampler = gm.text.ToolSampler(
        model=loaded.model,
        params=loaded.params,
        tokenizer=loaded.tokenizer,
        tools=tools(folder),
        max_tool_calls=4,
        cache_length=2048,
        print_stream=True,
    )
    answer = sampler.chat(question, max_new_tokens=max_new_tokens)
    print()
    return answer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is 25 times 4 plus 10?")
    parser.add_argument("--model", help="a folder, a GGUF file, or demo; without it, a scripted conversation")
    parser.add_argument("--folder", help="what the file explorer may read; without it, a temporary folder")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "shopping.txt").write_text("milk, bread\n")
        folder = chosen.folder or temporary
        if chosen.model is None:
            scripted(folder)
        else:
            ask(chosen.model, chosen.question, folder, chosen.max_new_tokens)


if __name__ == "__main__":
    main()
