# SPDX-License-Identifier: Apache-2.0
"""Writes docs/cli.md from the --help of every command; --check only compares, and exits with 1 if it differs.

python scripts/gen_cli_docs.py [--check]
"""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

import typer

from gemma.cli import __main__ as program

PAGE = Path(__file__).resolve().parents[1] / "docs/cli.md"
WIDTH = 100
HEADER = """\
# The command line

Generated from the program's own help by `python scripts/gen_cli_docs.py`; edit the commands, not this page.

Output goes to standard output, everything else (progress, remarks, errors) to standard error. An error is one line,
`gemma: error: ...`, that says what to do. In a pipe nothing is coloured or wrapped.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed, or the answer is no: `fit` (does not fit), `doctor` (a problem was found) |
| 2 | the command or its input cannot be used: flags, prompt, file, model |
| 130 | interrupted by Ctrl-C |
| 141 | the reader of the output went away, as in `gemma ... \\| head -1` |
"""


def page() -> str:
    group = typer.main.get_command(program.app)
    parts = [HEADER, _section("gemma", group, None)]
    with group.make_context("gemma", [], resilient_parsing=True) as context:
        for name in group.list_commands(context):
            parts.append(_section(f"gemma {name}", group.get_command(context, name), context))
    return "\n".join(parts)


def _section(title: str, command, parent) -> str:
    name = title.rpartition(" ")[2]
    with command.make_context(name, [], parent=parent, resilient_parsing=True, terminal_width=WIDTH) as context:
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    return f"## {title}\n\n```text\n{text}\n```\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    new, old = page(), PAGE.read_text() if PAGE.exists() else ""
    if not check:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(new)
    elif new != old:
        sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), "docs/cli.md", "--help"))
        print("docs/cli.md is out of date: run python scripts/gen_cli_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
