# SPDX-License-Identifier: Apache-2.0
"""`gemma tokenize`: the ids of a text with their names, as the model will see them. Loads no framework.

The tokenizer itself is `gemma/tokenizer.py`.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gemma.cli import _common
from gemma.cli._progress import waiting

HELP = """\
Show the tokens of a text, one per line: id and name.

Special tokens that are spelled out in the text, such as <start_of_turn>, are read as those tokens, as generate
does; --no-special reads them as plain text, as chat does. An empty text is allowed.

\b
Examples:
  gemma tokenize "The history of computing began"
  gemma tokenize --no-special "a literal <start_of_turn>"
  gemma tokenize --json - < prompt.txt
"""


def command(
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The text. - or a pipe: standard input.", show_default=False)
    ] = None,
    model: _common.Model = "demo",
    prompt_file: _common.PromptFile = None,
    special: Annotated[
        bool, typer.Option("--special/--no-special", help="Whether <bos> and the like are tokens, or plain text.")
    ] = True,
    bos: Annotated[bool, typer.Option("--bos/--no-bos", help="Whether to begin with <bos>, as generate does.")] = True,
    as_json: _common.Json = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    from gemma import hub
    from gemma.tokenizer import Tokenizer

    content = _common.read_text(text, prompt_file, "text")
    with waiting(f"reading {model}"):
        tokenizer = Tokenizer.from_file(hub.resolve(model))
    ids = tokenizer.encode(content, add_bos=bos, parse_special=special)
    named = [(i, tokenizer.piece(i), tokenizer.is_special(i)) for i in ids]
    if as_json:
        tokens = [{"id": i, "piece": piece, "special": is_special} for i, piece, is_special in named]
        _common.write(json.dumps({"count": len(ids), "ids": ids, "tokens": tokens}, ensure_ascii=False) + "\n")
        return
    rows = [(i, _visible(piece), "special" if is_special else "") for i, piece, is_special in named]
    _common.write(_common.columns(rows, right=[0], indent=""))


def _visible(piece: str) -> str:
    """The piece with line breaks and other invisible characters spelled out, so that one token is one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)
