# SPDX-License-Identifier: Apache-2.0
"""What a run gives back, and what it tells while it runs. The loop is `_loop.py`, files of metrics `_loggers.py`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from gemma.gm.train._state import State

_ROWS = 2000  # of the history that a checkpoint holds


@dataclasses.dataclass(frozen=True)
class Result:
    """The end of a run.

    Attributes:
      state: the last one.
      params: the whole tree, adapters included, each leaf in the dtype that it came in; with an EMA, its average in
        place of the trained leaves.
      history: a dictionary of floats for each step and each evaluation, in order, each with its "step".
      stopped_by: "steps", "data" (the loader ended), "early_stop", "signal" (SIGTERM or Ctrl-C),
        "callback", or "save_error" (of `Trainer.rescued`).
    """

    state: State
    params: dict[str, Any]
    history: list[dict[str, float]]
    stopped_by: str


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """Ends a run whose evaluations no longer get better.

    Attributes:
      patience: evaluations in a row that may pass without a better one.
      metric: of the evaluations.
      mode: "min": smaller is better; "max".
      min_delta: by how much a value has to be better to count.
    """

    patience: int = 3
    metric: str = "eval_loss"
    mode: str = "min"
    min_delta: float = 0.0

    def wants_stop(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether the run ends here: a function of the history, so that a resumed run decides alike."""
        sign = 1.0 if self.mode == "min" else -1.0
        best, waited = float("inf"), 0
        for row in history:
            if self.metric in row:
                better = sign * row[self.metric] < best - self.min_delta
                best, waited = (sign * row[self.metric], 0) if better else (best, waited + 1)
        return waited >= self.patience

    def is_best(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether the last evaluation is better than all before it, by however little."""
        sign = 1.0 if self.mode == "min" else -1.0
        values = [sign * row[self.metric] for row in history if self.metric in row]
        return bool(values) and math.isfinite(values[-1]) and not any(value <= values[-1] for value in values[:-1])


class Callback:
    """What a run reports. Subclass it and override what you want; the methods here do nothing.

    Numbers are floats on the host. `on_step` comes one step late, when its numbers are there: asking for them earlier
    would hold the next step up. A true value returned by `on_step` or `on_eval` ends the run after a checkpoint.
    """

    def on_start(self, info: Mapping[str, Any]) -> None:
        """Before the first step: step (0, or where a run is resumed), steps, trainable, frozen (numbers of values)."""

    def on_step(self, metrics: Mapping[str, float]) -> Any:
        """After each step: step, steps, loss, learning_rate, grad_norm, skipped, tokens (so far), seconds (so far),
        tokens_per_second, eta (seconds), peak_bytes, and the objective's metrics."""

    def on_eval(self, metrics: Mapping[str, float]) -> Any:
        """After each evaluation: step, eval_loss, eval_perplexity, eval_accuracy, eval_seconds, ..."""

    def on_samples(self, step: int, samples: Sequence[tuple[Any, str]]) -> None:
        """After each evaluation with `sample_prompts`: (prompt, continuation) pairs."""

    def on_save(self, step: int) -> None:
        """After a checkpoint is complete on disk."""

    def on_end(self, result: Result) -> None:
        """After the last checkpoint."""


def tail(history: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """The history as a checkpoint keeps it: all evaluations, and every n-th step so that the rows stay few."""
    steps = sum("loss" in row for row in history)
    stride = -(-steps // _ROWS) or 1
    return [dict(row) for row in history if "loss" not in row or row["step"] % stride == 0]
