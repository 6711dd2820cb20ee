# SPDX-License-Identifier: Apache-2.0
"""The program `gemma`: the verbs put together, and every error turned into one line and an exit code.

A verb is one module beside this one; to add one, write it and add it to `app` below.
"""

from __future__ import annotations

import copy
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

import gemma
from gemma.cli import (
    _common,
    bench,
    chat,
    convert,
    doctor,
    embed,
    eval,
    finetune,
    fit,
    generate,
    inspect,
    pull,
    quantize,
    see,
    tokenize,
)
from gemma.errors import GemmaError

app = typer.Typer(
    name="gemma",
    rich_markup_mode=None,  # plain help: the same text on a terminal, in a pipe and in docs/cli.md
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 100},
)
for _verb in (
    generate,
    chat,
    see,
    embed,
    finetune,
    eval,
    convert,
    quantize,
    pull,
    inspect,
    tokenize,
    fit,
    bench,
    doctor,
):
    app.command(_verb.__name__.rpartition(".")[2], help=_verb.HELP)(_verb.command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gemmakit {gemma.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog=_common.EXIT_CODES)
def overview(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Run, chat with and examine Gemma models.

    \b
    Examples:
      gemma generate "The history of computing began"
      gemma chat --model path/to/gemma-3-1b-it
      gemma finetune chats.jsonl
      gemma inspect model.gguf
      gemma fit gemma3_12b --context 32k

    The model named demo, the default, is the real pretrained Gemma 3 270M of the extra gemmakit[demo]. Environment:
    GEMMA_CACHE_DIR is the cache folder (~/.gemma); GEMMA_DEBUG=1 shows tracebacks.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line, without the program's name; returns its exit code."""
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except BrokenPipeError:
        # The reader (`| head`) has what it wanted. The interpreter flushes once more on exit: give it a place to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _common.BROKEN_PIPE
    except (KeyboardInterrupt, typer.Abort):
        return _common.INTERRUPTED
    except GemmaError as error:
        return _failed(error, _common.USAGE)
    except MemoryError as error:
        return _failed(error, _common.FAILED, "out of memory; `gemma fit` says what a model needs")
    except Exception as error:
        text = f"unexpected {type(error).__name__}: {_common.one_line(error)} (GEMMA_DEBUG=1 shows where)"
        return _failed(error, _common.FAILED, text)


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(_program(arguments))
    try:
        with command.make_context("gemma", arguments) as context:
            code = command.invoke(context)
        sys.stdout.flush()
        return code if isinstance(code, int) else _common.OK
    except typer.Exit as stop:
        sys.stdout.flush()
        return stop.exit_code
    except typer.TyperException as error:  # raised by the parser: unknown flags, values of the wrong type
        verb = arguments[0] if arguments and arguments[0] in _verbs() else ""
        text = error.format_message().rstrip(".")
        return _failed(error, _common.USAGE, f"{text}; see `gemma {verb}{' ' * bool(verb)}--help`")


def _program(arguments: list[str]) -> typer.Typer:
    """The program with the one verb that is asked for: working out the flags of all the others takes 0.2 seconds."""
    asked = [command for command in app.registered_commands if arguments[:1] == [command.name]]
    if not asked:
        return app
    program = copy.copy(app)
    program.registered_commands = asked
    return program


def _verbs() -> set[str]:
    return {command.name for command in app.registered_commands if command.name}


def _failed(error: BaseException, code: int, text: str | None = None) -> int:
    if _common.debugging():
        traceback.print_exception(error)
    print(f"gemma: error: {text or _common.one_line(error)}", file=sys.stderr, flush=True)
    return code


def main() -> None:
    """Entry point of the installed program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    sys.exit(run())


if __name__ == "__main__":
    main()
