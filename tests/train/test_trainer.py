# SPDX-License-Identifier: Apache-2.0
"""The loop: exact resumption, evaluation that changes nothing, ends of every kind, and the files that it writes."""

from __future__ import annotations

import json
import math
import os
import signal

import jax
import numpy as np
import pytest
from train_helpers import TRAINED, Bigram, Rows, batch, bigram_params, equal

from gemma.errors import ConfigError, DataError, SaveError, TrainingError
from gemma.gm import train

ADAMW = train.OptimizerConfig(learning_rate=0.05, warmup_steps=2, weight_decay=0.01)
EVAL = Rows(count=2, epochs=1, seed=900)


def trainer(**fields):
    options = dict(optimizer=ADAMW, steps=8) | fields
    return train.Trainer(Bigram(), bigram_params(), TRAINED, options.pop("loader", Rows()), **options)


class Events(train.Callback):
    def __init__(self, stop_at=None, do=None):
        self.steps, self.evals, self.saves, self.end, self.start = [], [], [], None, None
        self.stop_at, self.do = stop_at, do

    def on_start(self, info):
        self.start = info

    def on_step(self, metrics):
        self.steps.append(metrics)
        if metrics["step"] == self.stop_at:
            return True if self.do is None else self.do()

    def on_eval(self, metrics):
        self.evals.append(metrics)

    def on_save(self, step):
        self.saves.append(step)

    def on_end(self, result):
        self.end = result


def losses(result):
    return [row["loss"] for row in result.history if "loss" in row]


def test_a_run_reports_itself_and_goes_down():
    events = Events()
    result = trainer(steps=30, callbacks=[events], eval_loader=EVAL, eval_every=10, eval_first=True).fit()
    assert result.stopped_by == "steps" and int(result.state.step) == 30
    assert [row["step"] for row in events.steps] == list(range(1, 31))
    assert [row["step"] for row in events.evals] == [0, 10, 20, 30]
    assert losses(result)[0] == pytest.approx(math.log(64), rel=0.05)
    assert np.mean(losses(result)[-5:]) < np.mean(losses(result)[:5])
    last = events.steps[-1]
    assert last["tokens"] == 30 * 48 and last["tokens_per_second"] > 0 and last["eta"] == 0 and last["peak_bytes"] > 1e6
    assert events.evals[-1]["eval_perplexity"] == pytest.approx(math.exp(events.evals[-1]["eval_loss"]))
    assert events.start["trainable"] == 64 * 6 * 2 + 6 and events.start["frozen"] == 3
    assert events.end is result
    assert equal(result.params["unused"], bigram_params()["unused"])
    assert result.params["in"]["w"].dtype == np.float32


def test_the_same_run_twice_and_evaluation_changes_nothing():
    one, two = trainer().fit(), trainer().fit()
    assert equal(one.state, two.state) and one.history == two.history
    watched = trainer(eval_loader=EVAL, eval_every=3, eval_first=True).fit()
    assert equal(one.state, watched.state) and losses(one) == losses(watched)
    assert losses(trainer(seed=1).fit()) != losses(one)


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path):
    def start(folder, **fields):
        (tmp_path / folder).mkdir(exist_ok=True)
        fields |= dict(eval_loader=EVAL, eval_every=4, save_every=2, ema=0.9, accumulate=2)
        loggers = [train.Csv(tmp_path / folder / "log.csv")]
        return trainer(checkpoints=train.Checkpoints(tmp_path / folder / "steps"), loggers=loggers, **fields)

    def crash():
        raise OSError("the machine is gone")

    whole = start("whole").fit()
    events = Events(stop_at=6, do=crash)  # told when step 7 runs: 6 is on disk, 7 is lost
    with pytest.raises(OSError, match="gone"):
        start("parts", callbacks=[events]).fit()
    assert events.saves == [2, 4, 6][: len(events.saves)] and len(events.saves) >= 2
    with open(tmp_path / "parts/log.csv", "a") as file:
        file.write("7,1.0,2.0")  # a line that was being written
    resumed = start("parts").fit()
    assert equal(resumed.state, whole.state) and equal(resumed.params, whole.params)
    assert resumed.history == whole.history
    assert (tmp_path / "parts/log.csv").read_bytes() == (tmp_path / "whole/log.csv").read_bytes()
    ended = start("parts").fit()
    assert equal(ended.state, whole.state) and ended.history == whole.history
    with pytest.raises(TrainingError, match="accumulate"):
        trainer(checkpoints=train.Checkpoints(tmp_path / "parts/steps"), ema=0.9).fit()


