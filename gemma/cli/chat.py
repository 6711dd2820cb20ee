# SPDX-License-Identifier: Apache-2.0
"""`gemma chat`: a conversation of several turns, typed or piped in.

How turns become ids is `gemma/chat.py` and `_conversation.py`, the model `_backend.py`. Here: the loop, its commands,
and what the user sees.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from gemma.cli import _assistant, _backend, _common
from gemma.cli._conversation import Conversation
from gemma.cli._generation import beginning, context_limit
from gemma.cli._progress import waiting
from gemma.errors import ContextFull, GemmaError, PromptError

HELP = """\
Talk with a model over several turns.

An instruction-tuned model is spoken to in its chat template. A pretrained (base) model, such as demo, knows no
template: the conversation is wrapped in a text that shows a few turns, and chat says so. Where gemmakit brings an
assistant adapter for demo, chat uses that instead; --no-adapter leaves it out. An adapter of your own that was trained
on conversations gets the chat template. What you type is plain text: special tokens spelled out in it stay letters.
Answers are drawn at random, with the settings recommended for Gemma 3, unless --temperature 0 is given. In a pipe
every line is one turn, and only the answers are written; a line that begins with a slash but with none of the
commands is a turn as well.

\b
Commands in the conversation: /reset, /save FILE, /help, /exit.

\b
Examples:
  gemma chat
  gemma chat --model path/to/gemma-3-1b-it --system "Answer in one sentence."
  printf 'Hello\\nWhat is a prime number?\\n' | gemma chat --temperature 0
"""
_HELP = """\
/reset       begin a new conversation
/save FILE   write the conversation to FILE, as JSON
/help        show this
/exit        leave (so does Ctrl-D); Ctrl-C stops an answer
A message that begins with a slash: type the slash twice.
"""
_COMMANDS = ("/reset", "/save", "/help", "/exit")
_CONTEXT = 4096  # tokens of a conversation, where the model allows as many


def command(
    model: _common.Model = "demo",
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="Instructions for the whole conversation.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", metavar="N", help="Most tokens of one answer.")
    ] = 512,
    temperature: _common.Temperature = 1.0,
    top_k: _common.TopK = 64,
    top_p: _common.TopP = 0.95,
    min_p: _common.MinP = None,
    repetition_penalty: _common.Penalty = 1.0,
    seed: _common.Seed = None,
    kind: Annotated[
        str,
        typer.Option("--as", metavar="KIND", help="tuned: use the chat template; base: a few-shot text; auto: look."),
    ] = "auto",
    dtype: _common.Dtype = "float32",
    context: _common.Context = None,
    backend: _common.BackendName = "auto",
    adapter: _common.Adapter = None,
    no_adapter: Annotated[
        bool, typer.Option("--no-adapter", help="Without the assistant adapter that comes with gemmakit for demo.")
    ] = False,
    threads: _common.Threads = None,
    cache_type: _common.CacheType = None,
    speculate: _common.Speculate = 0,
    stats: _common.Stats = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    flags = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, max_new_tokens=max_new_tokens)
    params = _common.seeded(_common.sampling(repetition_penalty=repetition_penalty, seed=seed, **flags))
    if kind not in ("auto", "tuned", "base"):
        raise PromptError(f"--as: expected auto, tuned or base, got {kind!r}")
    asked = _common.context_flag(context)
    options = _common.backend_options(backend, dtype, threads, cache_type, speculate, adapter)
    opened, answers = _assistant.open_for_chat(model, options, plain=no_adapter)
    length = context_limit(opened, asked) if asked else min(_CONTEXT, context_limit(opened, None))
    base = kind == "base" or (kind == "auto" and not answers and not _backend.is_tuned(opened.path))
    if base:
        _common.note(
            f"{opened.name} is a pretrained model, not tuned to answer: it gets a few-shot conversation to continue"
            + (" (--as tuned uses the chat template)" if kind == "auto" else "")
        )
    conversation = Conversation(opened, params, length, system=system, base=base, stats=stats)
    if _common.is_terminal(sys.stdin) and _common.is_terminal(sys.stdout):
        _interactive(conversation)
    else:
        for line in _piped_lines():
            if line.strip() and not _obey(conversation, line):
                break


def _interactive(conversation: Conversation) -> None:
    import readline  # noqa: F401  gives input() its line editing and history

    _common.write("Type a message, or /help.\n")
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt) as end:
            _common.write("\n")
            if isinstance(end, KeyboardInterrupt):
                raise
            return
        try:
            if line.strip() and not _obey(conversation, line):
                return
        except KeyboardInterrupt:
            _common.write("\n")
            _common.note("answer stopped")
        except GemmaError as error:
            _common.note(f"error: {_common.one_line(error)}")


def _piped_lines() -> Iterator[str]:
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise PromptError(
                f"standard input, line {number}: expected UTF-8, got the byte 0x{raw[error.start]:02x}; convert it, "
                f"for example with iconv -t UTF-8"
            ) from error


def _obey(conversation: Conversation, line: str) -> bool:
    """Does what one line asks for: a command, or a turn. False: leave."""
    if not line.startswith("/") or line.startswith("//"):
        _answer(conversation, line[1:] if line.startswith("//") else line)
        return True
    word, _, argument = line.strip().partition(" ")
    if word not in _COMMANDS and not _common.is_terminal(sys.stdin):  # a path, say: nobody is there to type it again
        _answer(conversation, line)
        return True
    if word == "/exit":
        return False
    if word == "/reset":
        conversation.reset()
        _common.note("new conversation")
    elif word == "/save":
        _save(conversation, argument.strip())
    elif word == "/help":
        _common.note("commands\n" + _HELP.rstrip())
    else:
        raise PromptError(f"unknown command {word!r}: expected /reset, /save FILE, /help or /exit")
    return True


def _answer(conversation: Conversation, text: str) -> None:
    try:
        pieces = conversation.ask(text)
        with waiting("reading"):
            first = beginning(pieces)
    except ContextFull as error:
        raise PromptError(
            f"the conversation is full: {error.used} tokens of {error.limit}; /reset begins a new one, "
            f"--context N makes room for a longer one"
        ) from error
    _common.write(first.lstrip() if conversation.base else first)
    for piece in pieces:
        _common.write(piece)
    _common.write("\n")
    if conversation.stats and conversation.generation is not None:
        _common.note(conversation.generation.stats())


def _save(conversation: Conversation, name: str) -> None:
    if not name:
        raise PromptError("/save: expected the name of a file, such as /save talk.json")
    turns = [{"role": turn.role, "content": turn.content} for turn in conversation.turns]
    text = json.dumps({"model": conversation.name, "turns": turns}, ensure_ascii=False, indent=2) + "\n"
    try:
        with open(Path(name).expanduser(), "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise PromptError(f"/save {name}: this file exists and is not overwritten; give another name") from error
    except (OSError, ValueError) as error:
        raise PromptError(f"/save {name}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    _common.note(f"saved {len(turns)} turns to {name}")
