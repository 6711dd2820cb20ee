# SPDX-License-Identifier: Apache-2.0
"""`gemma embed`: texts or a file of them to vectors, in a .npy or .jsonl file or on standard output.

The model is `gemma/gm/text/_embedding.py`. A file is read line by line and never held as a whole; a line that cannot be
embedded is reported with its number and makes the exit code 1, and the others are embedded all the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from gemma._atomic import atomic_file
from gemma.cli import _common
from gemma.cli._progress import waiting
from gemma.errors import ConfigError, PromptError

HELP = """\
Turn texts into vectors for search and comparison, with EmbeddingGemma.

A text as an argument, or --input FILE: a .txt file with one text per line, or a .jsonl file whose lines are texts or
objects with a "text" (and a "title", for documents). --task says what the vectors are for: query and document are made
for each other. --dim keeps the first numbers of each vector: 512, 256 or 128 of 768. The output is float32 of unit
length, one row per text, as .npy or as .jsonl (one object per line, on standard output without --output).

\b
Examples:
  gemma embed -m embeddinggemma-300m "Which planet is red?" --task query
  gemma embed -m embeddinggemma-300m --input notes.jsonl --task document --dim 256 --output notes.npy
  cat lines.txt | gemma embed -m embeddinggemma-300m --input - --output lines.jsonl
"""
_BATCH, _LONGEST = 32, 1 << 24  # bytes of one line


def command(
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="One text.", show_default=False)] = None,
    model: _common.Model = "embeddinggemma_300m",
    input_file: Annotated[
        str | None, typer.Option("--input", "-i", metavar="FILE", help="Texts: .txt or .jsonl; - is standard input.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="A .npy or .jsonl file; none: standard output.")
    ] = None,
    task: Annotated[
        str, typer.Option("--task", metavar="TASK", help="The prompt: query, document, similarity, ...")
    ] = ("none"),
    dim: Annotated[int | None, typer.Option("--dim", metavar="N", help="Numbers of a vector; none: all.")] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Texts computed side by side.")] = _BATCH,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut off what the model cannot hold, instead of reporting the line.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there already.")] = False,
    dtype: _common.Dtype = "float32",
) -> int:
    """Runs the verb; `HELP` is what --help says."""
    from gemma.gm.text._embedding import TextEmbedder

    if (text is None) == (input_file is None):
        raise PromptError("expected either TEXT or --input FILE" + (", got both" if text is not None else ""))
    if output is not None and Path(output).suffix not in (".npy", ".jsonl"):
        raise ConfigError(f"--output: expected a name that ends with .npy or .jsonl, got {output}")
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype: expected float32 or bfloat16 for an EmbeddingGemma, got {dtype}")
    with waiting(f"reading {model}"):
        embedder = TextEmbedder.load(model, dtype=dtype)
    if task not in embedder.prompts:
        raise PromptError(f"--task: expected one of {', '.join(embedder.prompts)}, got {task}")
    lines = _Lines(embedder, input_file, text, task, truncate)
    vectors = embedder.embed_ids(lines, dim=dim, batch_size=batch)
    length = embedder.width if dim is None else dim
    if output is None:
        for vector in vectors:
            _common.write(_json_line(lines.numbers.pop(0), vector))
    else:
        with atomic_file(output, replace=force) as file:
            _write(file, Path(output).suffix, vectors, lines, length)
            lines.check()
    lines.check()
    if lines.bad:
        _common.note(f"{lines.bad} of {lines.bad + lines.done} lines could not be embedded; they have no row")
    return _common.FAILED if lines.bad else _common.OK


def _write(file: IO[bytes], suffix: str, vectors: Iterator[Any], lines: _Lines, length: int) -> None:
    if suffix == ".npy":
        _write_npy(file, vectors, length)
        return
    for vector in vectors:
        file.write(_json_line(lines.numbers.pop(0), vector).encode())


class _Lines:
    """The token ids of each good line, while they are needed; bad ones are reported and counted.

    Attributes:
      numbers: of the lines, from 1, whose vectors have not come yet.
      done, bad: how many there were.
    """

    def __init__(self, embedder: Any, source: str | None, text: str | None, task: str, truncate: bool):
        self._embedder, self._source, self._text = embedder, source, text
        self._task, self._truncate = task, truncate
        self.numbers: list[int] = []
        self.done = self.bad = 0

    def check(self) -> None:
        """Refuses a source without a single line."""
        if not self.done and not self.bad:
            raise PromptError(f"--input {self._source}: no texts in it")

    def __iter__(self) -> Iterator[list[int]]:
        if self._text is not None:
            row = self._embedder.ids(self._text, self._task, truncate=self._truncate)
            self.numbers.append(1)
            self.done = 1
            yield row
            return
        for number, parse in self._parsers():
            try:
                text, title = parse()
                row = self._embedder.ids(text, self._task, title=title, truncate=self._truncate)
            except PromptError as error:
                self.bad += 1
                _common.note(f"{self._source}: line {number}: {error}")
                continue
            self.numbers.append(number)
            self.done += 1
            yield row

    def _parsers(self) -> Iterator[tuple[int, Callable[[], tuple[str, str | None]]]]:
        source = self._source
        objects = source.endswith(".jsonl")
        try:
            file = sys.stdin.buffer if source == "-" else open(Path(source).expanduser(), "rb")  # noqa: SIM115
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise PromptError(f"--input {source}: cannot be read ({reason}); give the path of a text file") from error
        with file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), 1):
                if len(line) == _LONGEST and not line.endswith(b"\n"):
                    raise PromptError(f"--input {source}: line {number} is longer than {_LONGEST} bytes; split it")
                if line.strip():
                    yield number, (lambda line=line: _parsed(line, objects))


def _parsed(line: bytes, objects: bool) -> tuple[str, str | None]:
    try:
        text = line.decode("utf-8").strip("\r\n")
    except UnicodeDecodeError as error:
        raise PromptError(f"expected UTF-8, got the byte 0x{line[error.start]:02x} at {error.start}") from error
    if not objects:
        return text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}"), None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"not valid JSON: {str(error)[:200]}") from error
    title = value.get("title") if isinstance(value, dict) else None
    value = value.get("text") if isinstance(value, dict) else value
    if not isinstance(value, str) or not (title is None or isinstance(title, str)):
        raise PromptError('expected a text, or an object with a "text" (and a "title") of text')
    return value, title


def _json_line(number: int, vector: Any) -> str:
    """The shortest decimals that read as the same float32."""
    numbers = [float(str(x)) for x in vector]
    return json.dumps({"line": number, "embedding": numbers}) + "\n"


def _write_npy(file: IO[bytes], vectors: Iterator[Any], length: int) -> None:
    """A .npy whose number of rows is put into its header at the end: room is left for any number."""
    import io

    import numpy as np

    def header(rows: int) -> bytes:
        plain = io.BytesIO()
        shape = dict(descr="<f4", fortran_order=False, shape=(rows, length))
        np.lib.format.write_array_header_1_0(plain, shape)
        return plain.getvalue()

    widest = len(header(10**12))
    file.write(b" " * widest)
    rows = 0
    for vector in vectors:
        file.write(np.ascontiguousarray(vector, "<f4").tobytes())
        rows += 1
    known = header(rows)
    body = known[10:].rstrip(b"\n").ljust(widest - 11) + b"\n"  # magic, version and length take 10 bytes
    file.seek(0)
    file.write(known[:8] + len(body).to_bytes(2, "little") + body)
