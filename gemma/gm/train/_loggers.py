# SPDX-License-Identifier: Apache-2.0
"""Files of metrics: CSV, TensorBoard, a picture of the curves, and the samples. All of them survive a resumption.

When a run is resumed at step n, what was written for later steps is cut off, so that the files end up as if it had
never stopped. Displays on a terminal are callbacks (`_result.py`).
"""

from __future__ import annotations

import abc
import csv
import io
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gemma import _atomic
from gemma.errors import DependencyError, SaveError

# They differ between two runs that are otherwise the same.
TIMES = ("seconds", "tokens_per_second", "eta", "peak_bytes", "eval_seconds")


class Logger(abc.ABC):
    """Something that is given the numbers of a run."""

    @abc.abstractmethod
    def resume(self, step: int, history: Sequence[Mapping[str, float]]) -> None:
        """Before anything else: the run goes on after `step` (0: it begins); `history` has the rows up to there."""

    @abc.abstractmethod
    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """The numbers of a step, or of an evaluation after it."""

    def samples(self, step: int, pairs: Sequence[tuple[Any, str]]) -> None:
        """(prompt, continuation) pairs; ignored unless a logger has a place for them."""
        del step, pairs

    @abc.abstractmethod
    def close(self) -> None:
        """Everything is on disk after this."""


