# SPDX-License-Identifier: Apache-2.0
"""What the results have in common: a run of `gm.train.finetune` with a log, greedy answers, a picture, the page.

The page docs/results.md has a block for each result between two comments; a script replaces its own, and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma.chat import Turn
from gemma.errors import DataError
from gemma.finetuning import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results.md"
WORK = ROOT / "build" / "results"  # data that was prepared, runs with their checkpoints


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
      folder: of the run. adapter: of its adapter, in PEFT's format.
      steps, tokens, seconds: taken, placed in rows (padding left out), spent in steps, first compilation included.
      losses: (step, training loss). scores: (step, evaluation), each a dict.
      report: of the data, as it was printed before the first step.
    """

    folder: Path
    adapter: Path
    steps: int
    tokens: int
    seconds: float
    losses: list[tuple[int, float]]
    scores: list[tuple[int, dict[str, float]]]
    report: str


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSONL file; rewritten only if it differs, so that a run that was interrupted can go on."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path


def train(config: RunConfig) -> Trained:
    """Runs `gm.train.finetune`, or goes on with a run that was interrupted, and keeps its numbers in numbers.json."""
    from gemma import gm

    numbers: dict[str, float] = {"tokens": 0, "seconds": 0.0}

    def tell(name: str, values: Mapping[str, Any]) -> None:
        if name == "data":
            print(f"{values['report']}\n{values['steps']} steps", flush=True)
        elif name == "step":
            numbers.update(tokens=values["tokens"], seconds=values["seconds"])
            speed, left = values["tokens_per_second"], values["eta"]
            print(
                f"step {values['step']:.0f}: loss {values['loss']:.4f}, {speed:.0f} tokens/s, {left:.0f} s left",
                flush=True,
            )
        elif name == "eval":
            print(f"held out: {dict(values)}", flush=True)
        elif name == "export":
            print(f"{values['export'].path}: {values['export']}", flush=True)

    result = gm.train.finetune(config, on_event=tell)
    if not result.finished:
        raise SystemExit(f"{result.folder}: interrupted; the same command goes on")
    history = result.training.history
    saved = result.folder / "numbers.json"
    if numbers["tokens"]:
        saved.write_text(json.dumps(numbers))
    elif saved.is_file():  # every step was taken by an earlier call
        numbers = json.loads(saved.read_text())
    return Trained(
        result.folder,
        result.folder / "adapter",
        result.steps,
        int(numbers["tokens"]),
        float(numbers["seconds"]),
        [(int(row["step"]), row["loss"]) for row in history if "loss" in row],
        [(int(row["step"]), dict(row)) for row in history if "eval_loss" in row],
        str(result.report),
    )


class Writer:
    """Greedy text of the demo model, with or without an adapter, one prompt at a time."""

    def __init__(self, adapter: Path | None = None, *, context: int = 1024):
        from gemma.cli import _backend

        self.opened = _backend.open_model("demo", adapter=None if adapter is None else str(adapter))
        self._context = context

    def completion(self, prompt: str, *, most: int = 96, stop: Sequence[str] = ("\n",)) -> str:
        """What follows a raw text, up to an end token or a stop string."""
        from gemma import chat

        ids = self.opened.tokenizer.encode(prompt, add_bos=True, parse_special=False)
        return self._write(ids, most, stop, chat.end_token_ids(self.opened.tokenizer, self.opened.config))[0]

    def answer(self, turns: Sequence[Turn], *, most: int = 128, base: bool = False) -> tuple[str, bool]:
        """(the answer to a conversation, whether it ended by itself). `base`: in the text that shows a few turns to a
        model that knows no template, as `gemma chat` does without the assistant.
        """
        from gemma import chat

        tokenizer = self.opened.tokenizer
        ends = chat.end_token_ids(tokenizer, self.opened.config)
        if base:
            ids = tokenizer.encode(chat.few_shot(tuple(turns)), add_bos=True, parse_special=False)
            return self._write(ids, most, chat.FEW_SHOT_STOP, ends)
        return self._write(list(chat.encode_chat(tokenizer, tuple(turns)).ids), most, (), ends)

    def _write(self, ids: Sequence[int], most: int, stop: Sequence[str], ends: Any) -> tuple[str, bool]:
        from gemma.cli._generation import Generation
        from gemma.sampling import SamplingParams

        params = SamplingParams(temperature=0, max_new_tokens=most, stop=tuple(stop), seed=0)
        self.opened.model.begin(self._context)
        made = Generation(self.opened, ids, params, ends, show_special=False)
        text = "".join(made)
        return text.strip(), made.finish_reason == "stop"


def curve(path: Path, trained: Trained, measure: str, title: str) -> None:
    """A small picture of the training loss and of one measure of the evaluations ("eval_loss")."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 2.6), dpi=80)
    axes.plot(*zip(*trained.losses), color="#9ab", linewidth=0.9, label="training")
    points = [(step, row[measure]) for step, row in trained.scores if measure in row]
    if points:
        axes.plot(*zip(*points), color="#c50", marker="o", markersize=3, label="held out")
    axes.set(xlabel="step", ylabel="loss, nats per label", title=title)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def write_block(name: str, text: str, page: Path = PAGE) -> None:
    """Replaces what stands between `<!-- name -->` and `<!-- /name -->`.

    Raises:
      DataError: the page has no such place.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    whole = page.read_text(encoding="utf-8")
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise DataError(f"{page}: expected the lines {begin.strip()} and {end}")
    page.write_text(f"{before}{begin}{text.strip()}\n{end}{after}", encoding="utf-8")


def machine() -> str:
    """The processor that a result was made on, for the page."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass  # no such file: another system
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} x {model}"


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


class Clock:
    """Seconds since it was made."""

    def __init__(self):
        self._begin = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin
