# SPDX-License-Identifier: Apache-2.0
"""What `gemma bench` measures: our runner, the memory's bandwidth, cold starts, guesses, and peers in processes of
their own. Each function measures once; rounds, medians and printing are `bench.py`.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemma.errors import GemmaError
from gemma.sampling import SamplingParams
from gemma.serving.engine import Engine
from gemma.serving.runner import StepIn

_PEER = Path(__file__).with_name("_bench_peer.py")
_READ_BYTES = 1 << 28  # of each thread, far beyond any cache
_GUESSES = 8
_REPEATING = """\
def area_of_circle(radius):
    return 3.14159 * radius * radius

def area_of_square(side):
    return side * side

def area_of_rectangle(width, height):
    return width * height

# The same functions again, with nothing changed:

def area_of_circle(radius):
    return 3.14159"""
_OTHER = "The most surprising thing about the old lighthouse keeper was"


class Ours:
    """The native runner, asked in the way in which peers are asked."""

    name = "gemmakit"

    def __init__(self, runner: Any, tokenizer: Any):
        self._runner, self._tokenizer = runner, tokenizer
        self.model = runner.model
        self.config = self.model.config

    def open(self, slots: int, max_len: int, cache_type: str) -> None:
        self._runner.open(slots, max_len, cache_type)
        self._cache_type = cache_type

    def prefill(self, count: int) -> float:
        """Tokens per second of reading `count` tokens into an empty slot."""
        self._runner.free(0)
        ids = self._ids(count)
        begin = time.perf_counter()
        self._runner.prefill(0, ids, 0)
        return count / (time.perf_counter() - begin)

    def decode(self, depth: int, steps: int, batch: int = 1) -> float:
        """Tokens per second of `batch` sequences that decode together, each from `depth` tokens on, sampler included."""
        self._runner.free(0)
        self._runner.prefill(0, self._ids(depth), 0)
        for slot in range(1, batch):
            self._runner.copy_prefix(0, slot, depth)
        tokens = self._ids(batch)
        begin = time.perf_counter()
        for _ in range(steps):
            outs = self._runner.step([StepIn(slot, token) for slot, token in enumerate(tokens)])
            tokens = [out.token for out in outs]
        return batch * steps / (time.perf_counter() - begin)

    def bytes_per_token(self, depth: int) -> int:
        """That decoding one token must read: every weight and factor once, and the keys and values that it attends to."""
        value = {"float32": 4, "bfloat16": 2, "int8": 1}[self._cache_type]
        return self.model.weight_bytes + self.model.adapter_bytes + self.config.cache_bytes(depth, value)

    def guessing(self, repeating: bool, steps: int) -> tuple[float, float]:
        """(time without guesses / time with them, share of right guesses) on one text; the tokens are compared."""
        text, how = (_REPEATING, dict(temperature=0)) if repeating else (_OTHER, dict(temperature=1.0, top_k=64))
        ids = self._tokenizer.encode(text, add_bos=True)
        room = self._runner.info.max_len - len(ids)
        params = SamplingParams(**how, seed=1, max_new_tokens=max(1, min(steps, room)))
        seconds, made = [], []
        for guesses in (0, _GUESSES):
            engine = Engine(self._runner, slots=1, cache_dtype=self._cache_type, speculate=guesses)
            request = engine.submit(ids, params)
            engine.run()
            seconds.append(request.ended - request.started)
            made.append(request)
        if made[0].ids != made[1].ids:
            raise GemmaError("bench: guessed tokens differ from those without guesses; this is a fault of the backend")
        share = made[1].accepted / made[1].drafted if made[1].drafted else 0.0
        return seconds[0] / seconds[1], share

    def _ids(self, count: int) -> list[int]:
        most = self.config.vocab_size
        return [2, *((n * 7919) % (most - 300) + 200 for n in range(1, count))] if most > 1000 else [5] * count


class Peer:
    """llama.cpp in an environment of its own, behind `_bench_peer.py`; a context manager."""

    def __init__(self, python: Path, path: Path, threads: int, context: int):
        self.folder = python.parent.parent.name
        # As a text, isolated: nothing of this program's folders is importable over there.
        line = [os.fspath(python), "-I", "-c", _PEER.read_text(), os.fspath(path), str(threads), str(context)]
        self._process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        told = self._answer("its first line")
        if "error" in told:
            self.close()
            raise GemmaError(f"--peers: {self.folder}: {told['error']}")
        self.name, self.version, self.load_seconds = told["name"], told["version"], told["load_s"]

    def prefill(self, count: int) -> float:
        return self._ask(f"prefill {count}")

    def decode(self, depth: int, steps: int) -> float:
        return self._ask(f"decode {depth} {steps}")

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _ask(self, line: str) -> float:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return float(self._answer(line))

    def _answer(self, what: str) -> Any:
        """The next line that is JSON; what a library prints on its own is passed over."""
        while line := self._process.stdout.readline():
            try:
                return json.loads(line)
            except ValueError:
                continue
        code = self._process.wait()
        raise GemmaError(f"--peers: {self.folder}: it ended with code {code} instead of answering {what!r}")


def find_peers(folder: Path) -> list[Path]:
    """The Python of each environment in a folder that holds one of the bindings; or of the folder itself."""
    found = []
    for home in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        packages = [
            path for kind in ("llama_cpp", "xllamacpp") for path in home.glob(f"lib/python*/site-packages/{kind}")
        ]
        if packages and (home / "bin/python").exists():
            found.append(home / "bin/python")
    return found


def read_bandwidth(threads: int, rounds: int = 5) -> float:
    """Bytes per second that so many threads read from memory, at best."""
    arrays = [np.ones(_READ_BYTES // 8, np.int64) for _ in range(threads)]
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            begin = time.perf_counter()
            list(pool.map(np.add.reduce, arrays))
            best = max(best, threads * _READ_BYTES / (time.perf_counter() - begin))
    return best


class ColdStart(NamedTuple):
    """Seconds from the start of the process to the first text, and the most memory that it held, in bytes."""

    seconds: float
    memory: int


def cold_start(model: str, threads: int, adapter: str | None = None) -> ColdStart:
    """`gemma generate` as a process of its own."""
    line = [sys.executable, "-m", "gemma.cli", "generate", "The history of computing began", "--no-echo", "-n", "2"]
    with_adapter = [] if adapter is None else ["--adapter", adapter]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [*line, "--backend", "cpu", "--threads", str(threads), "--model", model, *with_adapter],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    first = os.read(process.stdout.fileno(), 1)
    seconds = time.perf_counter() - begin
    with process.stdout, process.stderr:
        process.stdout.read()
        said = process.stderr.read().decode(errors="replace").strip()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if not first or process.returncode:
        raise GemmaError(f"bench: a cold start ended with code {process.returncode}: {said[-300:]}")
    return ColdStart(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def in_turns(sides: Sequence[Any], rounds: int, measure: Any) -> list[list[float]]:
    """`measure(side)` for each side, one after the other, `rounds` times over: the values of each side."""
    values: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds):
        for held, side in zip(values, sides):
            held.append(measure(side))
    return values
