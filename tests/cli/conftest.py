# SPDX-License-Identifier: Apache-2.0
"""Runs the program in this process, with a terminal or pipes as asked, and with a fake model behind it."""

import io
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from gemma.cli import _assistant, _backend
from gemma.cli.__main__ import run
from gemma.testing import ByteTokenizer, FakeRunner, tiny_config


class Result(NamedTuple):
    code: int
    out: str
    err: str


class Stream(io.TextIOWrapper):
    """A standard stream over memory that says whether it is a terminal."""

    def __init__(self, content: bytes = b"", terminal: bool = False):
        super().__init__(io.BytesIO(content), encoding="utf-8", newline="", write_through=True)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode("utf-8")


@pytest.fixture
def cli(monkeypatch):
    """cli("fit", "gemma3_1b", stdin=b"", terminal=False) -> Result(code, out, err)."""

    def call(*arguments, stdin: bytes = b"", terminal: bool = False) -> Result:
        streams = [Stream(stdin, terminal), Stream(terminal=terminal), Stream()]
        with monkeypatch.context() as patch:
            for name, stream in zip(("stdin", "stdout", "stderr"), streams):
                patch.setattr(sys, name, stream)
            code = run([str(a) for a in arguments])
        return Result(code, streams[1].text, streams[2].text)

    return call


class Fake:
    """A model without one: `reply` is what it says after every prompt, then <eos>; None: endless hashed letters."""

    def __init__(self, reply: str | None = None, **config):
        self.reply, self.tokenizer, self.config = reply, ByteTokenizer(), tiny_config(vocab_size=266, **config)
        self.prompts: list[tuple[int, ...]] = []
        self.runner = FakeRunner(self.config, slots=1, choose=None if reply is None else self._choose)

    def _choose(self, history):
        ids = [*self.tokenizer.encode(self.reply), 1]
        for done in range(len(ids), -1, -1):  # how much of the reply already stands at the end of the history
            if history[len(history) - done :] == tuple(ids[:done]):
                return ids[done] if done < len(ids) else ids[0]
        raise AssertionError("unreachable: done = 0 always matches")

    def open(self, name, **options):
        self.opened = (name, options["backend"], options["dtype"])
        self.options = options
        return _backend.Opened(name, Path("fake"), self.tokenizer, self.config, _backend.RunnerModel(self.runner))


@pytest.fixture
def fake(monkeypatch):
    """fake(reply=..., **config): installs a fake model behind generate and chat, and returns it."""

    def install(reply=None, *, tuned=True, **config) -> Fake:
        double = Fake(reply, **config)
        monkeypatch.setattr(_backend, "open_model", double.open)
        monkeypatch.setattr(_backend, "is_tuned", lambda path: tuned)
        monkeypatch.setattr(_assistant, "FOLDER", Path("no assistant"))  # what it does is test_adapter_flags.py's
        return double

    return install
