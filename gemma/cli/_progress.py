# SPDX-License-Identifier: Apache-2.0
"""What a user sees while waiting: a line on standard error that goes away; nothing at all when it is not a terminal.

It appears after half a second, so quick work stays quiet. Output is `_common.py`'s `write`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from gemma.cli._common import is_terminal

_DELAY = 0.5  # seconds


@contextlib.contextmanager
def waiting(message: str) -> Iterator[None]:
    """Shows `message`, a moving bar and the time that passed, as long as the block runs."""
    if not is_terminal(sys.stderr):
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    look = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
    bar = Progress(*look, console=Console(stderr=True), transient=True, refresh_per_second=5)
    bar.add_task(message, total=None)
    timer = threading.Timer(_DELAY, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    except KeyboardInterrupt:
        print(file=sys.stderr)  # leave the line that shows ^C
        raise
    finally:
        timer.cancel()
        timer.join()  # it may be starting the bar right now
        bar.stop()


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """Gives `progress(what, done, total)`: a bar with a percentage for each step of a long piece of work."""
    if not is_terminal(sys.stderr):
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    look = (TextColumn("{task.description:<18}"), BarColumn(32), TaskProgressColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    with Progress(*look, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=max(total, 1))
            bar.update(tasks[what], completed=done, total=max(total, 1))

        yield progress
