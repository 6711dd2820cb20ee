# SPDX-License-Identifier: Apache-2.0
"""What the verbs share: exit codes, one-line errors, reading text, sampling flags, plain tables, clean output.

Running a model is `_backend.py`, waiting for it is `_progress.py`.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma.errors import ConfigError, PromptError, SamplingError

if TYPE_CHECKING:
    from gemma.sampling import SamplingParams

OK, FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
EXIT_CODES = (
    "Exit codes: 0 done; 1 failed, or the answer is no (fit, doctor); 2 the command or its input cannot be used; "
    "130 interrupted by Ctrl-C; 141 the reader of the output went away."
)
_LONGEST_ERROR = 900  # characters; GEMMA_DEBUG=1 shows everything

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="A .gguf or .safetensors file, a Hugging Face folder, the name of a size in the cache folder, "
        "or demo: the real Gemma 3 270M.",
    ),
]
PromptFile = Annotated[
    str | None, typer.Option("--prompt-file", "-f", metavar="FILE", help="Read the text from a UTF-8 file.")
]
Context = Annotated[
    str | None, typer.Option("--context", "-c", metavar="N", help="Most tokens held, new ones included: 4096, 32k.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        metavar="PATH",
        help="A LoRA adapter of this model: a PEFT folder or a GGUF adapter.",
        show_default=False,
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", metavar="TYPE", help="Compute in float32, bfloat16 or float16.")]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="What computes: cpu (native kernels on packed weights), jax or torch; auto: cpu where it can, else jax.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", help="Threads of the cpu backend.  [default: all processors]", show_default=False
    ),
]
CacheType = Annotated[
    str | None,
    typer.Option(
        "--cache-type",
        metavar="TYPE",
        help="Keys and values of the cpu backend: f32, bf16 or int8.  [default: f32]",
        show_default=False,
    ),
]
Speculate = Annotated[
    int,
    typer.Option(
        "--speculate",
        metavar="N",
        help="Guess up to N tokens ahead where the text repeats itself (cpu backend): the same text, sooner. 0 is off.",
    ),
]
Stats = Annotated[bool, typer.Option("--stats", help="Say at the end, on standard error, how fast it was.")]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", metavar="T", help="0 is greedy: always the likeliest token.")
]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", help="Draw from the K likeliest tokens.")]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", metavar="P", help="Draw from the smallest set of tokens whose probability reaches P."),
]
MinP = Annotated[
    float | None,
    typer.Option("--min-p", metavar="P", help="Never draw a token less than P times as likely as the likeliest."),
]
Penalty = Annotated[
    float,
    typer.Option("--repetition-penalty", metavar="X", help="Above 1: tokens already seen become less likely."),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Same seed, same text. Without it every run differs.")
]


def sampling(stop: Sequence[str] = (), **flags) -> SamplingParams:
    """SamplingParams from flags; an error names the flag instead of the field."""
    from gemma.sampling import SamplingParams

    try:
        return SamplingParams(stop=tuple(map(unescape, stop)), **flags)
    except SamplingError as error:
        field, colon, rest = str(error).partition(":")
        flag = "--" + field.replace("_", "-")
        raise SamplingError(flag + colon + rest.replace(", or None", "").replace(" or None", "")) from error


def context_flag(text: str | None) -> int | None:
    """The tokens of --context; None where it was not given."""
    from gemma.fit import parse_context

    try:
        return None if text is None else parse_context(text)
    except ConfigError as error:
        raise ConfigError(f"--context: {error}") from error


def context_within(asked: int | None, most: int, default: int) -> int:
    """What --context asks for, which must not be more than the model holds; or the default, as far as it fits."""
    if asked is not None and not 1 <= asked <= most:
        raise ConfigError(f"--context: expected 1..{most} tokens, the length this model was made for, got {asked}")
    return min(default, most) if asked is None else asked


def seeded(params: SamplingParams) -> SamplingParams:
    """The same with a seed: an unpredictable one where none was given, so that it can be reported."""
    from gemma.sampling import fresh_seed

    return params if params.seed is not None else dataclasses.replace(params, seed=fresh_seed())


def backend_options(
    backend: str,
    dtype: str,
    threads: int | None,
    cache_type: str | None,
    speculate: int,
    adapter: str | None = None,
) -> dict:
    """What the flags of a backend mean, for `_backend.open_model`."""
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads: expected at least 1, got {threads}")
    if not 0 <= speculate <= 64:
        raise ConfigError(f"--speculate: expected 0 (off) to 64 tokens, got {speculate}")
    native = dict(threads=threads, cache_type=cache_type, speculate=speculate)
    return dict(backend=backend, dtype=dtype, adapter=adapter, **native)


def unescape(text: str) -> str:
    r"""The flag's text with \n, \t, \r and \\ made real; other backslashes stay."""
    real = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return re.sub(r"\\([ntr\\])", lambda match: real[match[1]], text)


def read_text(argument: str | None, file: str | None, what: str, *, flag: str = "--prompt-file") -> str:
    """The text of a command: its argument, a file (of `flag`), or standard input ("-", or no argument and a pipe).

    One newline at the end of a file or of standard input is dropped, as editors and `echo` put it there.
    """
    if argument is not None and file is not None:
        raise PromptError(f"expected either {what.upper()} or {flag}, got both")
    if file is not None:
        return _decoded(_file_bytes(file, flag), file)
    if argument is None and is_terminal(sys.stdin):
        raise PromptError(f'expected {what.upper()}, for example "The history of computing began", or - to read a pipe')
    if argument is None or argument == "-":
        return _decoded(sys.stdin.buffer.read(), "standard input")
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the {what} is not valid UTF-8 at character {error.start}; check the terminal's encoding"
        ) from error
    return argument


def _file_bytes(path: str, flag: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise PromptError(f"{flag} {path}: cannot be read ({reason}); give the path of a text file") from error


def _decoded(raw: bytes, where: str) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{where}: expected UTF-8, got the byte 0x{raw[error.start]:02x} at {error.start}; convert it, for example "
            f"with iconv -t UTF-8"
        ) from error
    text = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")  # a byte order mark is not part of a text
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def is_terminal(stream) -> bool:
    return stream is not None and stream.isatty()


def write(text: str) -> None:
    """Writes to standard output at once. A terminal is spared control characters, which could be commands to it."""
    if is_terminal(sys.stdout):
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """A remark for the user, on standard error: it never mixes with the output."""
    print(f"gemma: {text}", file=sys.stderr, flush=True)


def columns(rows: Iterable[Sequence[object]], right: Sequence[int] = (), indent: str = "  ") -> str:
    """Rows as aligned text; `right` are the columns aligned to the right. Never wraps, never colours."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)] if rows else []
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append((indent + "  ".join(cells)).rstrip() + "\n")
    return "".join(lines)


def one_line(error: BaseException) -> str:
    """An error's text on one line, printable and of bounded length."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip()).replace(":; ", ": ")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
    text = text or type(error).__name__
    if len(text) > _LONGEST_ERROR:
        text = f"{text[:_LONGEST_ERROR]}... (GEMMA_DEBUG=1 shows all of it)"
    return text


def debugging() -> bool:
    return os.environ.get("GEMMA_DEBUG", "") not in ("", "0")