def test_a_full_disk_leaves_the_run_in_memory(tmp_path):
    store = train.Checkpoints(tmp_path / "steps")
    written = store.save

    def save(step, *rest, **more):
        if step == 4:
            raise SaveError("no space left on the device")
        written(step, *rest, **more)

    store.save = save
    run = trainer(checkpoints=store, save_every=2)
    with pytest.raises(SaveError, match="no space"):
        run.fit()
    assert store.latest_valid() == 2
    rescued = run.rescued()
    assert int(rescued.state.step) == 4 and rescued.stopped_by == "save_error" and len(losses(rescued)) == 4
    store.close()
    again = train.Checkpoints(tmp_path / "steps")  # there is room again: nothing of it shows in the end
    assert equal(trainer(checkpoints=again).fit().state, trainer().fit().state)
    with pytest.raises(ConfigError, match="nothing was lost"):
        trainer().rescued()


def test_an_evaluation_that_fails_costs_no_steps(tmp_path):
    def broken(n, made):
        raise DataError("row 7 is bad")

    def start(folder, **fields):
        return trainer(checkpoints=train.Checkpoints(tmp_path / folder), eval_every=3, save_every=100, **fields)

    with pytest.raises(DataError, match="row 7"):
        start("a", eval_loader=Rows(count=2, epochs=1, change=broken)).fit()
    assert train.Checkpoints(tmp_path / "a", read_only=True).steps() == [3]
    resumed, whole = start("a", eval_loader=EVAL).fit(), start("b", eval_loader=EVAL).fit()
    assert resumed.history == whole.history and equal(resumed.state, whole.state)


