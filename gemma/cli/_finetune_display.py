# SPDX-License-Identifier: Apache-2.0
"""What is seen of a run while it goes: a live line on a terminal, plain lines elsewhere. Events are those of `finetune`.

The data report and the memory estimate are output and go to standard output; everything that moves goes to standard
error, as with all commands.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from gemma.cli import _common

_PLAIN_SECONDS = 1.0  # at most one plain line in so many, but for the last step
_BAD_ROWS = 10


class Display:
    """Is called with each event; a context manager, so that a terminal is left as it was.

    Args:
      as_json: standard output is for JSON: tables go to standard error.
      log_every: steps between plain lines.
    """

    def __init__(self, *, as_json: bool = False, log_every: int = 1):
        self._as_json, self._log_every = as_json, log_every
        self._live = _common.is_terminal(sys.stderr)
        self._bar: Any = None
        self._task: Any = None
        self._last = 0.0
        self._steps = 0
        self._compiled = False

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, name: str, values: Mapping[str, Any]) -> None:
        """One event; those without a method here are not shown."""
        shown = getattr(self, f"_on_{name}", None)
        if shown is not None:
            shown(values)

    # ---- before the first step

    def _on_data(self, values: Mapping[str, Any]) -> None:
        self._steps = values["steps"]
        text = "".join(f"  {line}\n" for line in str(values["report"]).splitlines())
        text += f"  {'steps':<32}{self._steps:,}\n"
        for problem in values["problems"][:_BAD_ROWS]:
            text += f"  left out: {problem}\n"
        more = len(values["problems"]) - _BAD_ROWS
        self._table(text + (f"  and {more} more\n" if more > 0 else ""))

    def _on_memory(self, values: Mapping[str, Any]) -> None:
        from gemma.cli.finetune import fits

        estimate = values["estimate"]
        if estimate is None:
            return
        self._table("\n" + "".join(f"  {line}\n" for line in str(estimate).splitlines()) + "\n")
        if not fits(estimate):
            _common.note("this may not fit into memory; see the estimate")

    def _on_loading(self, values: Mapping[str, Any]) -> None:
        self._say(f"loading {values['model']}")

    def _on_start(self, values: Mapping[str, Any]) -> None:
        trained, frozen = values["trainable"], values["frozen"]
        share = 100 * trained / max(1, trained + frozen)
        self._say(f"training {trained:,} of {trained + frozen:,} numbers ({share:.3g} %)")
        if values["step"]:
            self._say(f"going on after step {values['step']} of {values['steps']}")
        if self._live and values["step"] < values["steps"]:
            self._show("compiling", values["step"], values["steps"], "")

    # ---- steps

    def _on_step(self, values: Mapping[str, float]) -> None:
        step, steps = int(values["step"]), int(values["steps"])
        parts = [f"loss {values['loss']:.4f}", f"{values['peak_bytes'] / 1e9:.1f} GB"]
        if self._compiled:  # the time of the first step is that of compiling it
            parts[1:1] = [f"{values['tokens_per_second']:,.0f} tokens/s", f"ETA {duration(values['eta'])}"]
        text, self._compiled = "  ".join(parts), True
        if values["skipped"]:
            self._say(f"step {step}: the loss or a gradient was not finite; skipped")
        if self._live:
            self._show("training", step, steps, text)
            return
        now = time.monotonic()
        if (step % self._log_every == 0 and (now - self._last >= _PLAIN_SECONDS)) or step in (1, steps):
            self._last = now
            self._say(f"step {step}/{steps}  {text}")

    def _on_eval(self, values: Mapping[str, float]) -> None:
        shown = ("eval_loss", "eval_perplexity", "eval_accuracy")
        found = "  ".join(f"{name.removeprefix('eval_')} {values[name]:.4f}" for name in shown if name in values)
        self._say(f"held out after step {int(values['step'])}: {found}")

    def _on_samples(self, values: Mapping[str, Any]) -> None:
        for prompt, text in values["samples"]:
            self._say(f"{prompt!r:.60} -> {text!r:.400}")

    def _on_progress(self, values: Mapping[str, Any]) -> None:
        if self._live:
            self._show(values["what"], values["done"], max(values["total"], 1), "")

    def _on_export(self, values: Mapping[str, Any]) -> None:
        done = values["export"]
        self._say(f"{done.kind}: {done.path} ({done})")
        for note in done.notes:
            self._say(f"{done.kind}: {note}")

    def _on_end(self, values: Mapping[str, Any]) -> None:
        del values
        self._close()

    # ---- how

    def _table(self, text: str) -> None:
        if self._as_json:
            sys.stderr.write(text)
        else:
            _common.write(text)

    def _say(self, text: str) -> None:
        """A line that stays; above the moving one, if there is one."""
        if self._bar is None:
            _common.note(text)
        else:
            self._bar.console.print(f"gemma: {text}", highlight=False, markup=False, soft_wrap=True)

    def _show(self, what: str, done: int, total: int, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            look = (
                TextColumn("{task.description}"),
                BarColumn(24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*look, console=Console(stderr=True), transient=True, refresh_per_second=5)
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, text=text)
        self._bar.update(self._task, description=what, completed=done, total=total, text=text)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """ "1:02:03", "2:03": hours, minutes, seconds."""
    total = max(0, round(seconds))
    hours, rest = divmod(total, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