class Csv(Logger):
    """A table with a row for each step and each evaluation, and a column for each number; empty where there is none."""

    def __init__(self, path: str | os.PathLike[str], *, times: bool = False):
        """
        Args:
          path: of the file, replaced when a run begins.
          times: also seconds, tokens per second and memory. Without them two equal runs write equal files.
        """
        self.path, self._times = Path(path), times
        self._columns: list[str] = ["step"]
        self._file: IO[str] | None = None

    def resume(self, step: int, history: Sequence[Mapping[str, float]]) -> None:
        """See `Logger`. A line that a killed run left unfinished is cut as well."""
        self.close()
        rows: list[dict[str, str]] = []
        if step and self.path.is_file():
            with _reported(self.path), open(self.path, newline="", encoding="utf-8") as file:
                text = file.read()
            whole = text[: text.rfind("\n") + 1]
            reader = csv.DictReader(io.StringIO(whole))
            self._columns = list(reader.fieldnames or ["step"])
            rows = [row for row in reader if (row.get("step") or "").isdigit() and int(row["step"]) <= step]
        self._rewrite(rows)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Logger`."""
        row = {name: value for name, value in metrics.items() if self._times or name not in TIMES} | {"step": step}
        new = [name for name in row if name not in self._columns]
        with _reported(self.path):
            if new:
                self.close()
                with open(self.path, newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
                self._columns += new
                self._rewrite(rows)
            assert self._file is not None
            csv.DictWriter(self._file, self._columns, lineterminator="\n").writerow(row)
            self._file.flush()

    def close(self) -> None:
        """See `Logger`."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        _replace(self.path, text.getvalue().encode())
        with _reported(self.path):
            self._file = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115


class Samples(Logger):
    """The continuations of the prompts, as JSON lines: step, prompt, text."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def resume(self, step: int, history: Sequence[Mapping[str, float]]) -> None:
        """See `Logger`."""
        kept = []
        if step and self.path.is_file():
            with _reported(self.path):
                lines = self.path.read_text(encoding="utf-8").splitlines()
            for line in lines:
                try:
                    kept += [line] if json.loads(line)["step"] <= step else []
                except (ValueError, KeyError, TypeError):
                    continue  # the unfinished line of a killed run
        _replace(self.path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers have no place here."""

    def samples(self, step: int, pairs: Sequence[tuple[Any, str]]) -> None:
        """See `Logger`."""
        with _reported(self.path), open(self.path, "a", encoding="utf-8") as file:
            for prompt, text in pairs:
                line = {"step": step, "prompt": prompt if isinstance(prompt, str) else str(prompt), "text": text}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Nothing is open between two calls."""


class TensorBoard(Logger):
    """Event files for TensorBoard, written by its own package; numbers as scalars, samples as texts."""

    def __init__(self, folder: str | os.PathLike[str]):
        """`folder`: each part of a run adds a file to it.

        Raises:
          DependencyError: (an ImportError) tensorboard is not installed.
        """
        self.folder = Path(folder)
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer import event_file_writer
        except ImportError:
            raise DependencyError("tensorboard", "train", "a log for TensorBoard") from None
        self._event, self._summary, self._writers = event_pb2, summary_pb2, event_file_writer
        self._writer: Any = None

    def resume(self, step: int, history: Sequence[Mapping[str, float]]) -> None:
        """See `Logger`. TensorBoard itself drops what older files have from this step on."""
        self.close()
        with _reported(self.folder):
            self._writer = self._writers.EventFileWriter(str(self.folder))
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._add(step + 1 if step else 0, session_log=start)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Logger`."""
        values = [
            self._summary.Summary.Value(tag=f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}",
                                        simple_value=float(value))
            for name, value in metrics.items()
            if name != "step"
        ]  # fmt: skip
        self._add(step, summary=self._summary.Summary(value=values))

    def samples(self, step: int, pairs: Sequence[tuple[Any, str]]) -> None:
        """See `Logger`."""
        from tensorboard.compat.proto import tensor_pb2, tensor_shape_pb2, types_pb2

        data = self._summary.SummaryMetadata.PluginData(plugin_name="text")
        about = self._summary.SummaryMetadata(plugin_data=data)
        shape = tensor_shape_pb2.TensorShapeProto(dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)])
        values = []
        for i, (prompt, text) in enumerate(pairs):
            tensor = tensor_pb2.TensorProto(
                dtype=types_pb2.DT_STRING, tensor_shape=shape, string_val=[f"**{prompt}**\n\n{text}".encode()]
            )
            values.append(self._summary.Summary.Value(tag=f"samples/{i}", metadata=about, tensor=tensor))
        self._add(step, summary=self._summary.Summary(value=values))

    def close(self) -> None:
        """See `Logger`."""
        if self._writer is not None:
            with _reported(self.folder):
                self._writer.close()
        self._writer = None

    def _add(self, step: int, **what: Any) -> None:
        with _reported(self.folder):
            self._writer.add_event(self._event.Event(step=step, wall_time=time.time(), **what))


class Png(Logger):
    """A picture of the curves: loss and evaluations above, learning rate and gradient norm below."""

    def __init__(self, path: str | os.PathLike[str]):
        """`path`: of the picture, drawn anew after each evaluation and at the end.

        Raises:
          DependencyError: (an ImportError) matplotlib is not installed.
        """
        self.path = Path(path)
        self._rows: list[dict[str, float]] = []
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise DependencyError("matplotlib", "train", "a picture of the curves") from None

    def resume(self, step: int, history: Sequence[Mapping[str, float]]) -> None:
        """See `Logger`."""
        self._rows = [dict(row) for row in history]

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Logger`."""
        self._rows.append({**metrics, "step": step})
        if "eval_loss" in metrics:
            self._draw()

    def close(self) -> None:
        """See `Logger`."""
        if self._rows:
            self._draw()

    def _draw(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6), layout="constrained")
        canvas = FigureCanvasAgg(figure)  # no window system, and no state shared with a user's own figures
        top, bottom = figure.subplots(2, 1, sharex=True)
        top.plot(*self._curve("loss"), lw=0.6, alpha=0.5, color="tab:blue")
        top.plot(*_smooth(*self._curve("loss")), color="tab:blue", label="loss")
        if any("eval_loss" in row for row in self._rows):
            top.plot(*self._curve("eval_loss"), "o-", ms=4, color="tab:red", label="loss of the evaluation")
        top.set_ylabel("nats per label")
        top.legend(loc="upper right")
        right = bottom.twinx()
        lines = bottom.plot(*self._curve("learning_rate"), color="tab:green", label="learning rate")
        lines += right.plot(*self._curve("grad_norm"), lw=0.6, color="tab:gray", label="gradient norm")
        bottom.set_xlabel("step")
        bottom.set_ylabel("learning rate")
        right.set_ylabel("gradient norm")
        bottom.legend(handles=lines, loc="upper right")
        picture = io.BytesIO()
        canvas.print_png(picture)
        _replace(self.path, picture.getvalue())

    def _curve(self, name: str) -> tuple[list[float], list[float]]:
        points = [(row["step"], row[name]) for row in self._rows if math.isfinite(row.get(name, math.nan))]
        return [x for x, _ in points], [y for _, y in points]


def _smooth(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """An exponential mean over about a twentieth of the run, corrected at its beginning."""
    decay, mean, weight, out = 1 - 1 / max(len(ys) / 20, 1), 0.0, 0.0, []
    for y in ys:
        mean, weight = decay * mean + (1 - decay) * y, decay * weight + 1 - decay
        out.append(mean / weight)
    return xs, out


def _replace(path: Path, data: bytes) -> None:
    with _reported(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _atomic.atomic_file(path, replace=True) as file:
        file.write(data)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Failures of the system as SaveError."""
    try:
        yield
    except SaveError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaveError(
            f"{path}: could not be written: {reason}; free the disk or choose another place", error.errno
        ) from error
