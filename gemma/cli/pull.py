# SPDX-License-Identifier: Apache-2.0
"""`gemma pull`: downloads a model from the Hugging Face hub, and prints the folder that it is in.

The download itself is `gemma/hub.py`'s; this shows it while it runs.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from gemma.cli import _common
from gemma.cli._progress import waiting

HELP = """\
Download a model from the Hugging Face hub.

Weights, configuration and tokenizer are taken, never code. A broken download continues where it stopped; every file is
compared with the hub's checksum; the model appears only when it is complete. The other commands then find it by the
same name. Accept the model's licence on its page first, and put an access token into HF_TOKEN.

A size means the variant tuned to instructions; with -pt it means the pretrained one.

\b
Examples:
  gemma pull gemma3-1b
  gemma pull google/gemma-3-4b-pt --to models/gemma
  gemma pull someone/gemma-3-1b-it-GGUF --file "*Q4_K_M.gguf"
"""


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A repository, as in google/gemma-3-1b-it, or the name of a size.")
    ],
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="A branch, tag or commit.  [default: main]")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FOLDER", help="Where to put it.  [default: models/ in the cache folder]"),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="PATTERN", help="Which weights, where there are several; may be repeated."),
    ] = None,
    as_json: _common.Json = False,
) -> None:
    """Runs the verb; `HELP` is what --help says."""
    from gemma import hub
    from gemma.fit import format_bytes

    if model.strip() == hub.DEMO:
        with waiting("preparing the demo model"):
            path = hub.demo_path()
        _common.note(f"{hub.DEMO} comes with the package; nothing to download")
        _common.write(json.dumps({"path": str(path)}) + "\n" if as_json else f"{path}\n")
        return
    with _bar() as progress:
        done = hub.pull(model, revision=revision, to=to, patterns=tuple(file or ()), progress=progress)
    if as_json:
        shown = dict(path=str(done.path), repository=done.repository, revision=done.revision)
        shown |= dict(files=list(done.files), bytes=done.size, downloaded=done.downloaded)
        _common.write(json.dumps(shown) + "\n")
        return
    came = f"{format_bytes(done.downloaded)} downloaded" if done.downloaded else "was here already"
    _common.note(
        f"{done.repository} at {done.revision[:12]}: {len(done.files)} files, {format_bytes(done.size)}, {came}; checksums "
        f"agree"
    )
    _common.write(f"{done.path}\n")


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A line with the file, bytes, rate and remaining time on a terminal; nothing otherwise."""
    if not _common.is_terminal(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    look = (
        TextColumn("{task.description}"),
        BarColumn(24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*look, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("asking the hub", total=None)
        yield lambda name, here, total: bar.update(task, description=escape(name), completed=here, total=max(total, 1))
