# SPDX-License-Identifier: Apache-2.0
"""What every hostile file must meet: one GemmaError that names the file, in bounded memory and time.

`drive` uses a file the way a program would, end to end; `refused` runs it and checks the outcome. The memory bound is
taken twice: tracemalloc sees Python and numpy, the process's peak resident size sees native code too.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tracemalloc
import warnings
from pathlib import Path

from gemma.checkpoint import load_tensors, open_checkpoint
from gemma.errors import FormatError, GemmaError
from gemma.tokenizer import Tokenizer

LIMIT = 64_000_000  # bytes a refusal may cost
HANG = 30  # seconds; a refusal takes milliseconds, so this only tells slow machines from endless loops


@contextlib.contextmanager
def no_hang(seconds: int = HANG):
    def ring(signum, frame):
        raise AssertionError(f"still busy after {seconds} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def _status(field: str) -> int:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


@contextlib.contextmanager
def resident(limit: int = LIMIT):
    """The block may not raise the process's peak resident size by more than `limit` bytes (Linux; else no check)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
    before = _status("VmRSS")
    yield
    grown = _status("VmHWM") - before
    assert grown <= limit, f"peak resident size grew by {grown / 1e6:.1f} MB"


@contextlib.contextmanager
def bounded(limit: int = LIMIT, seconds: int = HANG):
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    base = tracemalloc.get_traced_memory()[0]
    try:
        with no_hang(seconds), resident(limit):
            yield
        peak = tracemalloc.get_traced_memory()[1] - base
    finally:
        if started:
            tracemalloc.stop()
    assert peak <= limit, f"{peak / 1e6:.1f} MB allocated at the peak"


def drive(path, *, tensors: bool = True) -> None:
    """Everything a program does with a checkpoint: open, configure, tokenize, bind and read every tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_checkpoint(path) as checkpoint:
            config = checkpoint.config()
            source = checkpoint.tokenizer_source()
            if source is not None:
                tokenizer = Tokenizer.from_source(source)
                tokenizer.decode(tokenizer.encode("the  world\n\n日é<table>"))
            if tensors:
                for _, read in load_tensors(checkpoint, config):
                    read()


def refused(
    path: str | os.PathLike,
    error: type[BaseException] | tuple[type[BaseException], ...] = FormatError,
    *,
    match: str | None = None,
    offset: int | None = None,
    act=open_checkpoint,
    names: str | None = None,
    longest: int = 4000,
) -> GemmaError:
    """`act(path)` must raise one `error`; returns it.

    Args:
      match: a regular expression that the message holds.
      offset: the byte that a FormatError must point at.
      names: what the message must name; default the file's (or folder's) own name.
      longest: characters that the message may have.
    """
    caught = None
    with bounded():
        try:
            done = act(path)
        except GemmaError as e:
            caught = e
        except Exception as e:
            raise AssertionError(f"{type(e).__name__} escaped instead of a GemmaError: {e}") from e
        else:
            close = getattr(done, "close", None)
            if close is not None:
                close()
    assert caught is not None, "the file was accepted"
    message = str(caught)
    assert isinstance(caught, error), f"{type(caught).__name__}: {message}"
    assert (Path(path).name if names is None else names) in message, f"the file is not named: {message}"
    assert len(message) < longest and message.strip(), message[:200]
    if match is not None:
        assert re.search(match, message, re.I), f"expected {match!r} in: {message}"
    if offset is not None:
        assert isinstance(caught, FormatError)
        assert caught.offset == offset, f"expected byte {offset}: {message}"
    return caught


def survives(path, act=drive) -> GemmaError | None:
    """Either accepted or refused: nothing but a GemmaError may come out. Returns the error, if any."""
    try:
        with no_hang():
            done = act(path)
    except GemmaError as e:
        return e
    close = getattr(done, "close", None)
    if close is not None:
        close()
    return None
