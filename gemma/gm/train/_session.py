# SPDX-License-Identifier: Apache-2.0
"""What happens during `Trainer.fit`, in order: begin or resume, step, report, evaluate, save, end.

The numbers of a step are asked for when the next one is under way, so that the devices never wait for the host. The
settings are the `Trainer`'s (`_loop.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from gemma.errors import DataError, TrainingError
from gemma.gm.train import _evaluate
from gemma.gm.train._feed import Feed, count_tokens, take
from gemma.gm.train._meter import Meter, StopSignals
from gemma.gm.train._processes import gather_objects, process
from gemma.gm.train._result import Result, tail
from gemma.gm.train._state import State
from gemma.gm.train._step import Step

if TYPE_CHECKING:
    from gemma.gm.train._loop import Trainer


class Session:
    """A run in progress.

    Attributes:
      trainer: the settings.
      state: the newest.
      step: batches used, as `state.step` says.
      history: rows of floats, without times.
    """

    def __init__(self, trainer: Trainer, frozen: Any, feed: Feed, step: Step):
        self.trainer, self._frozen, self._feed, self._advance = trainer, frozen, feed, step
        self._sums = _evaluate.make_sums(trainer.objective, trainer.compute_dtype if trainer.ema is None else
                                         trainer.dtypes)  # fmt: skip
        self._loggers = trainer.loggers if process()[0] == 0 else ()
        self.state: State
        self.step, self.history, self._streak = 0, [], 0
        self._pending: tuple[int, Any, int] | None = None
        self._saved = self._evaluated = -1
        self._wanted = False  # a callback asked for the end

    # ---- beginning and end -------------------------------------------------------------------------------------------

    def begin(self, like: State, make: Callable[[], State]) -> None:
        """Restores the newest whole checkpoint, or makes the first state."""
        trainer, store = self.trainer, self.trainer.checkpoints
        self._batches = iter(trainer.loader)
        if store is not None:
            store.prepare(like)
            self._position()  # now, not when the first checkpoint is due
        latest = None if store is None else store.latest_valid()
        if latest is None:
            self.state, self._meter = make(), Meter()
        else:
            self.state, extra = store.restore(latest, like=like)
            self._resume(extra)
        for logger in self._loggers:
            logger.resume(self.step, self.history)
        counts = {"trainable": _values(self.state.params), "frozen": _values(self._frozen)}
        for callback in trainer.callbacks:
            callback.on_start({"step": self.step, "steps": trainer.steps, **counts})

    def _resume(self, extra: Mapping[str, Any]) -> None:
        try:
            accumulate, position = extra["accumulate"], extra["loader"]
            self.history, self._streak = [dict(row) for row in extra["history"]], int(extra["streak"])
            self._meter = Meter(int(extra["tokens"]), float(extra["seconds"]))
            self._evaluated = int(extra["evaluated"])
        except KeyError as error:
            raise TrainingError(
                f"the checkpoint was not saved by Trainer: its `extra` lacks {error}; use another output folder"
            ) from None
        if accumulate != self.trainer.accumulate:
            raise TrainingError(
                f"accumulate: the saved run has {accumulate}, this one {self.trainer.accumulate}: the same step would use "
                f"other rows; resume with the saved value, or use another output folder"
            )
        self.step = self._saved = int(self.state.step)
        self._batches.set_state(position)

    def run(self) -> Result:
        """Steps to the end. Loggers are closed whatever happens."""
        trainer = self.trainer
        try:
            with StopSignals() as signals:
                # After step 0: the run was resumed where an evaluation had failed, or was not wanted then.
                if trainer.eval_first if self.step == 0 else self._is_due(trainer.eval_every):
                    self._evaluate()
                    self._save_evaluated()
                reason = self._stop_reason(signals)
                while reason is None:
                    reason = "data" if not self._one() else self._stop_reason(signals)
                self._flush()
                if reason not in ("signal", "callback"):
                    self._evaluate()
                self._save()
        finally:
            for logger in self._loggers:
                logger.close()
        result = self.result(reason)
        for callback in trainer.callbacks:
            callback.on_end(result)
        return result

    def result(self, reason: str) -> Result:
        """What there is now."""
        return Result(self.state, self.trainer.whole(self.state, self._frozen), self.history, reason)

    def _stop_reason(self, signals: StopSignals) -> str | None:
        trainer = self.trainer
        asked, wanted = signals.asked, self._wanted
        if process()[1] > 1:  # a signal may reach one process only, and all have to stop at the same step
            told = gather_objects([asked, wanted])
            asked, wanted = (any(row[i] for row in told) for i in (0, 1))
        if asked:
            return "signal"
        if wanted:
            return "callback"
        early = trainer.early_stop if self._evaluated == self.step else None
        if early is not None and early.wants_stop(self.history):
            return "early_stop"
        return "steps" if self.step >= trainer.steps else None

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _one(self) -> bool:
        """One step and what is due after it; False if the data have ended."""
        trainer = self.trainer
        batches = take(self._batches, trainer.accumulate)
        if process()[1] > 1 and not all(gather_objects(bool(batches))):
            batches = []  # where one process has none left, none of them goes on
        if not batches:
            if self.step == 0:
                raise DataError(
                    "the loader gave no batch: every row was dropped, or there are fewer than a batch needs"
                )
            return False
        host = self._feed.host(batches)
        batch = self._feed.device(host, self._frozen)
        self.state, metrics = self._advance(self.state, self._frozen, batch)
        self.step += 1
        self._flush()
        # Of all processes: the history has to be the same for each of them, or fewer could not resume it.
        self._pending = (self.step, metrics, sum(gather_objects(count_tokens(host))))
        if self._is_due(trainer.eval_every):
            self._evaluate()
        if self._is_due(trainer.save_every):
            self._save()
        self._save_evaluated()
        return True

    def _is_due(self, every: int | None) -> bool:
        return bool(every) and self.step % every == 0

    def _flush(self) -> None:
        """Reports the step whose numbers are outstanding."""
        if self._pending is None:
            return
        (step, device, tokens), self._pending = self._pending, None
        trainer = self.trainer
        metrics = {name: float(value) for name, value in jax.device_get(device).items()}
        times = self._meter.tick(tokens, trainer.steps - step)
        row = {"step": step, **metrics, "tokens": times["tokens"]}
        self.history.append(row)
        for logger in self._loggers:
            logger.write(step, row | times)
        for callback in trainer.callbacks:
            self._wanted |= bool(callback.on_step({**row, **times, "steps": trainer.steps}))
        self._streak = self._streak + 1 if metrics["skipped"] else 0
        if self._streak >= trainer.max_skipped:
            self._give_up(metrics)

    def _give_up(self, metrics: Mapping[str, float]) -> None:
        why = "no labels" if not metrics["weight"] else f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
        store = self.trainer.checkpoints
        last = None if store is None else store.latest_valid()
        kept = "nothing was saved" if last is None else f"the checkpoint of step {last} is the last one, and good"
        raise TrainingError(
            f"step {self.step}: {self._streak} steps in a row had no finite loss and gradient (the last: {why}); {kept}. "
            f"Lower the learning rate, clip gradients, or look at the rows of these steps"
        )

    # ---- evaluation and checkpoints ----------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Scores and samples, once per step, and tells them. What goes wrong there does not cost the steps before it."""
        trainer = self.trainer
        self._flush()  # a run that diverges ends here, and is not saved
        if self._evaluated == self.step or (trainer.eval_loader is None and not trainer.sample_prompts):
            return
        try:
            self._report()
        except Exception:
            # Not where there are several processes: saving waits for all of them, and the others may not be here.
            if self.step and process()[1] == 1:
                self._save()
            raise
        self._meter.resume()

    def _report(self) -> None:
        trainer = self.trainer
        if trainer.eval_loader is not None:
            before = self._meter.seconds
            row = {"step": self.step, **self._scores()}
            self.history.append(row)
            # From here on the step counts as evaluated, and a checkpoint of it that was written before lacks this row.
            self._evaluated, self._saved = self.step, -1
            seconds = {"eval_seconds": self._meter.seconds - before}
            for logger in self._loggers:
                logger.write(self.step, row | seconds)
            for callback in trainer.callbacks:
                self._wanted |= bool(callback.on_eval({**row, **seconds}))
        if trainer.sample_prompts:
            self._sample()
        self._evaluated = self.step

    def _save_evaluated(self) -> None:
        """Of a run that may stop early, each step that evaluated best so far: the best one is what is exported."""
        early = self.trainer.early_stop
        if early is not None and self._evaluated == self.step and early.is_best(self.history):
            self._save()

    def _scores(self) -> dict[str, float]:
        trainer, state = self.trainer, self.state
        leaves = state.params if state.ema is None else state.ema
        parts = []
        for host in _evaluate.first(trainer.eval_loader, trainer.eval_batches):
            batch = self._feed.device(self._feed.host([host]), self._frozen)
            parts.append(self._sums(leaves, self._frozen, batch))
        return {f"eval_{name}": value for name, value in _evaluate.totals(parts).items() if name != "weight"}

    def _sample(self) -> None:
        trainer = self.trainer
        params = trainer.whole(self.state, self._frozen)
        texts = _evaluate.sample(
            trainer.objective.model,
            params,
            trainer.tokenizer,
            trainer.sample_ids,
            tokens=trainer.sample_tokens,
            mesh=None if trainer.placement is None else trainer.placement.mesh,
        )
        pairs = list(zip(trainer.sample_prompts, texts, strict=True))
        for logger in self._loggers:
            logger.samples(self.step, pairs)
        for callback in trainer.callbacks:
            callback.on_samples(self.step, pairs)

    def _position(self) -> Any:
        """Where the loader is, as JSON values."""
        get = getattr(self._batches, "get_state", None)
        if get is None:
            raise TrainingError(
                f"{type(self._batches).__name__}: a run that is saved needs a loader whose iterator has get_state() and "
                f"set_state(), such as gm.data.Loader; or leave out `checkpoints`"
            )
        return get()

    def _save(self) -> None:
        """A checkpoint of this step, once."""
        store = self.trainer.checkpoints
        self._flush()
        if store is None or self._saved == self.step:
            return
        found = [row for row in self.history if row["step"] == self.step and "eval_loss" in row]
        extra = {
            "loader": self._position(),
            "history": tail(self.history),
            "accumulate": self.trainer.accumulate,
            "evaluated": self._evaluated,
            "streak": self._streak,
            "tokens": self._meter.tokens,
            "seconds": self._meter.seconds,
        }
        store.save(self.step, self.state, extra, metrics=found[-1] if found else {})
        self._saved = self.step
        self._meter.resume()
        for callback in self.trainer.callbacks:
            callback.on_save(self.step)


def _values(tree: Any) -> int:
    """Numbers in a tree; a packed weight counts as the weights that it stands for."""
    from gemma.gm.nn._packed import Packed

    return sum(leaf.size for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Packed)))