def test_of_a_run_that_may_stop_early_the_best_step_is_saved(tmp_path):
    events, early = Events(), train.EarlyStop(patience=9)
    store = train.Checkpoints(tmp_path / "steps", keep=1, keep_best=("eval_loss", "min"))
    options = dict(eval_loader=EVAL, eval_every=1, save_every=100, optimizer=train.OptimizerConfig(learning_rate=0.5))
    result = trainer(steps=6, checkpoints=store, callbacks=[events], early_stop=early, **options).fit()
    values = {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
    best = min(values, key=values.get)
    assert best < 6 and store.best() == best and store.steps() == [best, 6]
    assert events.saves == [n for n in values if values[n] < min([9e9, *(values[m] for m in range(1, n))])] + [6]


def test_the_evaluation_at_the_end_is_in_the_checkpoint_of_the_end(tmp_path):
    store = train.Checkpoints(tmp_path / "steps", keep_best=("eval_loss", "min"))
    trainer(steps=4, checkpoints=store, eval_loader=EVAL, eval_every=3, save_every=2).fit()
    assert "eval_loss" in store.about(4)["metrics"]


def test_a_signal_ends_the_run_after_a_checkpoint(tmp_path):
    def interrupt():
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    events = Events(stop_at=3, do=interrupt)
    result = trainer(checkpoints=train.Checkpoints(tmp_path / "steps"), callbacks=[events]).fit()
    assert result.stopped_by == "signal" and events.saves == [int(result.state.step)] and events.saves[0] < 8
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer(callbacks=[Events(stop_at=3)]).fit().stopped_by == "callback"


def test_a_run_ends_where_the_data_do_or_when_it_no_longer_gets_better():
    ended = trainer(loader=Rows(count=5), accumulate=2).fit()
    assert ended.stopped_by == "data" and int(ended.state.step) == 3  # the last of one batch
    early = train.EarlyStop(patience=2, min_delta=100.0)
    result = trainer(steps=50, eval_loader=EVAL, eval_every=1, early_stop=early).fit()
    assert result.stopped_by == "early_stop" and int(result.state.step) == 3
    with pytest.raises(DataError, match="no batch"):
        trainer(loader=Rows(count=0)).fit()


def test_steps_that_are_not_finite_are_skipped_and_too_many_end_the_run(tmp_path):
    def spoiled(first, last):
        def change(n, made):
            return made | {"weigh": np.full((4, 1), np.nan if first <= n <= last else 1.0, np.float32)}

        return Rows(change=change)

    result = trainer(loader=spoiled(3, 5), max_skipped=4).fit()
    assert int(result.state.skipped) == 3 and [row["skipped"] for row in result.history] == [0, 0, 1, 1, 1, 0, 0, 0]
    store = train.Checkpoints(tmp_path / "steps")
    with pytest.raises(TrainingError, match="4 steps in a row .* step 4 is the last one"):
        trainer(loader=spoiled(3, 99), max_skipped=4, save_every=2, checkpoints=store, steps=50).fit()


def test_batches_of_a_step_may_differ_in_length():
    def change(n, made):
        cut = 5 if n % 2 else 12
        return {name: value[:, :cut] for name, value in made.items()} if n % 2 else made

    result = trainer(loader=Rows(change=change), accumulate=2, steps=1, optimizer=train.OptimizerConfig()).fit()
    assert result.history[0]["weight"] == 4 * 5 + 4 * 12
    both = [change(1, batch(4, 1)), batch(4, 2)]
    assert train._feed.join(both, 3)["tokens"].shape == (9, 12)
    with pytest.raises(DataError, match="positions"):
        train._feed.join([both[0], {k: v for k, v in both[1].items() if k != "positions"}])


def test_the_moving_average_is_what_comes_out():
    result = trainer(ema=0.5).fit()
    assert equal(result.params["out"], result.state.ema["out"]) and not equal(
        result.params["out"], result.state.params["out"]
    )


def test_logs_are_cut_where_a_run_is_resumed(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("matplotlib")
    made = [train.Csv(tmp_path / "a.csv"), train.TensorBoard(tmp_path / "tb"), train.Png(tmp_path / "c.png")]
    made += [train.Samples(tmp_path / "s.jsonl")]
    history = [{"step": n, "loss": 3.0 - n / 10} for n in range(1, 6)]
    for last, rows in ((0, history), (3, [{"step": n, "loss": float(n)} for n in (4, 5)])):
        for logger in made:
            logger.resume(last, history[:last])
            for row in rows:
                logger.write(row["step"], row | {"seconds": 1.5})
            logger.write(5, {"step": 5, "eval_loss": 9.0})
            logger.samples(5, [("prompt", f"text {last}")])
            logger.close()
    lines = (tmp_path / "a.csv").read_text().splitlines()
    assert lines == ["step,loss,eval_loss", "1,2.9,", "2,2.8,", "3,2.7,", "4,4.0,", "5,5.0,", "5,,9.0"]
    events = event_accumulator.EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")] == [
        (1, 2.9),
        (2, 2.8),
        (3, 2.7),
        (4, 4),
        (5, 5),
    ]
    assert b"text 3" in events.Tensors("samples/0")[-1].tensor_proto.string_val[0]
    assert [json.loads(line)["text"] for line in (tmp_path / "s.jsonl").read_text().splitlines()] == ["text 3"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (dict(steps=None), "steps"),
        (dict(steps=0), "steps"),
        (dict(accumulate=0), "accumulate"),
        (dict(eval_every=0), "eval_every"),
        (dict(sample_prompts=["a"]), "tokenizer"),
        (dict(early_stop=train.EarlyStop()), "eval_loader"),
        (dict(ema=1.5), "ema"),
        (dict(eval_loader=Rows(), eval_every=1), "never ends"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fields, text):
    with pytest.raises(ConfigError, match=text):
        trainer(**fields).fit()


def test_a_trainer_is_good_for_one_run():
    used = trainer(steps=3)
    used.fit()
    with pytest.raises(ConfigError, match="one run"):
        used.fit()
    with pytest.raises(TrainingError, match="get_state"):
        store = train.Checkpoints("unused-folder", read_only=True)
        store.prepare = lambda state=None: None
        trainer(loader=[batch()], checkpoints=store).fit()
    assert jax.tree.leaves(bigram_params())  # the caller's arrays live on
