# SPDX-License-Identifier: Apache-2.0
"""What surrounds the steps: speed and memory of the process, and signals that ask it to end. No JAX is used here."""

from __future__ import annotations

import collections
import signal
import sys
import threading
import time
from typing import Any

_STEPS = 20  # that the speed is taken over


def peak_bytes() -> float:
    """The most memory that this process has had, bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/status") as file:  # Linux; `ru_maxrss` there counts the parent before its exec, too
            return float(next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024)
    except (OSError, StopIteration):
        pass
    if sys.platform == "win32":
        return 0.0
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


class Meter:
    """Counts tokens and time.

    Attributes:
      tokens: so far, those of a resumed run included.
      seconds: likewise, evaluations and checkpoints included.
    """

    def __init__(self, tokens: int = 0, seconds: float = 0.0):
        self.tokens, self._before = tokens, seconds
        self._start = self._last = time.monotonic()
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=_STEPS)
        self._ticks = 0

    @property
    def seconds(self) -> float:
        """Since the start of the run, without the time between a stop and its resumption."""
        return self._before + time.monotonic() - self._start

    def tick(self, tokens: int, left: int) -> dict[str, float]:
        """After a step of so many tokens, with `left` steps to come: the numbers for the display."""
        now = time.monotonic()
        if self._ticks == 1:
            self._recent.clear()  # the first step was compiled: it says little about the others
        self._recent.append((now - self._last, tokens))
        self._last, self.tokens, self._ticks = now, self.tokens + tokens, self._ticks + 1
        spent = max(sum(seconds for seconds, _ in self._recent), 1e-9)
        return {
            "tokens": float(self.tokens),
            "seconds": self.seconds,
            "tokens_per_second": sum(count for _, count in self._recent) / spent,
            "eta": left * spent / len(self._recent),
            "peak_bytes": peak_bytes(),
        }

    def resume(self) -> None:
        """After an evaluation or a checkpoint, whose time is not that of a step."""
        self._last = time.monotonic()


class StopSignals:
    """While it is entered, SIGTERM and the first Ctrl-C only set `asked`; a second Ctrl-C interrupts as usual.

    Attributes:
      asked: the run should finish its step, save and end.
    """

    def __init__(self):
        self.asked = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python lets nobody handle signals
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old.clear()

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
